"""Started by ../test_resume.py under mpirun: training in which a rank tells itself to stop, by a signal in a certain
step.

arguments: the step, then those of train.py
"""

import os
import signal
import sys

from xc.comm import launch as world
from xc.run.signals import StopSignal

if __name__ == "__main__":
    at, asked = int(sys.argv.pop(1)), StopSignal.requested
    calls = 0

    def told(self):
        global calls
        calls += 1
        if calls == at and self._world.rank == self._world.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return asked(self)

    StopSignal.requested = told
    import train

    world.run(train.main)
