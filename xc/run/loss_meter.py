"""The losses of steps, read from the device without a wait in every step."""

from dataclasses import InitVar, dataclass

import torch


@dataclass
class LossMeter:
    """Losses of the steps since the last `pop_mean`. They stay on the device until the next `sync`.

    total, count       as of the last `sync`. A checkpoint holds them, so that a resumed run logs the means of an
                       unbroken run. The sum is in float64, in which sums of float32 do not depend on when they are
                       read.
    non_finite_step    number (from 0) of the first step whose loss is not finite, as of the last `sync`; or None
    non_finite_loss    that loss; or None
    """

    device: InitVar[torch.device | str] = "cpu"
    total: float = 0.0
    count: int = 0

    def __post_init__(self, device):
        self.non_finite_step = self.non_finite_loss = None
        self._sum, self._num_added = torch.zeros((), dtype=torch.float64, device=device), 0
        self._step = torch.full((), -1, device=device)
        self._loss = torch.zeros((), device=device)

    def add(self, loss, step):
        """Add the loss (), the same on every rank, of the step of that number."""
        self._sum += loss
        self._num_added += 1
        first = (self._step < 0) & ~loss.isfinite()
        self._step = torch.where(first, step, self._step)
        self._loss = torch.where(first, loss, self._loss)

    def sync(self):
        """Wait for the steps so far and read their losses; returns the meter."""
        self.total += self._sum.item()
        self.count += self._num_added
        self._sum, self._num_added = torch.zeros_like(self._sum), 0
        if self._step.item() >= 0:
            self.non_finite_step, self.non_finite_loss = self._step.item(), self._loss.item()
        return self

    def pop_mean(self):
        """The mean loss as of the last `sync`, and begin anew; None where there was no step."""
        mean = self.total / self.count if self.count else None
        self.total, self.count = 0.0, 0
        return mean
