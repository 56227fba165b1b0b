"""The checkpoints of a run: resume from one, save, go back to one, take the best one at the end."""

import sys
from pathlib import Path

from xc.checkpoint.best import best_valid
from xc.checkpoint.layout import folders, set_aside, step_of, top1_of
from xc.checkpoint.newest import to_resume
from xc.checkpoint.rollback import Divergence, Rollbacks
from xc.checkpoint.state import fitting, load, load_weights, not_finite
from xc.checkpoint.writer import CheckpointWriter
from xc.data.evaluated import BEST_BY, data_of
from xc.errors import UserError
from xc.optim.schedule import Progress
from xc.run.loss_meter import LossMeter


class Checkpoints:
    """Every method is collective.

    skipped_steps  numbers of the steps whose batches are left out, since the run went back from them
    lacks_scores   whether the run resumes from a checkpoint of its own that was not evaluated
    """

    def __init__(self, cfg, state, schedule, splits, world):
        train_split, self._evaluated = splits["train"], data_of(splits, cfg.eval)
        self._best_by = BEST_BY[cfg.eval]
        self._cfg, self._state, self._schedule, self._world = cfg, state, schedule, world
        # What a run must have in common with a checkpoint to resume from it; these names are in meta.json.
        self._identity = {
            "seed": cfg.seed, "sampler": cfg.sampler, "logits": cfg.logits, "num_records": len(train_split),
            "data_seed": train_split.data_seed, "classes_digest": train_split.classes_digest,
            "course": schedule.batch_schedule, "input_norm": cfg.input_norm}
        self._writer = CheckpointWriter(cfg.out, world, self._identity, cfg.keep_checkpoints, self._evaluated)
        self._rollbacks = Rollbacks(cfg.max_rollbacks, cfg.out, world)
        self._resumed, self.lacks_scores, self._later = None, False, []

    @property
    def resumed(self):
        """Whether `resume` loaded a checkpoint."""
        return self._resumed is not None

    @property
    def skipped_steps(self):
        return self._rollbacks.skipped

    def resume(self):
        """Load the checkpoint that --resume means; returns its Progress, or that of a new run where there is none."""
        self._resumed = to_resume(self._cfg.resume, self._cfg.out, self._world)
        if self._resumed is None:
            return Progress()
        progress = self._load(self._resumed)
        is_own = self._resumed.resolve().parent == (Path(self._cfg.out) / "checkpoints").resolve()
        lacks = is_own and top1_of(self._resumed, self._evaluated) is None
        self.lacks_scores = self._world.all_ranks.all_gather_object(lacks)[0]
        self._later = [one for one in folders(self._resumed.parent) if is_own and step_of(one) > progress.step]
        return progress

    def save(self, progress, scores):
        """Begin to write the state in a background thread. scores: of the evaluation at this Progress, or None."""
        if self._world.rank == 0 and self._later:
            set_aside(self._later)
        self._later = []
        self._writer.save(self._state, progress, scores and scores[self._best_by])

    def add_scores(self, scores):
        """Add the scores of an evaluation to the checkpoint that was resumed."""
        self._writer.add_top1(self._resumed, scores[self._best_by])

    def divergence(self, progress, before_save):
        """The Divergence of the run by now; None where all is finite.

        before_save  whether the state is looked at as well as the losses: an update after the last finite loss must not
                     replace a good checkpoint
        """
        losses = self._state.losses.sync()
        if losses.non_finite_step is not None:
            return Divergence(losses.non_finite_step,
                              f"the loss of step {losses.non_finite_step + 1} is {losses.non_finite_loss}")
        name = not_finite(self._state, self._world) if before_save else None
        return name and Divergence(progress.step - 1, f"{name} is not finite after step {progress.step}")

    def roll_back(self, divergence):
        """Go back from a divergence; returns the Progress of the checkpoint that was loaded.

        Diverged where --max-rollbacks does not allow it, or there is no checkpoint.
        """
        self._writer.finish()
        folder = self._rollbacks.folder(divergence)
        self._state.losses = LossMeter(self._world.device)
        return self._load(folder)

    def wait(self):
        """Wait until no save is in flight."""
        self._writer.finish()

    def finish(self):
        """Wait until the last checkpoint is on the disk. SaveError where it could not be written."""
        self._writer.finish(last=True)

    def load_best(self, progress):
        """Load backbone and class rows of the best checkpoint up to this Progress; returns the number of its step.

        Where that is the step of this Progress, or there is no best checkpoint that can be used, the weights stay.
        """
        try:
            folder = best_valid(self._cfg.out, self._evaluated, progress.step, self._world)
            with self._world.raise_on_all_ranks():
                fitting(folder, self._state, self._identity)  # before a weight is changed
        except UserError as error:
            if self._world.rank == 0:
                print(f"warning: test is evaluated with the last weights: {error}", file=sys.stderr, flush=True)
            return progress.step
        step = step_of(folder)
        if step != progress.step:
            with self._world.raise_on_all_ranks():
                load_weights(folder, self._state, self._identity)
        return step

    def _load(self, folder):
        with self._world.raise_on_all_ranks():
            return self._schedule.resume(load(folder, self._state, self._identity))
