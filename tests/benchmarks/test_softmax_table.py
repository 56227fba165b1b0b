"""The table of heads: curves over seconds of training, their picture, and runs that are cut."""

import json
import sys

import pytest

from benchmarks import softmax_table
from tests.support.launch import last_json, run

DATA = "synth:classes=60,dim=8,test=60"


def write_run(runs, head, seed, curve, finished=True):
    """A run folder whose evaluations are (seconds, top-1), one every ten steps, and its log."""
    folder = runs / f"{head.replace(':', '-')}-seed{seed}"
    folder.mkdir(parents=True)
    lines = []
    for i, (seconds, top1) in enumerate(curve, start=1):
        lines.append({"step": 10 * i, "split": "test", "top1": top1, "active": 20, "train_seconds": seconds})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    softmax_table.log_of(folder).write_text('{"top1": 0.5}' if finished else "stopped by a signal after 25 steps")
    return folder


def table_of(monkeypatch, capsys, runs, heads, *flags):
    """(lines that main prints, its last one as an object)."""
    arguments = ["--data", DATA, "--runs", runs, "--heads", *heads, *flags]
    monkeypatch.setattr(sys, "argv", ["softmax_table.py", *map(str, arguments)])
    softmax_table.main()
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last)


def test_curves_are_means_over_the_seeds(monkeypatch, capsys, tmp_path):
    write_run(tmp_path, "full", 0, [(2, 0.2), (4, 0.4), (8, 0.8)])
    write_run(tmp_path, "full", 1, [(4, 0.4), (8, 0.6), (16, 0.8)])
    for seed in 0, 1:
        write_run(tmp_path, "knn:0.5", seed, [(1, 0.4), (2, 0.5), (4, 0.7)])
    plot = tmp_path / "curves.png"
    lines, found = table_of(monkeypatch, capsys, tmp_path, ["full", "knn:0.5"], "--seeds", 0, 1, "--plot", plot)
    full, knn = found["top1.full"], found["top1.knn.0.5"]
    assert full["curve"] == [[3, 0.3], [6, 0.5], [12, 0.8]] and knn["curve"] == [[1, 0.4], [2, 0.5], [4, 0.7]]
    assert not full["cut"] and not knn["cut"] and "cut" not in "".join(lines)
    # KNN has ended after 4 seconds, and keeps its 0.7; full is at 0.5 after 6 seconds.
    assert found["times"] == [1, 2, 3, 4, 6, 12]
    assert knn["best_at"] == [1, 2, 3, 4, 6] and full["best_at"] == [12]
    assert lines[-2].split() == ["full", "-", "-", "0.3000", "0.3667", "0.5000", "0.8000*"]
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("ends", [(1, 1.5), (1, 1000)], ids=["linear", "logarithmic"])
def test_the_picture_names_its_lines(ends, monkeypatch, capsys, tmp_path):
    write_run(tmp_path, "full", 0, [(0, 0.1), (ends[1], 0.8)])  # an evaluation at 0 has no place on such an axis
    write_run(tmp_path, "sampled:0.5:near_share=1", 0, [(ends[0], 0.7)], finished=False)
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append(figure))
    table_of(monkeypatch, capsys, tmp_path, ["full", "sampled:0.5:near_share=1"], "--seeds", 0, "--minutes", 0,
             "--plot", tmp_path / "curves.svg")
    (figure,), (legend,) = drawn, drawn[0].legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "full: 80.0 %, 20 active", "sampled:0.5:near_share=1: 70.0 %, 20 active, cut"]
    (axes,) = figure.axes
    assert axes.get_title() == f"{DATA}: 60 classes, seeds 0" and "seconds" in axes.get_xlabel()
    assert axes.get_xscale() == ("log" if ends[1] == 1000 else "linear")


def test_a_run_is_cut_until_its_log_says_that_it_finished(monkeypatch, capsys, tmp_path):
    """A cut run that had its minutes is left as it is; one that did not, and one without a limit, is trained."""
    folder = write_run(tmp_path, "full", 0, [(30, 0.3), (60, 0.5)], finished=False)
    lines, found = table_of(monkeypatch, capsys, tmp_path, ["full"], "--seeds", 0, "--minutes", 1)
    assert found["top1.full"]["cut"] and found["top1.full"]["mean"] == 0.5
    assert [line.endswith("cut") for line in lines if line.startswith("full")] == [True, True]

    def popen(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(softmax_table.subprocess, "Popen", popen)
    for flags in ("--minutes", 1.1), ():
        with pytest.raises(InterruptedError):
            table_of(monkeypatch, capsys, tmp_path, ["full"], "--seeds", 0, *flags)
    softmax_table.log_of(folder).write_text('{"top1": 0.5}')
    _, found = table_of(monkeypatch, capsys, tmp_path, ["full"], "--seeds", 0)
    assert not found["top1.full"]["cut"]


def test_seconds_are_those_of_all_launches(tmp_path):
    """train_seconds begins anew with a launch: here the second one, after step 25."""
    folder = write_run(tmp_path, "full", 0, [], finished=False)
    lines = [{"step": 20, "loss": 1, "head_ms": 90, "data_ms": 10, "waited_ms": 50},
             {"step": 20, "top1": 0.2, "train_seconds": 2.0},
             {"step": 30, "loss": 1, "head_ms": 200, "data_ms": 0, "waited_ms": 50},
             {"step": 30, "top1": 0.3, "train_seconds": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 31, "lo')
    assert softmax_table.read(folder)["curve"] == [(2, 0.2), (3, 0.3)]


def test_flags_of_a_head():
    of = softmax_table.flags_of
    assert of("full", 1000, 64) == ["--head", "full"]
    assert of("knn:0.01", 1000, 64) == ["--head", "knn", "--active-classes", 64]
    assert of("knn:5000", 1000, 64) == ["--head", "knn", "--active-classes", 1000]
    assert of("sampled:0.1:no-sampling-correction,feature_dim=8", 1000, 64) == [
        "--head", "sampled", "--active-classes", 100, "--no-sampling-correction", "--feature-dim", "8"]


def test_a_run_that_takes_too_long_stops_itself(tmp_path):
    """After its first evaluation, long before its steps are done."""
    head, plot = "sampled:0.5:no-sampling-correction", tmp_path / "curve.png"
    done = run(sys.executable, "benchmarks/softmax_table.py", "--data", DATA, "--runs", tmp_path, "--heads", head,
               "--seeds", 0, "--minutes", 1e-6, "--plot", plot, "--", "--feature-dim", 8, "--global-batch", 10,
               "--epochs", 10**5, "--eval-every", "20steps", "--log-steps", 5, "--device", "cpu")
    row = last_json(done)["top1.sampled.0.5:no-sampling-correction"]
    assert row["cut"] and row["mean"] == row["curve"][-1][1] and row["train_seconds"] < 600
    assert plot.stat().st_size
    (log,) = tmp_path.glob("*.log")
    assert "stopped by a signal after" in log.read_text() and not softmax_table.finished(log.with_suffix(""))
