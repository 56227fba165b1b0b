"""Being told to stop: by a cluster that needs the nodes, or a time limit that comes near (SIGUSR1, SIGTERM)."""

import signal

EXIT_CODE = 75  # of a run that was told to stop and can go on: sysexits.h, EX_TEMPFAIL

_told = []


def listen():
    """From now on these signals are noted. Called before the imports that take seconds: a rank that has not come to
    this dies of them."""
    for number in signal.SIGUSR1, signal.SIGTERM:
        signal.signal(number, lambda number, _: _told.append(number))


def ignore():
    """From now on they come too late: nothing is left to be stopped. Else Python would give them back to the system
    before its end, and a rank that is done die of them."""
    for number in signal.SIGUSR1, signal.SIGTERM:
        signal.signal(number, signal.SIG_IGN)


class Stop:
    """Whether any rank was told, the same on all ranks at the same step: the signal may reach one of them alone."""

    def __init__(self, world):
        self._world, self._answer = world, None

    def asked(self):
        """Called once a step. The answer is of the call before, whose sum travelled behind the step. Collective."""
        import torch

        answer = self._answer() if self._answer else torch.zeros(1)
        told = torch.tensor([float(len(_told))], device=self._world.device)
        self._answer = self._world.everyone.all_reduce_async(told)
        return bool(answer.item())
