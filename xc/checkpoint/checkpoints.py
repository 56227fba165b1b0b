"""The checkpoints of a run: resume from one, save, go back to one."""

from xc.checkpoint.layout import top1_of
from xc.checkpoint.newest import to_resume
from xc.checkpoint.rollback import Rollbacks
from xc.checkpoint.state import load
from xc.checkpoint.writer import CheckpointWriter
from xc.optim.schedule import Progress
from xc.run.loss_meter import LossMeter


class Checkpoints:
    """Every method is collective.

    skipped_steps  numbers of the steps whose batches are left out, since the run went back from them
    lacks_scores   whether the run resumes, by --resume auto, from a checkpoint that was not evaluated
    """

    def __init__(self, cfg, state, schedule, train_split, world):
        self._cfg, self._state, self._schedule, self._world = cfg, state, schedule, world
        # What a run must have in common with a checkpoint to resume from it; these names are in meta.json.
        self._identity = {
            "seed": cfg.seed, "sampler": cfg.sampler, "logits": cfg.logits, "num_records": len(train_split),
            "data_seed": train_split.data_seed, "classes_digest": train_split.classes_digest,
            "course": schedule.batch_schedule}
        self._writer = CheckpointWriter(cfg.out, world, self._identity, cfg.keep_checkpoints)
        self._rollbacks = Rollbacks(cfg.max_rollbacks, cfg.out, world)
        self._resumed, self.lacks_scores = None, False

    @property
    def skipped_steps(self):
        return self._rollbacks.skipped

    def resume(self):
        """Load the checkpoint that --resume means; returns its Progress, or that of a new run where there is none."""
        self._resumed = to_resume(self._cfg.resume, self._cfg.out, self._world)
        if self._resumed is None:
            return Progress()
        progress = self._load(self._resumed)
        top1 = self._world.all_ranks.all_gather_object(top1_of(self._resumed))[0]
        self.lacks_scores = self._cfg.resume == "auto" and top1 is None
        return progress

    def save(self, progress, scores):
        """Begin to write the state in a background thread. scores: of the evaluation at this Progress, or None."""
        self._writer.save(self._state, progress, scores and scores["top1"])

    def add_scores(self, scores):
        """Add the scores of an evaluation to the checkpoint that was resumed."""
        self._writer.add_top1(self._resumed, scores["top1"])

    def roll_back(self):
        """Go back from a loss that is not finite; returns the Progress of the checkpoint that was loaded.

        NonFiniteLoss where --max-rollbacks does not allow it, or there is no checkpoint.
        """
        self._writer.finish()
        folder = self._rollbacks.folder(self._state.losses)
        self._state.losses = LossMeter(self._world.device)
        return self._load(folder)

    def finish(self):
        """Wait until the last checkpoint is on the disk. SaveError where it could not be written."""
        self._writer.finish(last=True)

    def _load(self, folder):
        with self._world.raise_on_all_ranks():
            return self._schedule.resume(load(folder, self._state, self._identity))
