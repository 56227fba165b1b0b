"""A trace holds what was recorded; the tool that shows it adds it up."""

import json

import pytest

import data_tools.show
from data_tools.reports import trace as tool
from tests.support.worlds import run_ranks
from xc.run.metrics import Timer
from xc.run.trace import Trace


def record(world, out, num_steps, steps):
    timer = Timer()
    trace = Trace(num_steps, steps.start, steps.stop, out, world, timer)
    for step in steps:
        trace.at(step)
        wait = world.traffic.begin("net", 1, lambda: True, lambda: None)
        with timer("forward"):
            wait()
        with timer("wait"):
            pass
    trace.at(steps.stop)


@pytest.mark.parametrize("steps, recorded", [
    (range(0, 40), [10, 11, 12]), (range(5, 12), [9, 10, 11]), (range(3, 5), [3, 4])])
def test_it_records_some_steps_of_all_ranks(steps, recorded, tmp_path):
    run_ranks(3, lambda w: record(w, tmp_path, 3, steps))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    for rank in range(3):
        own = [e for e in events if e["pid"] == rank and e["ph"] == "X"]
        assert [e["name"] for e in own if e["cat"] == "step"] == [f"step {n}" for n in recorded]
        for lane, name in ("compute", "forward"), ("compute", "wait"), ("network", "net"):
            assert sum(e["cat"] == lane and e["name"] == name for e in own) == len(recorded)
        for tid in {e["tid"] for e in own}:  # nothing overlaps inside a lane
            ends = sorted((e["ts"], e["ts"] + e["dur"]) for e in own if e["tid"] == tid)
            assert all(a[1] <= b[0] + 1e-3 for a, b in zip(ends, ends[1:], strict=False))


def test_a_transfer_that_began_before_the_recording_is_cut(tmp_path):
    def body(world):
        trace = Trace(2, 0, 2, tmp_path, world, Timer())
        wait = world.traffic.begin("early", 1, lambda: True, lambda: None)
        trace.at(0)
        wait()
        trace.at(1)
        trace.at(2)

    run_ranks(2, body)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["ts"] for e in events if e["name"] == "early"] == [0, 0]


def test_none_is_written_unless_asked_for(tmp_path):
    run_ranks(2, lambda w: record(w, tmp_path, 0, range(30)))
    assert not list(tmp_path.iterdir())


SPANS = [("step", "step 7", 0, 100), ("compute", "forward", 0, 40), ("compute", "backward", 40, 80),
         ("compute", "exchange", 80, 100), ("network", "a", 30, 60), ("network", "b", 50, 90)]


@pytest.fixture
def trace_json(tmp_path):
    from xc.run.trace import _events

    events = list(_events(0, [(lane, name, begin / 1e3, end / 1e3) for lane, name, begin, end in SPANS]))
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    return tmp_path / "trace.json"


def test_a_step_is_added_up(trace_json, capsys):
    data_tools.show.main([str(trace_json), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["step"] == "step 7" and facts["rank 0"]["phases_ms"]["backward"] == pytest.approx(40)
    assert facts["rank 0"]["network_ms"] == pytest.approx(60)  # 30 to 90, once
    assert facts["rank 0"]["behind_ms"] == pytest.approx(50)  # not behind the exchange
    data_tools.show.main([str(trace_json)])
    assert "transfers in flight 60.0 ms, 50.0 of them during computation" in capsys.readouterr().out


X = '{"ph": "X", "pid": %s, "cat": %s, "tid": 1, "name": %s, "ts": 1, "dur": %s}'


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"traceEvents": [{"ph": "X"}]}', '{"traceEvents": []}', "[" * 100_000,
    '{"traceEvents": [' + X % ("[]", "1", "1", "1") + "]}", '{"traceEvents": [' + X % ("1", "{}", "[]", "1") + "]}",
    '{"traceEvents": [' + X % ("0", "1", "1", '"a"') + "]}"])
def test_what_is_no_trace_is_one_line(text, tmp_path, capsys):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        data_tools.show.main([str(tmp_path / "trace.json")])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("flags", [["--plot", "x.xyz"], ["--plot", "x"], ["--sheet", "s.png"], ["--verify"]])
def test_flags_that_do_not_fit_are_one_line(flags, trace_json, capsys):
    with pytest.raises(SystemExit) as end:
        data_tools.show.main([str(trace_json), *flags])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_spans_are_joined():
    assert tool._union([(5, 6), (0, 2), (1, 3)]) == [[0, 3], [5, 6]]
