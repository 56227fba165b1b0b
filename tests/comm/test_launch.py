"""A process and its launcher: what must agree, and how a process ends."""

import signal
import sys
from types import SimpleNamespace

import pytest

from tests.support.launch import Launched
from xc.comm import launch
from xc.comm import world as worlds
from xc.comm.world import MpiWorld
from xc.errors import ExitRun, UserError


@pytest.fixture
def signals():
    """What these tests do to signals is undone."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("end, code, out, error", [
    (ExitRun(75, "left"), 75, "left\n", ""),
    (UserError("a mistake"), 2, "", "error: a mistake\n"),
    (ValueError("record 7\nis broken"), 2, "", "error: rank 0: record 7 is broken\n"),
    (KeyboardInterrupt(), 130, "", "interrupted\n"),
    (SystemExit(3), 3, "", None),
    (OSError("disk full"), 1, "", None)])
def test_how_main_ends_is_how_the_process_ends(end, code, out, error, signals, capsys):
    def main():
        raise end

    with pytest.raises(SystemExit) as exit:
        launch.run(main)
    said = capsys.readouterr()
    assert exit.value.code == code and said.out == out
    assert said.err == error if error is not None else said.err.startswith("rank 0 failed:\nTraceback")


def test_the_grid_must_divide_the_ranks():
    with pytest.raises(UserError, match="--model-parallel-size 3 does not divide the 4 ranks"):
        worlds._grid(4, 3)


def test_a_child_ends_by_signals_that_this_process_ignores(signals):
    """As under `nohup make test &`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = Launched([sys.executable, "-c", "import signal, time; print('up', flush=True); time.sleep(1000)"])
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert child.process.stdout.readline() == "up\n"
    child.process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in child.result(expect=-signal.SIGINT).stderr


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
