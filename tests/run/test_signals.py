"""A stop is agreed on by a sum that travels during a step; no memory is left while one is in flight."""

from types import SimpleNamespace

import pytest

from tests.support.worlds import run_ranks
from xc.config import Config
from xc.optim.schedule import Progress
from xc.run import signals
from xc.run.signals import EXIT_CODE, StopSignal


@pytest.mark.parametrize("asked", [0, 1, 4])
@pytest.mark.parametrize("end", [StopSignal.close, lambda stop: stop.exit(Progress(), Config(data="d", out="o"))])
def test_nothing_is_in_flight_at_the_end(asked, end):
    """MPI would write into memory that is free by then."""
    in_flight = []

    def all_reduce_async(tensor):
        in_flight.append(tensor)
        return lambda: in_flight.pop()

    group = SimpleNamespace(all_reduce_async=all_reduce_async)
    stop = StopSignal(SimpleNamespace(device="cpu", size=1, all_ranks=group))
    for _ in range(asked):
        assert not stop.requested()
        assert len(in_flight) == 1
    end(stop)
    end(stop)  # twice is once
    assert not in_flight


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_ranks_hear_of_a_signal_one_call_later(ranks, monkeypatch):
    def body(world):
        stop = StopSignal(world)
        answers = [stop.requested()]
        world.all_ranks.all_gather_object(None)
        if world.rank == 0:
            monkeypatch.setattr(signals, "_received", [10])
        world.all_ranks.all_gather_object(None)
        answers += [stop.requested(), stop.requested()]
        return answers, stop.exit(Progress(3, 30, 10), Config(data="d", out="o")).code

    assert run_ranks(ranks, body) == [([False, False, True], EXIT_CODE)] * ranks
