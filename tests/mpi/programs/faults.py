"""Started by ../test_faults.py under mpirun: training in which a fault happens.

arguments: the fault, then those of train.py. A fault of rank 1 comes at its 12th call of what it sits in:

    kill-gather kill-bucket kill-message   killed with communication in flight
    sleep      never comes back from reading data
    spin       the same, by a call that holds the interpreter: no thread of the rank runs
    nan        all ranks: the inputs of step 21, counted from 0, are no numbers
    memory     its memory ends while it builds its first graph
    without    all ranks: the batches of steps 20 and 21 are left out
    none       no fault
"""

import os
import re
import signal
import sys
import time

import torch

from xc.checkpoint import rollback
from xc.comm import groups, launch, world
from xc.data import loader as data
from xc.gradients import dgc as exchange
from xc.knn import build
from xc.train import step

FAULTY_RANK, AT_CALL, BAD_STEP = 1, 12, 21


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def sleep():
    time.sleep(10**6)


def spin():
    re.match(r"(a+)+b", 60 * "a")  # years


def at_a_call_of(function, fault):
    """The function, at whose 12th call on rank 1 the fault happens, after it has begun what it begins."""
    calls = 0

    def call(*arguments):
        nonlocal calls
        result = function(*arguments)
        calls += 1
        if calls == AT_CALL and launch.launched_rank() == FAULTY_RANK:
            fault()
        return result

    return call


def spoiled(function):
    def run(backbone, head, exchange, batch, *arguments):
        if head.step == BAD_STEP:
            batch = [(inputs * torch.nan, labels) for inputs, labels in batch]
        return function(backbone, head, exchange, batch, *arguments)

    return run


def without_memory(function):
    def run(*arguments):
        if launch.launched_rank() == FAULTY_RANK:
            torch.empty(2**50)
        return function(*arguments)

    return run


if __name__ == "__main__":
    name = sys.argv.pop(1)
    if name == "kill-gather":
        groups.MpiGroup.all_gather_async = at_a_call_of(groups.MpiGroup.all_gather_async, kill)
    elif name == "kill-bucket":
        world.MpiWorld.all_reduce_async = at_a_call_of(world.MpiWorld.all_reduce_async, kill)
    elif name == "kill-message":
        exchange.SparseBucket.select = at_a_call_of(exchange.SparseBucket.select, kill)
    elif name == "nan":
        step.forward_backward = spoiled(step.forward_backward)
    elif name == "memory":
        build._distribute = without_memory(build._distribute)
    elif name == "without":
        rollback.Rollbacks.skipped = {BAD_STEP - 1, BAD_STEP}
    elif name == "none":
        pass
    else:
        data.BatchQueue.take = at_a_call_of(data.BatchQueue.take, globals()[name])
    import train

    launch.run(train.main)
