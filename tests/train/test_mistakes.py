"""train.py as a user runs it: bad input, run folders, and a model that really learns."""

import json
import re
import shutil
import sys

import h5py
import numpy as np
import pytest

from tests.support.launch import error_lines, horovodrun, last_json, losses, mpirun, run

QUICK = ["--global-batch", 12, "--feature-dim", 8, "--warmup", 0, "--log-steps", 1, "--eval-every", 0,
         "--save-every", 0, "--device", "cpu"]


def train(*arguments, **options):
    return run(sys.executable, "train.py", *arguments, *QUICK, **options)


def result_of(process):
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def finished(tiny_packs, tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train("--data", tiny_packs, "--out", out, "--steps", 2)
    return out


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def other_version(packs, folder):
    shutil.copytree(packs, folder)
    with h5py.File(folder / "train" / "index.h5", "a") as file:
        file.attrs["version"] = 99


def label_outside(packs, folder):
    shutil.copytree(packs, folder)
    with h5py.File(folder / "train" / "shard-00000.h5", "a") as file:
        file["labels"][:] = 10


def damaged_image(packs, folder):
    shutil.copytree(packs, folder)
    with h5py.File(folder / "train" / "shard-00000.h5", "a") as file:
        file["bytes"][:] ^= 1


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
    (other_version, "version 99"), (label_outside, "label 10 is outside"), (damaged_image, "record"),
    (other_classes, "classes are not those of train"), (no_train, "not a pack"),
])
def test_bad_data_is_one_line(spoil, text, tiny_packs, tmp_path):
    spoil(tiny_packs, tmp_path / "packs")
    process = train("--data", tmp_path / "packs", "--out", tmp_path / "run", "--steps", 2, expect=2)
    (line,) = error_lines(process)
    assert text in line and "Traceback" not in process.stderr


@pytest.mark.mpi
def test_damage_that_one_rank_meets_ends_all(tiny_packs, tmp_path):
    shutil.copytree(tiny_packs, tmp_path / "packs")
    with h5py.File(tmp_path / "packs" / "train" / "shard-00000.h5", "a") as file:
        file["crc32"][7] += 1
    process = mpirun(3, "train.py", "--data", tmp_path / "packs", "--out", tmp_path / "run", "--steps", 50, *QUICK,
                     expect=2, seconds=60)
    assert any("record 7" in line and "shard-00000.h5" in line for line in error_lines(process)), process.stderr


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
    (["--resume", "nowhere"], "already holds a run"),
    (["--resume", "auto", "--head", "ful"], "--head ful"),
    (["--resume", "auto", "--backbone", "resnet19"], "--backbone resnet19"),
])
def test_a_run_folder_is_not_lost_to_a_mistake(arguments, text, tiny_packs, finished):
    before = contents(finished)
    process = run(sys.executable, "train.py", "--data", tiny_packs, "--out", finished, "--steps", 4, *QUICK,
                  *arguments, expect=2)
    (line,) = error_lines(process)
    assert text in line
    assert contents(finished) == before


def test_a_run_does_not_go_on_in_another_order(tiny_packs, finished, tmp_path):
    shutil.copytree(tiny_packs, tmp_path / "packs")
    with h5py.File(tmp_path / "packs" / "train" / "index.h5", "a") as file:
        file.attrs["seed"] = np.int64(9)  # of the shuffle when it was packed
    (line,) = error_lines(train("--data", tmp_path / "packs", "--out", finished, "--steps", 4, "--resume", "auto",
                                expect=2))
    assert "data_seed 0, this run 9" in line


def test_a_folder_of_other_things_is_not_a_run_folder(tiny_packs, tmp_path):
    (tmp_path / "thesis.tex").write_text("dear")
    (line,) = error_lines(train("--data", tiny_packs, "--out", tmp_path, "--steps", 2, expect=2))
    assert "not a run's" in line and contents(tmp_path).keys() == {tmp_path / "thesis.tex"}


def test_the_run_folder_says_how_it_came_about(finished):
    launch = json.loads((finished / "launches.jsonl").read_text())
    assert launch["ranks"] == 1 and launch["torch"] and "train.py" in launch["command"]
    assert json.loads((finished / "config.json").read_text())["global_batch"] == 12
    assert sorted(losses(finished)) == [1, 2]
    assert list((finished / "tensorboard").iterdir())


def test_a_finished_run_trains_on_from_its_arguments(tiny_packs, finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    process = run(sys.executable, "train.py", f"@{finished / 'run.args'}", "--out", folder, "--resume", "auto",
                  "--steps", 5)
    assert result_of(process)["steps"] == 5
    assert sorted(losses(folder)) == [1, 2, 3, 4, 5]
    again = run(sys.executable, "train.py", f"@{folder / 'run.args'}", "--resume", "auto")
    assert result_of(again)["top1"] == result_of(process)["top1"] and sorted(losses(folder)) == [1, 2, 3, 4, 5]


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_steps(tiny_packs, tmp_path):
    process = run(sys.executable, "train.py", "--data", tiny_packs, "--out", tmp_path / "run", "--steps", 40, *QUICK,
                  "--lr", 1e30, "--logits", "inner", "--log-steps", 40, "--save-every", 0.2, expect=2)
    (line,) = process.stderr.splitlines()
    assert re.match(r"error: the loss of step \d+ is (nan|inf): take a smaller --lr", line)
    # what had become useless by then was not saved in place of what was good
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


@pytest.mark.mpi
@pytest.mark.slow
def test_two_ranks_learn_to_read(tmp_path):
    """A slice of the glyphs, in typefaces never seen: a guess is right once in 150 times."""
    run(sys.executable, "-m", "data_tools.glyphs", tmp_path / "glyphs", "--no-system-fonts", "--classes", 150)
    run(sys.executable, "-m", "data_tools.pack", tmp_path / "glyphs", tmp_path / "packs")
    process = horovodrun(2, "train.py", "--data", tmp_path / "packs", "--out", tmp_path / "run", "--epochs", 15,
                         "--global-batch", 64, "--eval-every", 5, "--device", "cpu")
    result = last_json(process)
    assert result["top1"] > 0.6 and result["top5"] > 0.85, result
