"""Training on real ranks: the numbers of one process, whatever the ranks; what is logged and written."""

import json
import sys

import pytest

from tests.support.launch import accuracies, losses, mpirun, run
from tests.support.training import SYNTH, UNEVEN, assert_equal_losses

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def reference(tiny_packs, tmp_path_factory):
    """LossMeter of six steps, then top-1 and top-5, in one process without any launcher."""
    out = tmp_path_factory.mktemp("reference") / "run"
    run(sys.executable, "train.py", "--data", tiny_packs, "--out", out, "--steps", 6, *UNEVEN)
    assert len(losses(out)) == 6 and len(accuracies(out)) == 1
    return losses(out), accuracies(out)


def assert_like_reference(folder, reference):
    assert_equal_losses(losses(folder), reference[0])
    assert accuracies(folder) == reference[1]


@pytest.mark.parametrize("ranks, width", [
    (2, 0), *(pytest.param(*row, marks=pytest.mark.long) for row in [(3, 0), (4, 2), (3, 1)])])
def test_losses_do_not_depend_on_the_ranks(ranks, width, tiny_packs, tmp_path, reference):
    mpirun(ranks, "train.py", "--data", tiny_packs, "--out", tmp_path / "run", "--steps", 6, *UNEVEN,
           "--model-parallel-size", width)
    assert_like_reference(tmp_path / "run", reference)


@pytest.mark.long
def test_same_command_same_bits(tiny_packs, tmp_path):
    for name in "a", "b":
        mpirun(3, "train.py", "--data", tiny_packs, "--out", tmp_path / name, "--steps", 6, *UNEVEN,
               "--loader-threads", 1 if name == "a" else 3)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    files = [sorted((tmp_path / name / "checkpoints" / "step-00000006").glob("*.safetensors")) for name in "ab"]
    assert len(files[0]) == 5  # three shards, backbone, optimizer
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


@pytest.mark.long
@pytest.mark.parametrize("before, after", [(1, 4), (4, 3)])
def test_resume_on_another_number_of_ranks(before, after, tiny_packs, tmp_path):
    base = ["train.py", "--data", tiny_packs, "--out", tmp_path / "run", *UNEVEN, "--schedule", "constant"]
    mpirun(before, *base, "--steps", 3)
    mpirun(after, *base, "--steps", 6, "--resume", "auto")
    run(sys.executable, *base[:4], tmp_path / "whole", *base[5:], "--steps", 6)
    assert_equal_losses(losses(tmp_path / "run"), losses(tmp_path / "whole"))


@pytest.mark.long
def test_a_growing_batch_is_the_same_on_any_number_of_ranks(tiny_packs, tmp_path):
    base = ["--data", tiny_packs, *UNEVEN, "--epochs", 2, "--schedule", "fccs", "--max-batch", 52,
            "--optimizer", "lars", "--lr", 0.05, "--head-lr-scale", 0.006]
    run(sys.executable, "train.py", *base, "--out", tmp_path / "alone")
    mpirun(3, "train.py", *base, "--out", tmp_path / "many")
    assert len(losses(tmp_path / "alone")) < 18  # updates of 13 examples
    assert_equal_losses(losses(tmp_path / "many"), losses(tmp_path / "alone"))


@pytest.mark.long
def test_small_micro_batches_are_audited(tmp_path):
    """Fewer examples of a rank in the first micro-batch than are looked at."""
    flags = [*SYNTH, "--global-batch", 14, "--micro-batches", 2, "--head", "sampled", "--active-classes", 60,
             "--steps", 4, "--log-steps", 3]
    found = []
    for name in "ab":
        mpirun(3, *flags, "--out", tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        found.append([(line["loss_gap"], line["top100_covered"]) for line in lines if "loss_gap" in line])
    assert found[0] == found[1] and len(found[0]) == 1


@pytest.mark.long
def test_what_evaluations_send_is_not_the_steps(tmp_path):
    sent = []
    for name, extra in ("plain", []), ("evaluated", ["--eval-every", 0.03, "--save-every", 0.05]):
        mpirun(2, *SYNTH[:-2], "--log-steps", 10, "--steps", 20, *extra, "--out", tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        sent.append([line["sent_mb"] for line in lines if "sent_mb" in line])
    assert sent[0] == sent[1] and len(sent[0]) == 2 and sent[0][0] > 0


@pytest.mark.long
def test_two_levels(tmp_path):
    """Hosts by name. At density 1 the numbers are those of one rank with the dense exchange."""
    flags = [*SYNTH, "--weight-decay", 0, "--steps", 8]
    command = []
    for host in "aabb":
        command += [":"] * bool(command) + ["-np", 1, "-x", f"XC_HOST={host}", sys.executable, *flags, "--out",
                                            tmp_path / "run", "--exchange", "dgc-hier", "--density", 1.0]
    run("mpirun", "--oversubscribe", *command)
    run(sys.executable, *flags, "--out", tmp_path / "alone")
    assert_equal_losses(losses(tmp_path / "run"), losses(tmp_path / "alone"))


@pytest.mark.long
def test_micro_batches_do_not_depend_on_the_ranks(tiny_packs, tmp_path):
    """Nor does the batch norm of the features, which is over a micro-batch of all ranks."""
    flags = ["--data", tiny_packs, "--steps", 6, *UNEVEN, "--global-batch", 26, "--micro-batches", 2]
    run(sys.executable, "train.py", *flags, "--out", tmp_path / "alone")
    mpirun(3, "train.py", *flags, "--out", tmp_path / "run", "--trace-steps", 2)
    assert_equal_losses(losses(tmp_path / "run"), losses(tmp_path / "alone"))
    spans = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    assert {span["pid"] for span in spans} == {0, 1, 2}
    assert {"shards.all_gather", "shards.reduce_scatter", "backbone.dense"} <= {span["name"] for span in spans}


@pytest.mark.long
def test_a_graph_is_resumed_on_another_number_of_ranks(tmp_path):
    """All classes active, so that the quota rule, which knows the number of ranks, has nothing to say."""
    base = [*SYNTH, "--head", "knn", "--active-classes", 1.0, "--neighbors", 20, "--graph-from", 0,
            "--graph-every", "3steps"]
    mpirun(2, *base, "--out", tmp_path / "run", "--steps", 5)
    mpirun(3, *base, "--out", tmp_path / "run", "--steps", 8, "--resume", "auto")
    run(sys.executable, *SYNTH, "--out", tmp_path / "full", "--steps", 8)
    assert_equal_losses(losses(tmp_path / "run"), losses(tmp_path / "full"))


@pytest.mark.long
def test_what_the_choice_of_classes_costs_is_logged(tmp_path):
    mpirun(3, *SYNTH, "--head", "knn", "--active-classes", 0.3, "--graph-from", 0, "--graph-every", "5steps",
           "--out", tmp_path / "run", "--steps", 12, "--eval-every", 0.02)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    builds = [line for line in lines if "graph_seconds" in line]
    assert [line["step"] for line in builds] == [5, 10]
    assert all((line["graph_recall"], line["graph_probes"]) == (1.0, 0) for line in builds)
    audits = [line for line in lines if "top100_covered" in line]
    assert len(audits) >= 2 and all(0 < line["top100_covered"] < 1 for line in audits)
    # From the first build on, two parts of 15 examples, each with 90 classes; the target classes are of both.
    assert all(line["active_per_example"] == 90 for line in audits)
    assert all(90 < line["active"] <= 180 if line["step"] > 5 else line["active"] == 90 for line in audits)
