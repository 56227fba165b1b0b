"""A run of two real ranks from weights in the published naming, stopped and resumed."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support.launch import error_lines, losses, mpirun
from tests.support.training import SGD

pytestmark = [pytest.mark.mpi, pytest.mark.long]

RUN = [*SGD, "--data", "synth:classes=40,dim=16,images=1,test=50", "--image-size", 16, "--global-batch", 12,
       "--backbone", "resnet18", "--warmup", 0, "--log-steps", 1, "--device", "cpu", "--save-every", 0,
       "--eval-every", 0]
TUNED = [*RUN, "--feature-dim", 12, "--steps", 12, "--freeze", 3, "--optimizer", "adamw", "--lr", 0.01,
         "--backbone-lr-scale", 0.1, "--input-norm", "imagenet"]


def backbone_of(run):
    return load_file(sorted((run / "checkpoints").iterdir())[-1] / "backbone.safetensors")


def test_a_run_from_weights_is_resumed_bit_for_bit(tmp_path):
    mpirun(2, "train.py", *RUN, "--feature-dim", 8, "--steps", 4, "--out", tmp_path / "source")
    trained = {name.removeprefix("0."): tensor for name, tensor in backbone_of(tmp_path / "source").items()
               if name.startswith("0.")}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in trained.items()}}, tmp_path / "w.pth")
    tuned = [*TUNED, "--init", tmp_path / "w.pth"]
    whole = mpirun(2, "train.py", *tuned, "--out", tmp_path / "whole")
    lines = [line for line in whole.stdout.splitlines() if line.startswith("init: ")]
    assert len(lines) == 4 and "matched 120 tensors" in lines[0] and "fc.weight (8, 512)" in lines[1]
    assert "fc.weight (12, 512)" in lines[2] and "rows of 40 classes from the features of 400 images" in lines[3]
    found = backbone_of(tmp_path / "whole")
    same = {name for name, tensor in trained.items() if torch.equal(found[f"0.{name}"], tensor)}
    frozen = {name for name in trained if name.startswith(("conv1.", "bn1.", "layer1.", "layer2."))}
    assert frozen <= same and not {name for name in same - frozen if name.endswith(("weight", "running_mean"))}

    stopped = [*tuned, "--out", tmp_path / "cut", "--resume", "auto"]
    early = mpirun(2, "-m", "tests.mpi.programs.stopped", 6, *stopped, expect=75)  # of 34 batches for the class rows
    assert "after 0 steps" in early.stdout + early.stderr and not list((tmp_path / "cut").glob("checkpoints/step-*"))
    before = 34 + 5  # batches for the rows, and of the evaluation before the first step
    mpirun(2, "-m", "tests.mpi.programs.stopped", before + 6, *stopped, expect=75)
    (tmp_path / "w.pth").unlink()  # a resumed run does not read it
    result = mpirun(2, "train.py", *tuned, "--out", tmp_path / "cut", "--resume", "auto")
    assert "note: --init is not read" in result.stdout and "init: " not in result.stdout
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    cut = backbone_of(tmp_path / "cut")
    assert all(torch.equal(cut[name], tensor) for name, tensor in found.items())
    assert json.loads((tmp_path / "cut/config.json").read_text())["init"] == str(tmp_path / "w.pth")


def test_other_weights_are_one_line_and_nothing_is_written(tmp_path):
    torch.save({"some.weight": torch.zeros(3)}, tmp_path / "w.pth")
    result = mpirun(2, "train.py", *TUNED, "--init", tmp_path / "w.pth", "--out", tmp_path / "run", expect=2)
    assert len(error_lines(result)) == 1 and "less than half" in error_lines(result)[0]
    assert not (tmp_path / "run").exists()
