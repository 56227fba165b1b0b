"""Signals that ask a run to stop (SIGUSR1, SIGTERM): the cluster needs the nodes, or a time limit comes near.

This file imports nothing slow, so that `listen` can come before the imports of train.py.
"""

import signal

EXIT_CODE = 75  # of a run that was told to stop and can be resumed: EX_TEMPFAIL of sysexits.h

_received = []


def listen():
    """Note these signals from now on. A rank that receives one before this call dies of it."""
    for number in signal.SIGUSR1, signal.SIGTERM:
        signal.signal(number, lambda number, _: _received.append(number))


def ignore():
    """Ignore these signals from now on: the run is over.

    Python gives its handlers back to the system when it ends, and a late signal would kill a rank that is done.
    """
    for number in signal.SIGUSR1, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)


class StopSignal:
    """Whether any rank received a signal: the same answer on all ranks at the same step."""

    def __init__(self, world):
        self._world, self._answer = world, None

    def requested(self):
        """Called once a step. The answer lags by one call, since its sum travels during the step. Collective."""
        import torch

        answer = self._answer() if self._answer else torch.zeros(1)
        received = torch.tensor([float(len(_received))], device=self._world.device)
        self._answer = self._world.all_ranks.all_reduce_async(received)
        return bool(answer.item())

    def close(self):
        """Wait for the sum in flight, which would otherwise arrive in memory that is free by then. Collective."""
        if self._answer:
            self._answer()
        self._answer = None

    def exit(self, progress, cfg):
        """The ExitRun of a run that stops here; everything was saved. Collective."""
        from xc.errors import ExitRun
        from xc.run.folder import resume_command

        self.close()
        return ExitRun(EXIT_CODE, f"stopped by a signal after {progress.step} steps, all of them saved; resume with: "
                                  f"{resume_command(cfg, self._world.size)}")
