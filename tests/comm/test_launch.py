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


@pytest.mark.parametrize("size, waits", [(1, True), (2, False)])
@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_speaks_though_mpi_does_not_join_the_ranks(size, waits, rank, monkeypatch, capsys):
    """An MPI that did not start them has no barrier for them; the launcher ends all when the first one exits."""
    ranks, slept = SimpleNamespace(size=size, allgather=lambda error: [error], Barrier=lambda: None), []
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=ranks)))
    monkeypatch.setattr(launch, "time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(launch, "_compared", False)
    for name in launch._RANK_VARIABLES + launch._SIZE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMIX_RANK", str(rank))  # as under srun with an MPI that has no PMIx
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(SystemExit):
        launch._exit_with(UserError("a mistake"))
    assert capsys.readouterr().err == ("error: a mistake\n" if rank == 0 else "")
    assert bool(slept) == (waits and rank == 1)


@pytest.mark.parametrize("environment, found", [
    ({"WORLD_SIZE": "1", "RANK": "0"}, None), ({"WORLD_SIZE": "2"}, None),
    ({"WORLD_SIZE": "2", "RANK": "1"}, ("a launcher of torch", 2, 1)),
    ({"WORLD_SIZE": "2", "RANK": "1", "PMIX_RANK": "1"}, None),
    ({"WORLD_SIZE": "2", "RANK": "1", "PMIX_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, ("torchrun", 2, 1)),
    ({"WORLD_SIZE": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, None),
    ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2"}, ("srun", 3, 2)),
    ({"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "PMIX_RANK": "2"}, None)])
def test_processes_that_would_train_alone_are_known(environment, found, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS", *launch._RANK_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launch.stray_launch() == found


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
