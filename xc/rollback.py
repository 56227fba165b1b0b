"""A loss that is not finite: found without a wait in every step; the run stops, or goes back to its last checkpoint
and leaves the batch out."""

import json
import sys
from pathlib import Path

import torch

from xc import checkpoint
from xc.config import UserError
from xc.run_folder import replace_text


class NotFinite(UserError):
    """All ranks raise it alike: to do the same once more would end the same."""


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
    """What a run went back from. RUN/rollbacks.json has it, so that a launch after this one does the same.

    skipped  numbers of the steps, counted from 0, whose batches are left out: those of losses that were not finite,
             and those before them, whose updates may be the cause
    """

    def __init__(self, most, run, world):
        self._most, self._run, self._world = most, run, world
        self._path = Path(run) / "rollbacks.json"
        with world.agreed():
            steps = json.loads(self._path.read_text()) if world.rank == 0 and self._path.exists() else []
            if not (isinstance(steps, list) and all(type(step) is int for step in steps)):
                raise ValueError(f"{self._path} is no list of steps: delete it")
        self._bad_steps = world.everyone.all_gather_object(steps)[0]

    @property
    def skipped(self):
        return {step - before for step in self._bad_steps for before in (0, 1)}

    def folder(self, losses):
        """The checkpoint to go back to: the newest from before the batches that are left out, where there is one.
        NotFinite where the run may not go back, or to nowhere. Collective."""
        step, advice = losses.bad_step, "take a smaller --lr or a longer --warmup and go on from the last checkpoint"
        what = f"the loss of step {step + 1} is {losses.bad_loss}"
        if not self._most:
            raise NotFinite(f"{what}: {advice}, or let the run go back by itself and leave the batch out: "
                            "--max-rollbacks")
        if len(self._bad_steps) >= self._most:
            raise NotFinite(f"{what}, and the run has gone back {self._most} times, as --max-rollbacks says: {advice}")
        folder = (checkpoint.newest_whole(self._run, self._world, step - 1)
                  or checkpoint.newest_whole(self._run, self._world))
        if folder is None:
            raise NotFinite(f"{what}, and there is no checkpoint yet to go back to: {advice}")
        self._bad_steps.append(step)
        with self._world.agreed():
            if self._world.rank == 0:
                replace_text(self._path, json.dumps(self._bad_steps))
        if self._world.rank == 0:
            print(f"warning: {what}: going back to {folder}, to leave out that batch and the one before; "
                  f"--max-rollbacks allows {self._most - len(self._bad_steps)} more", file=sys.stderr, flush=True)
        return folder
