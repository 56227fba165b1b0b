"""Run folders are read as they are: resumed, rolled back, cut short, of other versions."""

import json
import math

import pytest

from xc.config import Config
from xc.errors import UserError
from xc.reporting.runs import differing_settings, number, read_runs


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def add(folder, *lines):
    with open(folder / "metrics.jsonl", "a") as file:
        file.write("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))


def test_a_run_has_the_numbers_of_its_files(finished):
    [run] = read_runs([finished])
    lines = lines_of(finished)
    training, vals = [line for line in lines if "loss" in line], [line for line in lines if line.get("split") == "val"]
    assert run.steps == [line["step"] for line in training] and run.losses == [line["loss"] for line in training]
    assert [(one.step, one.top1, one.top5) for one in run.of_split("val")] == [
        (line["step"], line["val_top1"], line["val_top5"]) for line in vals]
    [test] = run.of_split("test")
    assert test.scored_step == lines[-1]["scored_step"] and test.top1_by_frequency == lines[-1]["top1_by_frequency"]
    # The timer of the run added up the same phases.
    assert run.seconds[-1] == pytest.approx(vals[-1]["train_seconds"], rel=1e-5)
    assert sum(run.phase_seconds.values()) == pytest.approx(run.seconds[-1])
    assert {"data", "forward", "head", "backward", "exchange", "update"} <= set(run.phase_seconds)
    assert run.split == "val" and run.planned == run.checkpoint["examples"] == 26 * 12
    assert (run.unreadable, run.rewound, run.rollbacks, run.fault) == (0, 0, 0, "")


def test_lines_that_are_none_are_counted(copy):
    folder = copy("cut")
    add(folder, "{half a li", "[1]", {"loss": 3}, {"step": True, "loss": 3}, {"step": -1}, "[" * 100_000)
    [run] = read_runs([folder])
    assert run.unreadable == 6 and len(run.steps) == 26


def test_lines_that_a_later_line_goes_back_behind_are_left_out(copy):
    folder = copy("rewound")
    before = lines_of(folder)
    add(folder, {"step": 20, "loss": 0.5, "forward_ms": 2.0}, {"step": 21, "split": "val", "val_top1": 0.25})
    [run] = read_runs([folder])
    assert run.rewound == sum(line["step"] > 20 for line in before) > 0
    assert run.steps[-2:] == [20, 20] and run.of_split("val")[-1].top1 == 0.25
    assert math.isnan(run.of_split("val")[-1].top5) and run.seconds[-1] == run.seconds[-2]


def test_numbers_of_any_kind_are_read(copy):
    folder = copy("odd")
    (folder / "metrics.jsonl").write_text("")
    add(folder, {"step": 1, "loss": "many", "x_ms": "no", "y_ms": 4, "waited_ms": 9, "z_ms": None},
        '{"step": 3, "loss": NaN, "y_ms": 6, "images_per_second": true}', {"step": 4, "top1": 0.5, "top5": 0.75},
        {"step": 4, "split": "other", "top1": 1}, {"step": 4, "split": "test", "top1_by_frequency": [1]})
    [run] = read_runs([folder])
    assert [math.isnan(loss) for loss in run.losses] == [True, True]
    assert run.phase_seconds == {"y": pytest.approx(0.004 + 0.012)}
    assert [one.top1 for one in run.of_split("test")][0] == 0.5  # a line of older code: it had test alone
    assert len(run.evaluations) == 2
    assert all(math.isnan(number(value)) for value in (10**400, 1e300, -math.inf, True, "1", None))
    assert number(-3e38) == -3e38


def test_retrieval_has_scores_of_other_names(copy):
    folder, scores = copy("retrieval"), {"recall_at_1": 0.5, "recall_at_10": 0.75, "map": 0.25, "queries": 7}
    add(folder, {"step": 40, "split": "val"} | {f"val_{name}": value for name, value in scores.items()},
        {"step": 40, "split": "test", "scored_step": 26} | scores | {"recall_at_1": "high"})
    [run] = read_runs([folder])
    assert run.of_split("val")[-1].retrieval == scores and run.of_split("val")[0].retrieval == {}
    del scores["recall_at_1"]
    assert run.of_split("test")[-1].retrieval == scores and math.isnan(run.of_split("test")[-1].top1)


def test_a_run_without_files_beside_its_settings_is_a_run(tmp_path):
    (tmp_path / "config.json").write_text('{"epochs": 3}')
    [run] = read_runs([tmp_path])
    assert (run.steps, run.evaluations, run.launches, run.checkpoint, run.fault) == ([], [], [], None, "")


def test_a_damaged_checkpoint_is_named(copy):
    folder = copy("damaged")
    meta = sorted((folder / "checkpoints").iterdir())[-1] / "meta.json"
    meta.write_text(meta.read_text().replace('"step"', '"stop"'))
    [run] = read_runs([folder])
    assert run.checkpoint is None and "checksum does not match" in run.fault


def test_settings_that_differ(tmp_path):
    for name, settings in ("a", {"epochs": 3.0, "lr": 0.1, "gone": 1, "out": "x"}), ("b", {"epochs": 3.0, "lr": 0.2}):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    rows = differing_settings(read_runs([tmp_path / "a", tmp_path / "b"]))
    assert rows == [("epochs", Config.epochs, [3.0, 3.0], False), ("lr", Config.lr, [0.1, 0.2], True),
                    ("gone", None, [1, None], True)]


def test_names_are_short_where_they_can_be(tmp_path):
    for name in "x/run", "y/run", "y/other":
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    paths = [tmp_path / name for name in ("x/run", "y/run", "y/other")]
    assert [run.name for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "other"]
    with pytest.raises(UserError, match="is given twice: give each run once"):
        read_runs([paths[0], tmp_path / "y" / ".." / "x" / "run"])
