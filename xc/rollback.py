"""A loss that is not finite: found without a wait in every step; the run stops, or goes back to its last checkpoint
and leaves the batch out."""

import sys

import torch

from xc import checkpoint
from xc.config import UserError


class NotFinite(UserError):
    """All ranks raise it alike; what was trained until then is of no use."""

    code = 1


class Losses:
    """Losses of the steps since the last `take`, on the device.

    bad_step, bad_loss   of the first step, counted from 0, whose loss is not finite, as of the last `look`; or None
    """

    def __init__(self, device):
        self._sum, self._count = torch.zeros((), device=device), 0
        self._bad_step = torch.full((), -1, device=device)
        self._bad_loss = torch.zeros((), device=device)
        self.bad_step = self.bad_loss = None

    def add(self, loss, step):
        """loss: (), the same on every rank, of the step of that number."""
        self._sum += loss
        self._count += 1
        bad = (self._bad_step < 0) & ~loss.isfinite()
        self._bad_step = torch.where(bad, step, self._bad_step)
        self._bad_loss = torch.where(bad, loss, self._bad_loss)

    def look(self):
        """Waits for the steps so far."""
        if self._bad_step.item() >= 0:
            self.bad_step, self.bad_loss = self._bad_step.item(), self._bad_loss.item()

    def take(self):
        """The mean loss; None where there was no step."""
        mean = self._sum.item() / self._count if self._count else None
        self._sum, self._count = torch.zeros_like(self._sum), 0
        return mean


class Rollbacks:
    """skipped: numbers of the steps, counted from 0, whose batches are left out."""

    def __init__(self, most):
        self._left, self.skipped = most, set()

    def folder(self, losses, run, world):
        """The checkpoint to go back to; NotFinite where the run may not, or has none. Collective.

        What is left out is the batch of the step and that of the step before, whose update may be the cause.
        """
        step = losses.bad_step
        what = f"the loss of step {step + 1} is {losses.bad_loss}"
        folder = checkpoint.to_resume("auto", run, world) if self._left else None
        if folder is None:
            raise NotFinite(f"{what}: take a smaller --lr or a longer --warmup and go on from the last checkpoint; "
                            "--max-rollbacks lets a run go back by itself and leave the batch out")
        self._left -= 1
        self.skipped |= {step - 1, step}
        if world.rank == 0:
            print(f"warning: {what}: going back to {folder}, and leaving out the batches of steps {step} and "
                  f"{step + 1}; --max-rollbacks leaves {self._left} more", file=sys.stderr, flush=True)
        return folder
