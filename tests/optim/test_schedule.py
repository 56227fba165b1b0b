"""Schedules: rate, batch and updates as functions of how far the run is, whatever the number of ranks."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xc.comm.world import World
from xc.config import Config, parse
from xc.errors import UserError
from xc.intervals import interval
from xc.optim.schedule import Progress, Schedule
from xc.optim.schedule_plot import draw, steps_of


def schedule(num_records=1000, num_ranks=2, **flags):
    flags = {"optimizer": "sgd", "lr": 0.1, "warmup": "0.5epochs"} | flags
    return Schedule.of(Config(data="d", out="o", **flags), num_records, num_ranks)


def fccs(**flags):
    return schedule(10_000, **{"schedule": "fccs", "global_batch": 100, "max_batch": 800, "epochs": 4.0} | flags)


def rates(one):
    return [now.lr for _, now in steps_of(one)]


def after(one, step):
    """The Progress after so many steps."""
    *_, (position, now) = itertools.islice(steps_of(one), step)
    return position.after(now)


@pytest.mark.parametrize("flags, num_ranks", [
    ({"global_batch": 1}, 1), ({"global_batch": 8, "micro_batches": 8}, 1),
    ({"global_batch": 1, "schedule": "fccs", "max_batch": 8}, 1)])
def test_a_micro_batch_of_one_example_is_refused(flags, num_ranks):
    """The norm of its features over the batch would make all of them 0: the loss stays ln C."""
    with pytest.raises(ValueError, match="a micro-batch of one example has no statistics"):
        schedule(num_ranks=num_ranks, **flags)
    assert schedule(**{**flags, "global_batch": 8, "micro_batches": 4}).micro_batch == 2


def test_steps_follow_from_epochs():
    assert schedule(global_batch=100, epochs=2.0).num_steps == 20
    assert schedule(global_batch=128, epochs=2.0).num_steps == 16
    assert schedule(global_batch=100, epochs=2.0, steps=7).num_steps == 7


def test_warmup_then_cosine_to_zero():
    found = rates(schedule(global_batch=100, epochs=10.0, warmup="1epochs", lr=2.0))
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert found[55] == pytest.approx(1.0) and found[-1] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


def test_step_decay_and_constant():
    found = rates(schedule(global_batch=100, warmup="0", lr=2.0, schedule="step"))
    assert [found[step] for step in (0, 49, 50, 74, 75, 99)] == pytest.approx([2, 2, 0.2, 0.2, 0.02, 0.02])
    assert set(rates(schedule(global_batch=100, warmup="0", lr=2.0, schedule="constant"))) == {2.0}


@pytest.mark.parametrize("text, found", [
    ("0.5epochs", (0.5, "epochs")), ("2", (2.0, "epochs")), ("1epoch", (1.0, "epochs")),
    ("500 steps", (500.0, "steps")),
    ("1e6examples", (1e6, "examples")), ("12.5%", (12.5, "percent")), ("0", (0.0, "epochs")),
    ("", None), ("often", None), ("-1", None),
    ("1e400", None), ("5 %s", None), ("nan", None), ("1days", None), ("1e", None)])
def test_a_time_is_a_number_and_a_unit(text, found):
    assert interval(text) == found


@pytest.mark.parametrize("texts", [("1epochs", "10steps", "1000examples", "10%", "1")])
def test_units_agree(texts):
    assert {schedule(global_batch=100, epochs=10.0, warmup=text).warmup for text in texts} == {10}
    assert {fccs(fccs_hold=text).hold for text in ("0.4", "40steps", "4000examples", "10%")} == {40}


def test_fccs_grows_between_hold_and_tail():
    one = fccs(lr=2.0, warmup="0.4epochs", fccs_hold="10%", fccs_growth="50%", fccs_tail="25%")
    assert (one.warmup, one.hold, one.growth, one.tail, one.length) == (40, 40, 200, 100, 400)
    steps = list(steps_of(one))
    assert sum(now.global_batch for _, now in steps) == 4 * 10_000 == one.examples
    assert len(steps) == one.num_steps == len(one.starts)
    for position, now in steps:
        done = position.examples // 100
        assert now.first_accumulation_step == done
        assert now.micro_batches == now.accumulation_steps == now.global_batch // 100
        if done < 80:
            assert now.accumulation_steps == 1
        elif done < 280:
            exact = 1 + 7 * (1 - math.cos(math.pi * (done - 80) / 200)) / 2
            assert abs(now.accumulation_steps - exact) <= 0.5
        elif done + 8 <= 400:
            assert now.accumulation_steps == 8
        if 40 <= done <= 300:
            assert now.lr == 2.0
        elif done > 300:
            assert now.lr == pytest.approx(1 - math.cos(math.pi * (400 - done) / 100))
    batches = [now.global_batch for _, now in steps]
    assert batches[:-1] == sorted(batches[:-1])


def test_growth_has_all_the_room_unless_it_is_told_otherwise():
    assert fccs(fccs_hold="10%", fccs_tail="25%", warmup="5%").growth == 240
    assert fccs(fccs_tail="0").growth == 400 - 50  # half an epoch of warm-up
    assert fccs(fccs_growth="60steps").growth == 60  # of one round, as all steps that a course is given in


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 50), st.integers(1, 300), st.integers(0, 20), st.integers(0, 30),
       st.integers(0, 40), st.integers(0, 9), st.integers(1, 3))
def test_nothing_is_lost_at_any_setting(batch, most, steps, warmup, hold, tail, growth, parts):
    """Every example of the run is in one step; as many updates as asked for, or a line that says why not."""
    settings = {"schedule": "fccs", "global_batch": batch * parts, "max_batch": batch * parts * most, "steps": steps,
                "warmup": f"{warmup}%", "fccs_hold": f"{hold}%", "fccs_tail": f"{tail}%", "micro_batches": parts}
    if most > 1:
        settings["fccs_growth"] = f"{growth}%"
    try:
        one = Schedule.of(Config(data="d", out="o", **settings), num_records=100_000, num_ranks=1)
    except ValueError as error:
        assert "no schedule with these parts" in str(error) or "no time to grow" in str(error)
        return
    assert one.num_steps == steps
    seen = Progress()
    for position, now in steps_of(one):
        assert position == seen and 1 <= now.accumulation_steps <= most
        assert now.micro_batches == now.accumulation_steps * parts
        assert now.global_batch == now.accumulation_steps * batch * parts
        seen = position.after(now)
        assert one.resume(seen) == seen
    assert seen.examples == one.examples == one.length * batch * parts and seen.step == steps


def test_the_number_of_ranks_changes_nothing():
    found = {tuple(steps_of(schedule(10_000, ranks, schedule="fccs", max_batch=1024))) for ranks in (1, 3, 128)}
    assert len(found) == 1


def test_auto_grows_with_the_noise_and_never_beyond():
    one = fccs(batch_growth="auto", fccs_hold="10%", micro_batches=2)
    assert one.batch_schedule != fccs().batch_schedule == schedule().batch_schedule
    # Multiples of another batch are another schedule.
    assert one.batch_schedule != fccs(batch_growth="auto", global_batch=200, micro_batches=2).batch_schedule
    assert not one.is_warm(Progress(49, 4900, 100)) and one.is_warm(Progress(50, 5000, 100))
    assert one.num_steps is None and one.least_steps == 50
    early, late = Progress(3, 300, 100), Progress(200, 20_000, 100)
    assert not one.grows(early) and one.grows(late)
    assert [one.plan(late, growth).accumulation_steps for growth in (1, 1.4, 1.6, 7.9, 8, 100)] == [1, 1, 2, 8, 8, 8]
    assert one.plan(early, 5).accumulation_steps == 1
    assert one.plan(Progress(1, one.examples - 300, 800), 8).accumulation_steps == 3  # what is left
    assert one.resume(Progress(40, 20_000, 800)).step == 40  # any number of steps can lead there


def test_due_once_an_interval():
    s = schedule(global_batch=128, epochs=4.0)  # 7.8 steps an epoch
    positions = [p.after(now) for p, now in steps_of(s)]
    assert [p.step for p in positions if s.due(p, "1epochs")] == [8, 16, 24]
    assert [p.step for p in positions if s.due(p, "0")] == []
    assert [p.step for p in positions if s.due(p, "25%")] == [8, 16, 24]
    assert [p.step for p in positions if s.due(p, "10steps")] == [10, 20, 30]
    assert not s.due(Progress(), "1steps")
    grown = fccs(fccs_hold="0", fccs_tail="0")
    positions = [p.after(now) for p, now in steps_of(grown)]
    found = [p.examples for p in positions if grown.due(p, "0.5epochs")]
    assert [n // 5000 for n in found] == [1, 2, 3, 4, 5, 6, 7]  # steps of up to 800 examples fall on no exact place


@pytest.mark.parametrize("s", [schedule(global_batch=128, epochs=4.0), fccs(fccs_hold="0", fccs_tail="0")])
@pytest.mark.parametrize("every, first", [
    ("1epochs", "50%"), ("1epochs", "0"), ("0.3epochs", "1.5epochs"), ("7steps", "0"), ("10epochs", "50%"),
    ("30steps", "10steps"), ("1epochs", "100%")])
def test_due_from_a_time_on(s, every, first):
    """Once at that time, once an interval from then on, and never twice in a row."""
    begun, found = False, []
    for progress, plan in steps_of(s):
        after = progress.after(plan)
        if s.due(after, every, first, begun):
            begun = True
            found.append(after)
    if first != "0" and first != "100%":
        starts = {"50%": s.examples / 2, "1.5epochs": 1.5 * s.num_records, "10steps": 10 * s.batch}[first]
        assert found[0].examples - found[0].last_batch < starts <= found[0].examples
    if "steps" not in every or s.kind != "fccs":
        assert s.times_due(every, first) - len(found) in (0, 1)  # the last one may fall on the end
    assert all(b.step - a.step > 1 for a, b in zip(found, found[1:], strict=False))
    for after in found[1:]:  # resumed anywhere, the later ones are the same
        assert s.due(after, every, first, True)


def test_due_before_its_first_time_where_it_has_begun():
    s = schedule(global_batch=128, epochs=4.0)
    positions = [p.after(now) for p, now in steps_of(s)]
    assert [p.step for p in positions if s.due(p, "1epochs", "50%", True)] == [8, 16, 24]
    assert [p.step for p in positions if s.due(p, "1epochs", "60%", True)] == [8, 16, 19, 27]


@pytest.mark.parametrize("flags, text", [
    ({"global_batch": 1}, "less than the 2 ranks"),
    ({"warmup": "10epochs"}, "shorter warm-up"),
    ({"global_batch": 2000}, "--global-batch 2000 is more than the 1000 training examples"),
    ({"schedule": "fccs", "max_batch": 1280}, "--max-batch 1280 is more than the 1000 training examples"),
    ({"schedule": "fccs", "max_batch": 300}, "--max-batch 300 is not a multiple of --global-batch 128: take 256"),
    ({"schedule": "fccs", "fccs_hold": "50%", "fccs_tail": "60%"},
     r"--fccs-hold 50% \(39\) .* --fccs-tail 60% \(47\) are 90 accumulation steps .* has 78"),
    ({"schedule": "fccs", "max_batch": 256, "fccs_growth": "100steps"},
     r"--fccs-growth 100steps \(100\).* but the run has 78"),
    ({"schedule": "fccs", "max_batch": 256, "fccs_hold": "60%", "fccs_tail": "35%"}, "leave the batch no time to grow"),
    ({"epochs": 1e300}, r"--epochs 1e.300 are .* take at most 1e.08"),
    ({"schedule": "fccs", "max_batch": 256, "steps": 10**8}, "--steps 100000000 are up to 2e.08"),
    ({"schedule": "fccs", "max_batch": 256, "batch_growth": "auto", "micro_batches": 2, "steps": 50},
     "cannot be kept to"),
    ({"exchange": "dgc", "density_warmup": "10"}, "would not reach --density 0.01"),
])
def test_what_does_not_fit_the_data(flags, text):
    with pytest.raises(ValueError, match=text) as error:
        schedule(**flags)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("arguments, text", [
    (["--warmup", "soon"], "--warmup 'soon' is not allowed: give a number and its unit"),
    (["--max-batch", "256"], "--max-batch 256 is a part of --schedule fccs"),
    (["--schedule", "fccs", "--batch-growth", "auto"], "--batch-growth auto needs a --max-batch above"),
    (["--schedule", "fccs", "--batch-growth", "auto", "--max-batch", "512", "--fccs-growth", "5%"],
     "--fccs-growth 5% has no meaning"),
    (["--schedule", "fccs", "--batch-growth", "auto", "--max-batch", "512"], "batches of two sizes"),
    (["--graph-every", "0"], "a time above 0"),
    (["--schedule", "fccs", "--fccs-growth", "5%"], "--fccs-growth 5% needs a --max-batch above"),
])
def test_flags_that_cannot_be_meant(arguments, text):
    with pytest.raises(UserError) as error:
        parse(["--data", "d", "--out", "o", *arguments])
    assert text in str(error.value)


def test_a_position_of_another_schedule_is_refused():
    s = schedule(global_batch=100)
    assert s.resume(Progress(3, 300, 100)) == Progress(3, 300, 100)
    with pytest.raises(ValueError, match="ends after 100 .10000.: give more"):
        s.resume(Progress(101, 10_100, 100))
    with pytest.raises(ValueError, match="same --global-batch"):
        s.resume(Progress(3, 384, 128))
    grown = fccs()
    middle = after(grown, 100)
    assert grown.resume(middle) == middle
    with pytest.raises(ValueError, match="same schedule of the batch"):
        fccs(fccs_hold="30%").resume(middle)


def test_density_falls_by_quarters_during_its_warmup():
    def densities(one):
        return [now.density for _, now in steps_of(one)]

    falling = schedule(density=0.001, density_warmup="5epochs", global_batch=10, epochs=6.0)
    assert densities(falling) == [0.25] * 100 + [0.25**2] * 100 + [0.25**3] * 100 + [0.25**4] * 100 + [0.001] * 200
    assert set(densities(schedule(density=0.001, density_warmup="0"))) == {0.001}
    assert {densities(schedule(density=d, density_warmup="1epochs"))[0] for d in (0.25, 0.5, 1.0)} == {0.25, 0.5, 1.0}
    odd = schedule(density=0.1, density_warmup="7steps", global_batch=10, epochs=1.0)
    assert densities(odd)[:8] == [0.25] * 4 + [0.1] * 4


@pytest.mark.parametrize("flags", [{}, {"batch_growth": "auto", "micro_batches": 2}])
def test_a_picture_of_it(flags, tmp_path, capsys):
    draw(fccs(**flags), tmp_path / "s.png", World())
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "40,000 examples" in capsys.readouterr().out
    with pytest.raises(UserError, match="nowhere"):
        draw(fccs(), tmp_path / "nowhere" / "s.png", World())
    with pytest.raises(ValueError, match="end in .png"):
        draw(fccs(), tmp_path, World())
