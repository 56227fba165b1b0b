"""What a run evaluates, by the splits that its data have; ranks are threads. tests/mpi/test_resume.py has a test at the
end that is interrupted."""

import json
import shutil

import pytest

from tests.support.launch import last_json, run
from tests.support.training import QUICK, SGD, call_main, files_of
from xc.checkpoint import layout
from xc.data.evaluated import how_to_split

# Every fifth of 15 steps is evaluated and saved, and at a constant rate step 5 is that of a run of 5 steps.
RUN = [*SGD, "--feature-dim", 16, "--global-batch", 30, "--lr", 0.05, "--warmup", "1steps", "--log-steps", 5,
       "--schedule", "constant", "--device", "cpu", "--save-every", "5steps", "--eval-every", "5steps",
       "--keep-checkpoints", 3]
VECTORS = "synth:classes=31,dim=16,noise=0.3"
BOTH = ["--data", f"{VECTORS},test=203,val=101", *RUN]


def ended(monkeypatch, capsys, ranks, *arguments):
    """(the last line as an object, standard output, standard error) of train.py on so many ranks."""
    assert call_main(monkeypatch, ranks, *arguments) == [None] * ranks
    out, error = capsys.readouterr()
    return json.loads(out.splitlines()[-1]), out, error


def evaluations(folder):
    """[(step, split)] of a run folder, in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"]) for line in lines if "split" in line]


def scores_in(result):
    return {name: value for name, value in result.items()
            if name.removeprefix("val_").startswith(("top", "examples", "classes"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, last line) of two runs on val and test, one of 5 steps and one of 15, by one process each."""
    folder = tmp_path_factory.mktemp("finished")
    last = {steps: last_json(run("python", "train.py", *BOTH, "--test", "last", "--steps", steps, "--out",
                                 folder / str(steps))) for steps in (5, 15)}
    assert last[5]["scored_step"] == 5 and last[15]["scored_step"] == 15
    assert scores_in(last[5]) != scores_in(last[15])
    return folder, last


@pytest.fixture
def best_at_5(finished, tmp_path):
    """A copy of the run of 15 steps whose best checkpoint is that of step 5, and the last lines of both runs."""
    shutil.copytree(finished[0] / "15", tmp_path / "run")
    layout.add_top1(tmp_path / "run" / "checkpoints" / "step-00000005", 0.999, "val: 101 examples, seed 0")
    return tmp_path / "run", finished[1]


@pytest.mark.parametrize("splits, during, at_end, note", [
    ("test=0", None, [], "warning: nothing is evaluated"),
    ("test=0,val=101", "val", [], "note: there is no test"),
    ("test=203", "test", [], "note: there is no val to choose the best weights by"),
    ("test=203,val=101", "val", [(15, "test")], None)])
def test_what_is_evaluated_is_what_there_is(splits, during, at_end, note, tmp_path, monkeypatch, capsys):
    result, out, error = ended(monkeypatch, capsys, 1, "--data", f"{VECTORS},{splits}", *RUN, "--steps", 15, "--out",
                               tmp_path / "run")
    assert evaluations(tmp_path / "run") == [(step, during) for step in (5, 10, 15) if during] + at_end
    texts = [line for line in (out + error).splitlines() if line.startswith(("warning: ", "note: "))]
    assert len(texts) == (note is not None) and all(text.startswith(note) for text in texts)
    has_test, has_val = "test=203" in splits, "val=" in splits
    assert (result["top1"] is not None) == (result["top5"] is not None) == has_test
    assert ("val_top1" in result, "examples" in result) == (has_val, has_test)
    assert result.get("val_examples") == (101 if has_val else None)
    metas = [layout.read_meta(folder) for folder in layout.folders(tmp_path / "run" / "checkpoints")]
    assert {(meta["evaluated_on"] and meta["evaluated_on"].partition(":")[0], meta["top1"] is not None)
            for meta in metas} == {(during, during is not None)}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_test_is_evaluated_with_the_weights_of_the_best_checkpoint(ranks, best_at_5, monkeypatch, capsys):
    folder, last = best_at_5
    before, lines = files_of(folder / "checkpoints"), evaluations(folder)
    result, _, error = ended(monkeypatch, capsys, ranks, *BOTH, "--steps", 15, "--out", folder, "--resume", "auto")
    assert result["scored_step"] == 5 and scores_in(result) == scores_in(last[5]) and not error
    assert files_of(folder / "checkpoints") == before
    assert evaluations(folder) == [*lines, (15, "test")]  # one line for each choice of weights
    tested = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert tested["scored_step"] == 5 and tested["top1"] == pytest.approx(result["top1"], abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_that_ended_says_the_same_again(ranks, finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished[0] / "15", tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    result, _, _ = ended(monkeypatch, capsys, ranks, *BOTH, "--steps", 15, "--test", "last", "--out", tmp_path / "run",
                         "--resume", "auto")
    assert scores_in(result) == scores_in(finished[1][15])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("name", ["backbone.safetensors", "meta.json"])
def test_a_best_checkpoint_that_is_damaged_is_named_and_the_last_weights_are_tested(
        name, best_at_5, monkeypatch, capsys):
    folder, last = best_at_5
    path = folder / "checkpoints" / "step-00000005" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result, _, error = ended(monkeypatch, capsys, 2, *BOTH, "--steps", 15, "--out", folder, "--resume", "auto")
    assert result["scored_step"] == 15 and scores_in(result) == scores_in(last[15])
    (line,) = error.splitlines()
    assert line.startswith("warning: test is evaluated with the last weights: ") and "step-00000005" in line


def test_the_best_weights_are_not_those_to_resume_from(best_at_5, tmp_path, monkeypatch, capsys):
    """A run that tested with the best weights trains on from its last ones."""
    folder, _ = best_at_5
    ended(monkeypatch, capsys, 1, *BOTH, "--steps", 15, "--out", folder, "--resume", "auto")
    shutil.copytree(folder, tmp_path / "copy")  # this process has locked the other one
    for out, more in (tmp_path / "copy", ["--resume", "auto"]), (tmp_path / "whole", []):
        ended(monkeypatch, capsys, 1, *BOTH, "--steps", 20, "--test", "last", "--out", out, *more)
    files = [files_of(out / "checkpoints" / "step-00000020") for out in (tmp_path / "copy", tmp_path / "whole")]
    assert list(files[0].values()) == list(files[1].values()) and len(files[0]) == 4


def test_images_are_evaluated_on_val_where_there_is_no_test(tiny_packs, tmp_path, monkeypatch, capsys):
    """The layout of ImageNet."""
    shutil.copytree(tiny_packs, tmp_path / "packs")
    (tmp_path / "packs" / "test").rename(tmp_path / "packs" / "val")
    result, _, _ = ended(monkeypatch, capsys, 1, "--data", tmp_path / "packs", "--out", tmp_path / "run", "--steps", 3,
                         *QUICK)
    assert result["top1"] is None and 0 <= result["val_top1"] <= 1 and result["val_examples"] == 30
    assert result["val_examples_by_frequency"] == {"10-99": 30} and evaluations(tmp_path / "run") == [(3, "val")]
    (checkpoint,) = layout.folders(tmp_path / "run" / "checkpoints")
    found = layout.read_meta(checkpoint)["evaluated_on"]
    assert found.startswith("val: 30 examples") and layout.top1_of(checkpoint, found) == result["val_top1"]
    assert layout.top1_of(checkpoint, found.replace("val", "test")) is None


def test_classes_without_images_in_train_are_counted_and_named(tiny_packs, tmp_path, monkeypatch, capsys):
    """Three of ten classes are in val alone."""
    run("python", "-m", "data_tools.split", tiny_packs / "train", tmp_path / "packs", "--val", 0.3, "--by", "class")
    result, _, _ = ended(monkeypatch, capsys, 1, "--data", tmp_path / "packs", "--out", tmp_path / "run", "--steps", 3,
                         *QUICK)
    assert result["val_examples_by_frequency"] == {"0": 36} and result["val_classes"] == 3
    assert result["val_top1_by_frequency"] == {"0": result["val_top1"]}


def test_weights_that_are_not_finite_before_the_loss_is_take_the_run_back(tmp_path, monkeypatch):
    """The features grow beyond all numbers, and their cosines do not."""
    (error,) = call_main(monkeypatch, 1, "--data", f"{VECTORS},test=0", *RUN, "--steps", 40, "--weight-decay", 1000,
                         "--momentum", 0, "--save-every", "3steps", "--max-rollbacks", 2, "--out", tmp_path / "run")
    assert "is not finite after step" in str(error) and "the run went back 2 times" in str(error) and error.code == 2
    assert len(json.loads((tmp_path / "run" / "rollbacks.json").read_text())) == 2


@pytest.mark.parametrize("layout_of, pack", [(["index.h5"], "a b"), (["train/index.h5"], "a b/train")])
def test_the_command_that_makes_splits_names_the_pack(layout_of, pack, tmp_path):
    for name in layout_of:
        (tmp_path / "a b" / name).parent.mkdir(parents=True)
        (tmp_path / "a b" / name).touch()
    text = how_to_split(f"{tmp_path}/a b/")
    assert f"python -m data_tools.split '{tmp_path}/{pack}' '{tmp_path}/a b-split' --test 0.01 --val 0.01" in text


def test_that_command_makes_them(tiny_packs, tmp_path):
    shutil.copytree(tiny_packs / "train", tmp_path / "packs" / "train")
    command = how_to_split(str(tmp_path / "packs")).partition("python ")[2].replace("0.01", "0.2").split()
    run("python", *command)
    assert {path.name for path in (tmp_path / "packs-split").iterdir()} == {"train", "val", "test"}


def test_scores_on_other_data_say_nothing_about_a_checkpoint(tmp_path, monkeypatch, capsys):
    """One example of val is easy; a val of 101 that comes later is not compared with it."""
    flags = ["--feature-dim", 8, "--global-batch", 20, "--warmup", 0, "--out", tmp_path / "run"]
    data = "synth:classes=20,dim=8,examples=5,test=50"
    run("python", "train.py", "--data", f"{data},val=1", *flags, "--epochs", 2)
    again, _, _ = ended(monkeypatch, capsys, 1, "--data", f"{data},val=101", *flags, "--epochs", 3, "--resume", "auto")
    assert again["scored_step"] in (10, 15) and again["val_examples"] == 101  # 10 was evaluated anew
    metas = [layout.read_meta(folder) for folder in layout.folders(tmp_path / "run" / "checkpoints")]
    assert {meta["evaluated_on"] for meta in metas if meta["step"] >= 10} == {"val: 101 examples, seed 0"}


def test_a_run_that_goes_back_leaves_its_later_checkpoints(tmp_path, monkeypatch, capsys):
    """Else the best one, or the newest one of the next launch, would be of the run that was left."""
    flags = ["--data", "synth:classes=20,dim=8,examples=5,test=50,val=50", "--feature-dim", 8, "--global-batch", 20,
             "--warmup", 0, "--out", tmp_path / "run", "--keep-checkpoints", 9, "--epochs", 4]
    run("python", "train.py", *flags)
    places = tmp_path / "run" / "checkpoints"
    back, _, error = ended(monkeypatch, capsys, 1, *flags, "--resume", places / "step-00000005", "--lr", 1e-9,
                           "--save-every", 0)
    assert {path.name for path in places.iterdir() if path.name.startswith("abandoned")} == {
        f"abandoned-step-{step:08}" for step in (10, 15, 20)}
    assert back["scored_step"] in (5, 20) and "abandoned-step-" in error
