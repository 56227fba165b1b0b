"""Exact top-1 and top-5 over all classes."""

import torch

from xc.data.loader import Loader
from xc.run import watchdog

_NUM_EXAMPLES = 4  # of each rank, on which the active classes are compared with all classes


class Evaluator:
    """Evaluates the state of a run on its test split.

    last      scores of the last evaluation in this launch; None before the first one
    stopped   whether the last evaluation was given up because a signal asked for a stop
    examples  (features (B, D), labels (B,)) of the last step's first micro-batch, for `details`
    """

    def __init__(self, cfg, state, splits, stop, world):
        self._cfg, self._state, self._stop, self._world = cfg, state, stop, world
        self._loader = Loader(splits["test"], cfg, world) if "test" in splits else None
        self.last, self.stopped, self.examples = None, False, None

    def run(self, may_stop=True):
        """Scores of the test split: {top1, top5, examples}. None where there is no test split or it stopped.
        Collective."""
        self.last, self.stopped = None, False
        if self._loader is None:
            return None
        stop = self._stop.requested if may_stop else lambda: False
        batches = self._loader.test(self._cfg.global_batch)
        self.last = evaluate(self._state.backbone, self._state.head, batches, self._world, stop)
        self.stopped = self.last is None
        return self.last

    def details(self):
        """What else a log line of an evaluation has: {bad_test_records, …}, and what the selection of active classes
        costs on a few examples of the last step. Collective.
        """
        quality = {}
        if self.examples is not None:
            features, labels = self.examples
            features = features[:_NUM_EXAMPLES]
            quality = self._state.head.selection_quality(features, labels[: len(features)])
        return {"bad_test_records": self._loader.bad_records(), **quality}


@torch.no_grad()
def evaluate(backbone, head, batches, world, stopped=lambda: False):
    """Shares of the examples whose label is the best or among the five best of ALL classes; the same at any W.

    batches  of (images, labels), as many on every rank; a rank's may be empty
    stopped  asked before every batch, answers alike on all ranks; where it is true, there is no result
    returns  dict of top1, top5 (shares) and examples; or None

    Collective.
    """
    training = backbone.training
    backbone.eval()
    hits = torch.zeros(3, dtype=torch.int64)  # best, among the five best, examples
    for images, labels in batches:
        watchdog.heartbeat("evaluation")
        if stopped():
            backbone.train(training)
            return None
        # Not every network takes an empty batch.
        features = backbone(images) if len(images) else torch.zeros(0, head.feature_dim, device=world.device)
        above = head.num_scores_above_target(features, labels)
        hits += torch.tensor([(above < 1).sum(), (above < 5).sum(), len(above)])
    backbone.train(training)
    top1, top5, examples = world.all_ranks.all_reduce(hits).tolist()
    return {"top1": top1 / max(1, examples), "top5": top5 / max(1, examples), "examples": examples}
