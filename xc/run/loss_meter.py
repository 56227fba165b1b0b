"""The losses of steps, looked at without a wait in every one of them."""

from dataclasses import InitVar, dataclass

import torch


@dataclass
class Losses:
    """Losses of the steps since the last `take`, on the device until the next `look`.

    total, count        as of the last `look`. A checkpoint has them, so that a mean is that of an unbroken run; in
                        float64, in which sums of float32 do not depend on when they were looked at.
    bad_step, bad_loss  of the first step, counted from 0, whose loss is not finite, as of the last `look`; or None
    """

    device: InitVar[torch.device | str] = "cpu"
    total: float = 0.0
    count: int = 0

    def __post_init__(self, device):
        self.bad_step = self.bad_loss = None
        self._sum, self._num_added = torch.zeros((), dtype=torch.float64, device=device), 0
        self._bad_step = torch.full((), -1, device=device)
        self._bad_loss = torch.zeros((), device=device)

    def add(self, loss, step):
        """loss: (), the same on every rank, of the step of that number."""
        self._sum += loss
        self._num_added += 1
        bad = (self._bad_step < 0) & ~loss.isfinite()
        self._bad_step = torch.where(bad, step, self._bad_step)
        self._bad_loss = torch.where(bad, loss, self._bad_loss)

    def look(self):
        """Waits for the steps so far."""
        self.total += self._sum.item()
        self.count += self._num_added
        self._sum, self._num_added = torch.zeros_like(self._sum), 0
        if self._bad_step.item() >= 0:
            self.bad_step, self.bad_loss = self._bad_step.item(), self._bad_loss.item()

    def take(self):
        """The mean loss, as of the last `look`; None where there was no step."""
        mean = self.total / self.count if self.count else None
        self.total, self.count = 0.0, 0
        return mean
