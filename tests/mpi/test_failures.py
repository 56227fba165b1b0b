"""Ranks and launchers that fail: one line, an exit code, and no rank that waits for ever."""

import dataclasses
import re
import sys

import pytest

from tests.support.launch import error_lines, mpirun, run
from xc.config import Config

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks, how, code, text", [
    (2, "kill", 137, ""), *(pytest.param(3, *row, marks=pytest.mark.long) for row in [
        ("exception", 1, "rank 2 failed"), ("value", 2, "error: rank 2: record 7 is broken"),
        ("agreed", 2, "error: disk full")])])
def test_no_rank_waits_for_one_that_failed(ranks, how, code, text):
    process = mpirun(ranks, "-m", "tests.mpi.programs.failure", how, expect=code)
    assert text in process.stderr
    if how == "agreed":
        assert len(error_lines(process)) == 1


def test_a_mistake_is_one_line_and_exit_code_2(tiny_packs, tmp_path):
    process = mpirun(2, "train.py", "--data", tiny_packs, "--out", tmp_path / "run", "--global-batch", 1, expect=2)
    (line,) = error_lines(process)
    assert "--global-batch 1 is less than the 2 ranks" in line and "Traceback" not in process.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_mistake_of_one_rank_before_mpi_starts_ends_all(tiny_packs, tmp_path):
    good = ["train.py", "--data", tiny_packs, "--out", tmp_path / "run"]
    process = mpirun(1, *good, ":", "-np", 1, sys.executable, *good, "@missing.args", expect=2)
    (line,) = error_lines(process)
    assert "missing.args" in line and not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("environment, text", [
    ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "Intel MPI started 2 processes"),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}, "srun started 2 processes, which MPI does not join"),
    ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, ""),  # rank 0 says it
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}, "torchrun started 2 processes"),
    ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1"}, ""),
    ({"PMI_RANK": "0", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "4"}, "Intel MPI started 4 processes"),
    ({"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "x", "PMIX_RANK": "0"}, "torchrun started 2 processes"),
    ({"PMI_RANK": "1", "PMI_SIZE": "2"}, ""),
])
def test_a_launcher_of_another_mpi_is_named(environment, text, tiny_packs, tmp_path):
    """Without this every rank would take itself for the only one and train alone, all into one folder."""
    process = run(sys.executable, "train.py", "--data", tiny_packs, "--out", tmp_path / "run", env=environment,
                  expect=2)
    assert len(error_lines(process)) == bool(text) and text in process.stderr and not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--check"], ["--schedule-plot", "plot.png"]])
def test_torchrun_is_refused(more, tiny_packs, tmp_path):
    process = run(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", 2, "train.py", "--data",
                  tiny_packs, "--out", tmp_path / "run", *more, expect=1)  # torchrun's own code
    (line,) = error_lines(process)
    assert "torchrun started 2 processes, which MPI does not join" in line and not (tmp_path / "run").exists()


@pytest.mark.long
def test_gloo_is_refused(tiny_packs, tmp_path):
    process = run("horovodrun", "--gloo", "-np", 2, sys.executable, "train.py", "--data", tiny_packs,
                  "--out", tmp_path / "run", expect=None)
    assert process.returncode != 0 and not (tmp_path / "run").exists()
    assert (process.stdout + process.stderr).count("error: launched by horovodrun --gloo") == 1


@pytest.mark.long
def test_horovodrun_takes_no_flag_of_ours_for_its_own():
    """It looks for its own options behind the command too, and stops at what could be several of them."""
    options = set(re.findall(r"--[a-z][a-z-]+", run("horovodrun", "--help").stdout))
    for field in dataclasses.fields(Config):
        flag = "--" + field.name.replace("_", "-")
        assert sum(option.startswith(flag) for option in options) <= 1, flag
