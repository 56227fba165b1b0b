"""Started by ../test_failures.py under mpirun: one rank fails in its own way while the others wait for it in a
collective."""

import os
import signal
import sys

import torch

from xc.comm.launch import run
from xc.comm.world import MpiWorld


def main():
    world = MpiWorld("cpu")
    world.all_ranks.all_reduce(torch.ones(1))
    if world.rank == world.size - 1:
        if sys.argv[1] == "exception":
            raise RuntimeError("a bug on one rank")
        if sys.argv[1] == "value":
            raise ValueError("record 7 is broken")
        if sys.argv[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    with world.raise_on_all_ranks():
        if sys.argv[1] == "agreed" and world.rank == 1:
            raise OSError("disk full")
    world.all_ranks.all_reduce(torch.ones(1))


if __name__ == "__main__":
    run(main)
