"""Ran by test_mpi.py under mpirun: training in which a rank is killed while communication is in flight.

arguments: moment (gather | bucket | message), then those of train.py; writes the time into the file $KILLED_AT
"""

import os
import signal
import sys
import time
from pathlib import Path

from xc import exchange, world

KILLED_RANK, AT_CALL = 1, 12


def dies_after(function):
    """The function, whose 12th call on rank 1 is its last: what it begins is under way when the rank is gone."""
    calls = 0

    def call(*arguments):
        nonlocal calls
        result = function(*arguments)
        calls += 1
        if calls == AT_CALL and world.launched_rank() == KILLED_RANK:
            Path(os.environ["KILLED_AT"]).write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return call


if __name__ == "__main__":
    moment = sys.argv.pop(1)
    if moment == "gather":
        world.MpiGroup.all_gather_async = dies_after(world.MpiGroup.all_gather_async)
    if moment == "bucket":
        world.MpiWorld.all_reduce_async = dies_after(world.MpiWorld.all_reduce_async)
    if moment == "message":
        exchange._SparseBucket.select = dies_after(exchange._SparseBucket.select)
    import train

    world.run(train.main)
