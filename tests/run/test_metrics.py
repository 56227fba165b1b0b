"""Lines of a run: none is lost, and none of a launch that failed is counted twice."""

import json

import pytest

from xc.optim.schedule import Progress
from xc.run.log import named
from xc.run.metrics import Metrics, Timer


def at(step):
    return Progress(step, 10 * step, 10)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_later_launch_drops_what_it_does_again(tmp_path, capsys):
    metrics = Metrics(tmp_path, 0, Progress(), 9, 90)
    for step in range(1, 5):
        metrics.log(at(step), loss=step / 3)
    metrics.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    metrics = Metrics(tmp_path, 0, at(2), 9, 90)
    metrics.log(at(3), loss=7.0)
    metrics.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        (1, pytest.approx(1 / 3)), (2, pytest.approx(2 / 3)), (3, 7.0)]
    assert "step 3/9  loss 7" in capsys.readouterr().out


def test_a_line_of_scores(tmp_path, capsys):
    """Scores by frequency are an object in the line, and numbers of their own for TensorBoard; texts are not drawn."""
    metrics, drawn = Metrics(tmp_path, 0, Progress(), 9, 90), []
    metrics._board.add_scalar = lambda *value: drawn.append(value)
    metrics.log(at(3), split="val", val_top1=1 / 3, val_top1_by_frequency={"0": 0.0, "100+": 2 / 3}, missing=None)
    metrics.close()
    assert lines(tmp_path) == [{"step": 3, "split": "val", "val_top1": pytest.approx(1 / 3),
                                "val_top1_by_frequency": {"0": 0.0, "100+": pytest.approx(2 / 3)}}]
    assert drawn == [("val_top1", 1 / 3, 3), ("val_top1_by_frequency/0", 0.0, 3),
                     ("val_top1_by_frequency/100+", 2 / 3, 3)]
    assert "step 3/9  val_top1 0.3333\n" in capsys.readouterr().out


def test_a_line_that_an_earlier_launch_wrote_is_not_written_again(tmp_path):
    for value in 1 / 3, 1 / 3, 2 / 3:
        for rank in 0, 1:
            metrics = Metrics(tmp_path, rank, at(4), 9, 90)
            metrics.log_once(at(4), top1=value, bad_test_records=None)
            metrics.close()
    assert [line["top1"] for line in lines(tmp_path)] == [pytest.approx(1 / 3), pytest.approx(2 / 3)]


@pytest.mark.parametrize("split, names", [
    ("test", {"top1", "bad_test_records"}), ("val", {"val_top1", "bad_val_records"})])
def test_scores_of_val_are_not_taken_for_those_of_test(split, names):
    assert named({"split": split, "top1": 0.5, "bad_records": 2}).keys() == names


def test_other_ranks_write_nothing(tmp_path, capsys):
    metrics = Metrics(tmp_path, 1, Progress(), 9, 90)
    metrics.log(at(1), loss=1.0)
    metrics.close()
    assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


def test_timer_counts_phases_only(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0, 100.0, 102.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    timer = Timer()
    with timer("data"):
        pass
    with timer("head"):
        pass
    with timer("data"):
        pass
    assert timer.take(2, 12) == {"images_per_second": 2.0, "data_ms": 1500.0, "head_ms": 1500.0}
    assert timer.images_per_second == 2.0


def test_a_full_disk_does_not_end_the_run(tmp_path, capsys):
    metrics = Metrics(tmp_path, 0, Progress(), 10, 100)
    metrics._lines = open("/dev/full", "a", buffering=1)
    for step in 1, 2, 3:
        metrics.log(Progress(step, 10 * step, 10), loss=1.0)
    metrics.close()
    found = capsys.readouterr()
    assert found.err.count("warning: metrics of step 1 and later ones may be missing") == 1
    assert "step 3/10  loss 1" in found.out
