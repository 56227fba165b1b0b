"""Flags: one clear line for what is wrong, files of arguments, and a round trip through the run folder."""

import dataclasses

import pytest

from xc.config import Config, UserError, as_arguments, parse
from xc.schedule import Schedule

BASE = ["--data", "d", "--out", "o"]


def test_defaults_and_types():
    assert parse(BASE) == Config(data="d", out="o")
    assert parse([*BASE, "--lr-drops", "0.3", "0.6", "--steps", "7"]) == Config("d", "o", lr_drops=(0.3, 0.6), steps=7)


def test_argument_files_and_round_trip(tmp_path):
    cfg = Config(data="d", out="a b", lr=0.125, lr_drops=(0.25, 0.5), margin="arcface", margin_size=0.5)
    (tmp_path / "run.args").write_text(as_arguments(cfg) + "# a comment\n\n")
    assert parse([f"@{tmp_path / 'run.args'}"]) == cfg
    assert parse([f"@{tmp_path / 'run.args'}", "--lr", "1"]) == dataclasses.replace(cfg, lr=1.0)


@pytest.mark.parametrize("arguments, text", [
    ([], "--data"), (["--data", "d"], "--out"),
    ([*BASE, "--sede", "1"], "unknown argument --sede; did you mean --seed?"),
    ([*BASE, "--see", "1"], "unknown argument --see"),
    ([*BASE, "--lr", "fast"], "invalid float value: 'fast'"), ([*BASE, "--lr", "0"], "--lr 0.0"),
    ([*BASE, "--lr", "nan"], "--lr nan"), ([*BASE, "--epochs", "inf"], "--epochs inf"),
    ([*BASE, "--margin", "round"], "invalid choice: 'round'"),
    ([*BASE, "--margin-size", "0.3"], "no margin to size"),
    ([*BASE, "--logits", "inner", "--margin", "cosface"], "needs cosine"),
    ([*BASE, "--global-batch", "0"], "--global-batch 0"),
    ([*BASE, "--lr-drops", "1.5"], "--lr-drops"), (["@nowhere.args"], "nowhere.args"),
])
def test_a_mistake_is_one_line(arguments, text):
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert text in str(error.value) and "\n" not in str(error.value)


def schedule(**settings):
    return Schedule.of(Config("d", "o", **settings), num_records=1000, num_ranks=2)


def test_steps_follow_from_epochs():
    assert schedule(global_batch=100, epochs=2.0).steps == 20
    assert schedule(global_batch=128, epochs=2.0).steps == 16
    assert schedule(global_batch=100, epochs=2.0, steps=7).steps == 7


def test_warmup_then_cosine_to_zero():
    s = schedule(global_batch=100, epochs=10.0, warmup_epochs=1.0, lr=2.0)
    rates = [s.at(step).lr for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(1.0) and rates[-1] < 0.01
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))


def test_step_decay_and_constant():
    s = schedule(global_batch=100, epochs=10.0, warmup_epochs=0.0, lr=2.0, schedule="step", lr_drops=(0.5, 0.75))
    assert [s.at(step).lr for step in (0, 49, 50, 74, 75, 99)] == pytest.approx([2, 2, 0.2, 0.2, 0.02, 0.02])
    s = schedule(global_batch=100, warmup_epochs=0.0, lr=2.0, schedule="constant")
    assert {s.at(step).lr for step in range(s.steps)} == {2.0}


def test_due_once_an_interval():
    s = schedule(global_batch=128, epochs=4.0)  # 7.8 steps an epoch
    assert [step for step in range(1, s.steps + 1) if s.due(step, 1.0)] == [8, 16, 24]
    assert [step for step in range(1, s.steps + 1) if s.due(step, 0.0)] == []


@pytest.mark.parametrize("settings, text", [({"global_batch": 1}, "less than the 2 ranks"),
                                            ({"warmup_epochs": 10.0}, "shorter warm-up")])
def test_what_does_not_fit_the_data(settings, text):
    with pytest.raises(ValueError, match=text):
        schedule(**settings)


def test_a_position_of_another_schedule_is_refused():
    s = schedule(global_batch=100)
    assert s.resume({"step": 3, "examples": 300}) == 3
    with pytest.raises(ValueError, match="ends after 100: give more"):
        s.resume({"step": 101, "examples": 10100})
    with pytest.raises(ValueError, match="same --global-batch"):
        s.resume({"step": 3, "examples": 384})


def test_density_falls_by_quarters_during_its_warmup():
    falling = schedule(density=0.001, density_warmup_epochs=5.0, global_batch=10, epochs=6.0)
    found = [falling.at(step).density for step in range(600)]
    assert found == [0.25] * 100 + [0.25**2] * 100 + [0.25**3] * 100 + [0.25**4] * 100 + [0.001] * 200
    assert {schedule(density=0.001, density_warmup_epochs=0.0).at(step).density for step in range(10)} == {0.001}
    assert {schedule(density=d, density_warmup_epochs=1.0).at(0).density for d in (0.25, 0.5, 1.0)} == {0.25, 0.5, 1.0}
    odd = schedule(density=0.1, density_warmup_epochs=0.07, global_batch=10, epochs=1.0)  # seven steps of warm-up
    assert [odd.at(step).density for step in range(8)] == [0.25] * 4 + [0.1] * 4
