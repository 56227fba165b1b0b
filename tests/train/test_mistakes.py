"""Mistakes of a user, found by train.py before it writes anything: one line, the same on all ranks, which are threads
here. tests/mpi/test_failures.py has such a line of real ranks, and the exit code."""

import json
import shutil
import sys

import h5py
import numpy as np
import pytest

from tests.support.launch import error_lines, last_json, losses, run
from tests.support.training import QUICK, SYNTH, call_main, files_of, refusal
from xc.data.pack import open_splits
from xc.data.pack_split import PackSplit


def train(*arguments, **options):
    return run(sys.executable, "train.py", *arguments, *QUICK, **options)


@pytest.fixture(scope="module")
def finished(tiny_packs, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train("--data", tiny_packs, "--out", out, "--steps", 2)
    return out


# --- flags ---


@pytest.mark.parametrize("arguments, text", [
    (["--data", "nowhere"], "nowhere"),
    (["--global-batch", 3], "--global-batch 3 is less than the 4 ranks"),
    (["--global-batch", 12, "--micro-batches", 5], "--micro-batches 5 does not divide --global-batch 12"),
    (["--global-batch", 12, "--micro-batches", 4], "--micro-batches 4 is more than the 3 examples of a rank"),
    (["--exchange", "dgc", "--density", 0], "--density 0.0 is not allowed: give a number above 0, at most 1"),
    (["--exchange", "dgc", "--density", 1.5], "--density 1.5 is not allowed"),
    (["--optimizer", "sgd", "--lr", 0.1, "--exchange", "dgc", "--global-batch", 12, "--epochs", 4],
     "--density-warmup 4epochs is"),
    (["--global-batch", 12, "--schedule", "fccs", "--fccs-hold", "200steps"], "shorten one, or take a longer run"),
    (["--global-batch", 12, "--schedule", "fccs", "--max-batch", 132], "more than the 120 training examples"),
    (["--global-batch", 12, "--schedule", "fccs", "--max-batch", 24, "--batch-growth", "auto"],
     "give --micro-batches 2"),
    (["--bakbone", "small"], "did you mean --backbone?"),
    (["@missing.args"], "missing.args"),
    (["--global-batch", 12, "--schedule-plot", "/nowhere/s.png"], "No such file"),
])
def test_flags_and_data_do_not_fit(arguments, text, tiny_packs, tmp_path, monkeypatch):
    assert text in refusal(monkeypatch, 4, "--data", tiny_packs, "--out", tmp_path / "run", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, text", [
    (["--head", "knn", "--active-classes", 1.5], "--active-classes 1.5"),
    (["--head", "knn", "--active-classes", 0], "--active-classes 0.0 is not allowed"),
    (["--head", "sampled", "--active-classes", 29], "a batch of 30 can have 30 different ones"),
    (["--head", "knn", "--active-classes", 90, "--neighbors", 300], "take at most 299"),
    (["--head", "knn", "--graph-every", "often"], "--graph-every 'often'"),
    (["--head", "knnn"], "invalid choice: 'knnn'"),
])
def test_a_mistake_about_the_head(arguments, text, tmp_path, monkeypatch):
    assert text in refusal(monkeypatch, 2, *SYNTH[1:], "--out", tmp_path / "run", *arguments)
    assert not list(tmp_path.iterdir())


def test_a_schedule_is_drawn_and_nothing_else(tiny_packs, tmp_path, monkeypatch, capsys):
    assert call_main(monkeypatch, 2, "--data", tiny_packs, "--schedule", "fccs", "--global-batch", 12, "--max-batch",
                     48, "--schedule-plot", tmp_path / "s.png") == [None, None]
    assert (tmp_path / "s.png").stat().st_size > 1000 and capsys.readouterr().out.count("updates") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]


# --- data ---


def other_version(packs, folder):
    shutil.copytree(packs, folder)
    with h5py.File(folder / "train" / "index.h5", "a") as file:
        file.attrs["version"] = 99


def other_classes(packs, folder):
    """The test pack has another class table."""
    tree = folder.with_name("tree")
    (tree / "train" / "alone").mkdir(parents=True)
    shutil.copy(next((packs.parent / "tree").rglob("*.png")), tree / "train" / "alone" / "0.png")
    run(sys.executable, "-m", "data_tools.pack", tree, folder)
    shutil.copytree(packs / "test", folder / "test")


def no_train(packs, folder):
    shutil.copytree(packs, folder)
    shutil.rmtree(folder / "train")


@pytest.mark.parametrize("spoil, text", [
    (other_version, "version 99"), (other_classes, "classes are not those of train"), (no_train, "not a pack")])
def test_packs_that_cannot_be_used(spoil, text, tiny_packs, tmp_path, monkeypatch):
    spoil(tiny_packs, tmp_path / "packs")
    assert text in refusal(monkeypatch, 3, "--data", tmp_path / "packs", "--out", tmp_path / "run", *QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spoil, text", [
    (lambda file: file["labels"].write_direct(np.full(len(file["labels"]), 10, file["labels"].dtype)),
     "label 10 is outside"),
    (lambda file: file["bytes"].write_direct(file["bytes"][:] ^ 1), "record .*wrong checksum")])
def test_records_that_cannot_be_used_are_named(spoil, text, tiny_packs, tmp_path):
    shutil.copytree(tiny_packs, tmp_path / "packs")
    with h5py.File(tmp_path / "packs" / "train" / "shard-00000.h5", "a") as file:
        spoil(file)
    with pytest.raises(ValueError, match=text):
        PackSplit(open_splits(tmp_path / "packs")["train"], 1, 16).examples(np.arange(12))


# --- run folders ---


@pytest.mark.parametrize("arguments, text", [
    (["--resume", ""], "already holds a run"),
    (["--resume", "auto", "--feature-dim", 9], "feature_dim 8, this run 9"),
    (["--resume", "auto", "--seed", 1], "seed 0, this run 1"),
    (["--resume", "auto", "--logits", "inner"], "logits cosine, this run inner"),
    (["--resume", "auto", "--steps", 1], "ends after 1 (12): give more"),
    (["--resume", "auto", "--global-batch", 24], "same --global-batch"),
    (["--resume", "auto", "--backbone", "resnet18"], "backbone.safetensors"),
    (["--resume", "auto", "--sampler", "sqrt"], "sampler natural, this run sqrt"),
    (["--resume", "auto", "--sampler", "weighted"], "has no weights"),
    (["--resume", "auto", "--exchange", "dgc", "--density-warmup", 0], "resume with the --exchange"),
    (["--resume", "nowhere"], "already holds a run"),
    (["--resume", "auto", "--head", "ful"], "argument --head: invalid choice"),
    (["--resume", "auto", "--backbone", "resnet19"], "--backbone resnet19"),
])
def test_a_run_folder_is_not_lost_to_a_mistake(arguments, text, tiny_packs, finished, monkeypatch):
    before = files_of(finished)
    assert text in refusal(monkeypatch, 1, "--data", tiny_packs, "--out", finished, "--steps", 4, *QUICK, *arguments)
    assert files_of(finished) == before


def test_a_run_with_another_exchange_is_not_resumed_by_the_dense_one(tiny_packs, tmp_path, monkeypatch):
    base = ["--data", tiny_packs, "--out", tmp_path / "run", "--momentum", 0]
    train(*base, "--exchange", "dgc", "--density-warmup", 0, "--steps", 2)
    assert "resume with the --exchange" in refusal(monkeypatch, 1, *base, *QUICK, "--steps", 4, "--resume", "auto")


def test_a_run_does_not_go_on_in_another_order(tiny_packs, finished, tmp_path, monkeypatch):
    shutil.copytree(tiny_packs, tmp_path / "packs")
    with h5py.File(tmp_path / "packs" / "train" / "index.h5", "a") as file:
        file.attrs["seed"] = np.int64(9)  # of the shuffle when it was packed
    assert "data_seed 0, this run 9" in refusal(monkeypatch, 1, "--data", tmp_path / "packs", "--out", finished,
                                                "--steps", 4, "--resume", "auto", *QUICK)


def test_a_folder_of_other_things_is_not_a_run_folder(tiny_packs, tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("dear")
    assert "not a run's" in refusal(monkeypatch, 2, "--data", tiny_packs, "--out", tmp_path, *QUICK)
    assert files_of(tmp_path).keys() == {tmp_path / "thesis.tex"}


# --- one process, as a user starts it ---


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    process = run(sys.executable, "train.py", "--data", "nowhere", "--out", tmp_path / "run", expect=2)
    assert len(process.stderr.splitlines()) == len(error_lines(process)) == 1 and not process.stdout


def test_the_run_folder_says_how_it_came_about(finished):
    launch = json.loads((finished / "launches.jsonl").read_text())
    assert launch["ranks"] == 1 and launch["torch"] and "train.py" in launch["command"]
    assert json.loads((finished / "config.json").read_text())["global_batch"] == 12
    assert sorted(losses(finished)) == [1, 2]
    assert list((finished / "tensorboard").iterdir())


def test_a_finished_run_trains_on_from_its_arguments(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    process = run(sys.executable, "train.py", f"@{finished / 'run.args'}", "--out", folder, "--resume", "auto",
                  "--steps", 5)
    assert last_json(process)["steps"] == 5
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5]
    again = run(sys.executable, "train.py", f"@{folder / 'run.args'}", "--resume", "auto")
    assert last_json(again)["top1"] == last_json(process)["top1"] and sorted(losses(folder)) == [1, 2, 3, 4, 5]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_steps(tiny_packs, tmp_path):
    process = run(sys.executable, "train.py", "--data", tiny_packs, "--out", tmp_path / "run", "--steps", 40, *QUICK,
                  "--lr", 1e30, "--logits", "inner", "--log-steps", 40, "--save-every", 0.2, expect=2)
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: the loss of step ") and ": take a smaller --lr" in line
    # what had become useless by then was not saved in place of what was good
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))
