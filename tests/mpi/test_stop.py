"""Told to stop: whichever rank hears it, all save and leave together, and the rest of the run is as if nothing was."""

import os
import signal
import sys

import pytest

from tests.support.launch import Launched, losses, run
from tests.support.processes import ranks_of, wait_until
from tests.support.training import SYNTH, launcher

pytestmark = [pytest.mark.mpi, pytest.mark.long]
LONG = [*SYNTH, "--global-batch", 10, "--epochs", 1]


def ranks_once_running(out, count):
    """Process numbers of the ranks of a run that has made some steps."""
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) >= 3)
    found = ranks_of(out)
    assert len(found) == count
    return found


@pytest.mark.parametrize("ranks, which, number", [
    (1, 0, signal.SIGTERM), (3, 1, signal.SIGUSR1)])
def test_all_ranks_save_and_leave(ranks, which, number, tmp_path):
    out = tmp_path / "run"
    command = [*launcher(ranks), sys.executable, *LONG, "--out"]
    process = Launched([*command, out])
    os.kill(ranks_once_running(out, ranks)[which], number)
    process = process.result(expect=75)
    assert "all of them saved; resume with:" in process.stdout and "Traceback" not in process.stderr
    (folder,) = (out / "checkpoints").iterdir()
    assert folder.name == f"step-{max(losses(out)):08d}" and max(losses(out)) < 300
    run(*command, out, "--resume", "auto")
    run(*command, tmp_path / "whole")
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == 300


@pytest.mark.parametrize("end, code, number", [("None", 0, "SIGTERM"), ("leave()", 75, "SIGUSR1")])
def test_a_signal_that_comes_too_late_changes_no_exit_code(end, code, number):
    """While Python takes itself apart, when it has given signals back to the system."""
    lines = ["import os, signal", "from xc.comm import launch", "from xc.errors import ExitRun",
             "from xc.run import signals", "signals.listen()", "class Late:",
             f"    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.{number}): kill(pid, number)",
             "late = Late()", "def leave(): raise ExitRun(75, 'left')", f"launch.run(lambda: {end})"]
    assert run(sys.executable, "-c", "\n".join(lines), expect=code)
