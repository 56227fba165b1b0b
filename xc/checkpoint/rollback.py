"""A loss that is not finite: the run stops, or goes back to its last checkpoint and leaves the batch out."""

import json
import sys
from pathlib import Path

from xc.checkpoint import newest as checkpoint
from xc.errors import UserError
from xc.files import replace_text


class NotFinite(UserError):
    """All ranks raise it alike: to do the same once more would end the same."""


class Rollbacks:
    """What a run went back from. RUN/rollbacks.json has it, so that a launch after this one does the same.

    skipped  numbers of the steps, counted from 0, whose batches are left out: those of losses that were not finite,
             and those before them, whose updates may be the cause
    """

    def __init__(self, most, run, world):
        self._most, self._run, self._world = most, run, world
        self._path = Path(run) / "rollbacks.json"
        with world.agreed():
            steps = _steps_in(self._path) if world.rank == 0 and self._path.exists() else []
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


def _steps_in(path):
    """The list of steps in a file; ValueError where there is none."""
    try:
        steps = json.loads(path.read_text())
    except (ValueError, RecursionError):
        steps = None
    if not (isinstance(steps, list) and all(type(step) is int for step in steps)):
        raise ValueError(f"{path} is no list of steps: delete it")
    return steps
