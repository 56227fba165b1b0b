"""The Slurm templates on a real Slurm of two nodes: runs complete, whatever happens to them on the way, or end for good."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch import ROOT, losses, mpirun
from tests.slurm_cluster import Cluster, missing
from tests.test_mpi import SYNTH

pytestmark = pytest.mark.mpi
FLAGS = [*SYNTH[1:], "--eval-every", 0]
ONE_NODE, TWO_NODES = ["-N", 1, "-n", 2], ["-N", 2]
ENDLESS = 10**6


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster whose jobs run in a copy of the checkout, so that their logs and run folders are not left in this one."""
    if reason := missing():
        pytest.skip(reason)
    checkout = tmp_path_factory.mktemp("slurm") / "checkout"
    left_out = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", "*.log", "*-[0-9]*")
    shutil.copytree(ROOT, checkout, ignore=left_out)
    with Cluster(checkout) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """unbroken(steps): losses of a run of two ranks that nothing happened to."""
    def of(steps):
        out = tmp_path_factory.mktemp("unbroken") / "run"
        mpirun(2, *SYNTH, "--eval-every", 0, "--steps", steps, "--out", out)
        return losses(out)

    return of


def ended(cluster, number, state="COMPLETED", code="0:0", restarts=0, **options):
    """Waits for the end of a job of one record and looks at it; nothing of the job is left running."""
    (job,) = cluster.wait(number, **options)
    log = read_log(cluster, job)
    assert (job["JobState"], job["ExitCode"], int(job["Restarts"])) == (state, code, restarts), log
    until(lambda: not cluster.processes(number), f"processes of the ended job: {cluster.processes(number)}", seconds=15)
    return log


def read_log(cluster, job):
    path = Path(job["StdOut"])
    return path.read_text() if path.exists() else "(no log)"


def until(true, text, seconds=60):
    deadline = time.monotonic() + seconds
    while not (result := true()):
        assert time.monotonic() < deadline, f"not in {seconds} s: {text}"
        time.sleep(0.05)
    return result


def steps_of(out):
    return max(losses(out), default=0) if (out / "metrics.jsonl").exists() else 0


def ranks(cluster, number):
    """Process numbers of a job's ranks, which train."""
    return sorted(pid for pid, command in cluster.processes(number).items() if command.startswith("python train.py"))


def requeued(cluster, number, times):
    until(lambda: int(cluster.jobs(number)[0]["Restarts"]) >= times, f"restart {times} of {cluster.jobs(number)}")


@pytest.mark.parametrize("launcher, nodes", [
    ("srun", ONE_NODE), ("srun", TWO_NODES), ("mpirun", ONE_NODE), ("mpirun", TWO_NODES), ("horovodrun", ONE_NODE)])
def test_a_run_completes(launcher, nodes, cluster, unbroken, tmp_path):
    out = tmp_path / "run"
    number = cluster.submit(*nodes, "slurm/train.sbatch", *FLAGS, "--steps", 9, "--out", out,
                            env={"XC_LAUNCHER": launcher})
    log = ended(cluster, number)
    assert losses(out) == unbroken(9)
    assert f"2 ranks on {'n[1-2]' if nodes == TWO_NODES else 'n'}" in log and f"by {launcher}," in log
    # One log of rank 0, and of every rank its own. horovodrun marks its lines.
    logs = cluster.checkout / f"slurm/logs/train-{number}"
    own = (logs / "rank-0.log").read_text().splitlines()
    assert json.loads(own[-1])["steps"] == 9 and (logs / "rank-1.log").exists()
    if launcher != "horovodrun":
        assert [line for line in log.splitlines() if line in own] == own
