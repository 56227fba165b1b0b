"""Rollbacks: a loss or a weight that is not finite ends the run, or takes it back to a checkpoint and leaves the batch
out."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from xc.checkpoint.newest import newest_valid
from xc.errors import UserError
from xc.files import replace_text


class Diverged(UserError):
    """Every rank raises it. The same command would end the same way."""


@dataclass(frozen=True)
class Divergence:
    """step: number (from 0) of the step at which something is not finite; what: a text that says what"""

    step: int
    what: str


class Rollbacks:
    """The rollbacks of a run. RUN/rollbacks.json keeps them, so that a later launch leaves out the same batches.

    skipped  numbers (from 0) of the steps whose batches are left out: the steps of the divergences, and those before
             them, whose updates may be the cause
    """

    def __init__(self, most, run, world):
        """most: rollbacks that the run may have. Collective."""
        self._most, self._run, self._world = most, run, world
        self._path = Path(run) / "rollbacks.json"
        with world.raise_on_all_ranks():
            steps = _steps_in(self._path) if world.rank == 0 and self._path.exists() else []
        self._bad_steps = world.all_ranks.all_gather_object(steps)[0]

    @property
    def skipped(self):
        return {step - before for step in self._bad_steps for before in (0, 1)}

    def folder(self, divergence):
        """The checkpoint to go back to: the newest from before the batches that are left out, where there is one.

        Diverged where the run may not go back, or has no checkpoint. Collective.
        """
        step, what = divergence.step, divergence.what
        advice = "take a smaller --lr or a longer --warmup and resume from a checkpoint"
        if not self._most:
            raise Diverged(f"{what}: {advice}, or let the run go back and leave the batch out: --max-rollbacks")
        if len(self._bad_steps) >= self._most:
            raise Diverged(f"{what}, and the run went back {self._most} times (--max-rollbacks): {advice}")
        folder = (newest_valid(self._run, self._world, most_steps=step - 1)
                  or newest_valid(self._run, self._world))
        if folder is None:
            raise Diverged(f"{what}, and there is no checkpoint yet to go back to: {advice}")
        self._bad_steps.append(step)
        with self._world.raise_on_all_ranks():
            if self._world.rank == 0:
                replace_text(self._path, json.dumps(self._bad_steps))
        if self._world.rank == 0:
            print(f"warning: {what}: going back to {folder} and leaving out that batch and the one before; "
                  f"--max-rollbacks allows {self._most - len(self._bad_steps)} more", file=sys.stderr, flush=True)
        return folder


def _steps_in(path):
    """The list of steps in a file; ValueError where it holds none."""
    try:
        steps = json.loads(path.read_text())
    except (ValueError, RecursionError):
        steps = None
    if not (isinstance(steps, list) and all(type(step) is int for step in steps)):
        raise ValueError(f"{path} is no list of steps: delete it")
    return steps
