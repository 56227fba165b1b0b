"""A run that was stopped and resumed is the one that was not, bit for bit; real ranks."""

import json
import sys

import pytest

from tests.support.launch import accuracies, last_json, losses, mpirun, run
from tests.support.training import SGD

pytestmark = [pytest.mark.mpi, pytest.mark.long]

# Small images, distorted; an uneven batch; 1.3 epochs, of which the first half is over at the stop.
RUN = [*SGD, "--data", "synth:classes=60,dim=16,images=1,test=50", "--image-size", 16, "--feature-dim", 16,
       "--global-batch", 13, "--lr", 0.02, "--warmup", 0.05, "--log-steps", 1, "--device", "cpu", "--save-every", 0,
       "--eval-every", 0]  # an evaluation would hear of the signal within a step
FEW = ["--active-classes", 32, "--graph-from", 0, "--graph-every", "12steps"]
DGC = ["--density", 0.05, "--density-warmup", "10steps", "--global-batch", 14, "--micro-batches", 2]
GROWING = ["--epochs", 2.5, "--schedule", "fccs", "--fccs-tail", "20%"]
LARS = ["--optimizer", "lars", "--lr", 2, "--head-lr-scale", 1]
VECTORS = ["--data", "synth:classes=300,dim=16,test=50", "--global-batch", 60, "--lr", 0.05, "--epochs", 2]


def evaluations(run_folder):
    """[(step, split)] of a run folder, in order."""
    lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"]) for line in lines if "split" in line]


def last_files(run_folder):
    """{name: bytes} of the newest checkpoint of a run."""
    folder = sorted((run_folder / "checkpoints").iterdir())[-1]
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("ranks, stop, flags", [
    (2, 30, ["--steps", 60, "--head", "sampled", *FEW[:2], "--margin", "cosface", "--margin-size", 0.1,
             "--head-momentum", 0.9, "--head-lr-scale", 4, "--exchange", "dgc", *DGC]),
    (3, 30, ["--steps", 60, "--head", "knn", *FEW, "--graph", "approx",
             "--row-dtype", "bfloat16", "--head-momentum", 0.9, "--head-lr-scale", 4,
             "--exchange", "dgc-hier", *DGC, "--gradient-bits", 16,
             "--feature-bits", 16]),
    (3, 30, ["--head", "selective", *FEW, "--amp", "bf16", *GROWING, *LARS, "--max-batch", 52]),
    (2, 46, [*GROWING, *VECTORS, "--max-batch", 240, "--batch-growth", "auto", "--micro-batches", 2, "--amp", "fp16"]),
])
def test_stopped_and_resumed_is_uninterrupted(ranks, stop, flags, tmp_path):
    """Told to stop in the midst of an epoch, of the growth of the batch and of the time between two graphs."""
    whole, cut = ([*RUN, *flags, "--out", tmp_path / name] for name in ("whole", "cut"))
    mpirun(ranks, "train.py", *whole)
    mpirun(ranks, "-m", "tests.mpi.programs.stopped", stop - 1, *cut, expect=75)
    assert max(losses(tmp_path / "cut")) == stop
    mpirun(ranks, "train.py", *cut, "--resume", "auto")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    steps = max(losses(tmp_path / "whole"))
    assert len(losses(tmp_path / "whole")) == steps > 1.2 * stop
    files = [last_files(tmp_path / name) for name in ("cut", "whole")]
    kinds = {name.split("-")[0].split(".")[0] for name in files[0]}
    assert kinds >= {"backbone", "meta", "optimizer", "rows"}
    assert ("neighbors" in kinds, "index" in kinds, "residuals" in kinds) == (
        "knn" in flags, "selective" in flags, "--exchange" in flags)
    assert files[0] == files[1]
    stopped, ended = (json.loads((tmp_path / "cut" / "checkpoints" / f"step-{step:08d}" / "meta.json").read_text())
                      for step in (stop, steps))
    assert 0.1 < stopped["examples"] / stopped["num_records"] % 1 < 0.99
    if "fccs" in flags:
        lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
        batches = {line["step"]: line["global_batch"] for line in lines if "loss" in line}
        assert batches[1] < batches[stop] < max(batches.values())
        assert sum(batches.values()) == ended["examples"] and all(n % batches[1] == 0 for n in batches.values())


NORMS = [*RUN, "--backbone", "resnet18", "--steps", 26, "--log-steps", 8, "--eval-every", "9steps", "--lr", 0.001]
TESTED = [*RUN, "--data", "synth:classes=60,dim=16,test=1000,val=1001", "--steps", 24, "--eval-every", "12steps",
          "--save-every", "12steps"]
EVALUATED = [*RUN, "--data", "synth:classes=60,dim=16,test=1000", "--steps", 24, "--eval-every", "12steps"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """unbroken(flags): the folder of a run of two ranks with these flags, which nothing happened to."""
    done = {}

    def of(flags):
        if id(flags) not in done:
            done[id(flags)] = tmp_path_factory.mktemp("unbroken") / "run"
            mpirun(2, "train.py", *flags, "--out", done[id(flags)])
        return done[id(flags)]

    return of


@pytest.mark.parametrize("stop", [11, 16, 18])
def test_logs_and_statistics_of_norms_are_those_of_an_unbroken_run(stop, unbroken, tmp_path):
    """Means over eight steps, whenever the run is told to stop: between them, with one, with an evaluation. A ResNet's
    running statistics are each rank's own until they are averaged for one of these. Its gradients fill many buckets."""
    cut, whole = tmp_path / "cut", unbroken(NORMS)
    mpirun(2, "-m", "tests.mpi.programs.stopped", stop - 1, *NORMS, "--out", cut, expect=75)
    mpirun(2, "train.py", *NORMS, "--out", cut, "--resume", "auto")
    assert sorted(losses(whole)) == [8, 16, 24, 26]
    assert losses(cut) == losses(whole)
    assert [step for step, *_ in accuracies(whole)] == [9, 18, 26]
    assert accuracies(cut) == accuracies(whole)
    assert last_files(cut) == last_files(whole)


@pytest.mark.parametrize("at", ["12steps", "24steps"])
def test_an_evaluation_that_is_interrupted_is_made_up_for(at, unbroken, tmp_path):
    """In the midst of the run, and that of its end."""
    cut, whole = tmp_path / "cut", unbroken(EVALUATED)
    calls = 14 if at == "12steps" else 100  # each batch of an evaluation asks, too
    mpirun(2, "-m", "tests.mpi.programs.stopped", calls, *EVALUATED, "--out", cut, expect=75)
    found = sorted((cut / "checkpoints").iterdir())[-1].name
    assert found == f"step-{int(at[:2]):08d}" and len(accuracies(cut)) == (0 if at == "12steps" else 1)
    result = mpirun(2, "train.py", *EVALUATED, "--out", cut, "--resume", "auto")
    assert accuracies(cut) == accuracies(whole) and len(accuracies(cut)) == 2
    assert last_json(result)["top1"] == accuracies(whole)[-1][1]
    assert last_files(cut) == last_files(whole)


def test_a_test_at_the_end_that_is_interrupted_is_made_up_for(unbroken, tmp_path):
    """On another number of ranks. Once it is made, a further launch says the same and writes nothing."""
    cut, whole = tmp_path / "cut", unbroken(TESTED)
    calls = 24 + 2 * 77 + 20  # steps, batches of two evaluations on val, and some of test
    mpirun(2, "-m", "tests.mpi.programs.stopped", calls, *TESTED, "--out", cut, expect=75)
    assert [split for _, split in evaluations(cut)] == ["val", "val"]
    saved = {path.name: path.read_bytes() for path in (cut / "checkpoints").rglob("*.safetensors")}
    results = [mpirun(ranks, "train.py", *TESTED, "--out", cut, "--resume", "auto") for ranks in (3, 2)]
    assert evaluations(cut) == evaluations(whole) == [(12, "val"), (24, "val"), (24, "test")]
    assert accuracies(cut) == accuracies(whole)
    tops = [[last_json(result)[name] for name in ("top1", "val_top1", "top1_class_mean", "scored_step")]
            for result in results]
    assert tops[0] == tops[1] and tops[0][0] == pytest.approx(accuracies(whole)[0][1], abs=1e-6)
    assert saved == {path.name: path.read_bytes() for path in (cut / "checkpoints").rglob("*.safetensors")}
    assert last_files(cut) == last_files(whole)


def test_a_resharded_checkpoint_is_gone_on_from_bit_for_bit(tmp_path):
    """From a folder elsewhere, into another run, with rows and graph in other files than any rank wrote."""
    base = [*RUN, "--steps", 40, "--head", "knn", *FEW, "--exchange", "dgc", *DGC]
    mpirun(2, "train.py", *base, "--save-every", "20steps", "--out", tmp_path / "whole")
    run(sys.executable, "-m", "data_tools.checkpoint", "reshard", tmp_path / "whole/checkpoints/step-00000020",
        tmp_path / "five", "--files", 5)
    assert len(list((tmp_path / "five").glob("neighbors-*"))) == len(list((tmp_path / "five").glob("rows-*"))) == 5
    mpirun(2, "train.py", *base, "--out", tmp_path / "on", "--resume", tmp_path / "five")
    assert losses(tmp_path / "on") == {s: loss for s, loss in losses(tmp_path / "whole").items() if s > 20}
    assert last_files(tmp_path / "on") == last_files(tmp_path / "whole")
