"""Exact top-1 and top-5 over all classes, or retrieval: of val, or of test without a val; at the end of test."""

import sys

import torch

from xc.data.class_names import names_of
from xc.data.evaluated import split_while_training, tested_at_the_end
from xc.data.loader import Loader
from xc.errors import one_line
from xc.run import watchdog
from xc.train.class_scores import ClassScores, frequencies_of
from xc.train.retrieval import features_and_labels, retrieval_scores

_NUM_EXAMPLES = 4  # of each rank, on which the active classes are compared with all classes


class Evaluator:
    """Evaluates the state of a run.

    split     name of the split that is evaluated while training: val, or test where there is no val; None without both
    tests     whether test is kept for the end
    last      scores of the last evaluation in this launch; None before the first one
    stopped   whether the last evaluation was given up because a signal asked for a stop
    examples  (features (B, D), labels (B,)) of the last step's first micro-batch, for `details`
    """

    def __init__(self, cfg, state, splits, stop, world):
        """UserError or PackError where the counts of classes are damaged. Collective."""
        self._cfg, self._state, self._stop, self._world = cfg, state, stop, world
        self.split, self.tests = split_while_training(splits), tested_at_the_end(splits)
        self._loaders = {name: Loader(split, cfg, world) for name, split in splits.items() if name != "train"}
        with world.raise_on_all_ranks():
            by_class = self.split and cfg.eval == "classify"
            self._frequencies = frequencies_of(splits["train"], state.head.shard) if by_class else None
        self._noted = set()  # splits whose images without a match a note has named
        self.last, self.stopped, self.examples = None, False, None

    def run(self, may_stop=True):
        """Scores {split, top1, …}, or {split, recall_at_1, …} with --eval retrieval, of the split that is evaluated
        while training. None where there is none, or where a signal asked for a stop. Collective."""
        self.last = self._scores(self.split, may_stop) if self.split else None
        return self.last

    def final(self, reloaded):
        """{split: its scores}, for the last line; this is where test is evaluated, if there is val. Collective.

        reloaded  whether the weights are others than those of the last evaluation

        None where a signal asked for a stop, which is heard where test is kept for the end: the next launch tests.
        """
        scores = {}
        if self.split:
            scores[self.split] = self.last if self.last and not reloaded else self.run(may_stop=self.tests)
        if self.tests and not self.stopped:
            scores["test"] = self._scores("test", may_stop=True)
        return None if self.stopped else scores

    def details(self):
        """What else a log line of an evaluation has: what the selection of active classes costs on a few examples of
        the last step. Collective.
        """
        if self.examples is None:
            return {}
        features, labels = self.examples
        features = features[:_NUM_EXAMPLES]
        return self._state.head.selection_quality(features, labels[: len(features)])

    def _scores(self, split, may_stop):
        loader, stop = self._loaders[split], self._stop.requested if may_stop else lambda: False
        measure = self._retrieval if self._cfg.eval == "retrieval" else self._classification
        scores = measure(split, loader.test(self._cfg.global_batch), stop)
        self.stopped = scores is None
        return scores and {"split": split, **scores, "bad_records": loader.bad_records()}

    def _classification(self, split, batches, stop):
        head = self._state.head
        by_class = ClassScores(self._frequencies, head)
        return evaluate(self._state.backbone, head, batches, self._world, stop, by_class)

    def _retrieval(self, split, batches, stop):
        loader = self._loaders[split]
        found = features_and_labels(self._state.backbone, self._state.head, batches, self._world, stop)
        found = found and retrieval_scores(*found, self._world.all_ranks, stop)
        if found is None:
            return None
        scores, unmatched = found
        with self._world.raise_on_all_ranks():
            if unmatched and split not in self._noted and self._world.rank == 0:
                names = names_of(torch.tensor(unmatched), loader.split.names)
                print(note_on_unmatched(split, scores, names.values()), file=sys.stderr, flush=True)
        self._noted.add(split)
        return scores


@torch.no_grad()
def evaluate(backbone, head, batches, world, stopped, by_class):
    """Shares of the examples whose label is the best or among the five best of ALL classes; the same at any W.

    batches   of (images, labels), as many on every rank; a rank's may be empty
    stopped   asked before every batch, answers alike on all ranks; where it is true, there is no result
    by_class  ClassScores that counts the examples
    returns   dict of top1, top5 (shares), examples, and the scores by class; or None

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
        by_class.add(labels, above < 1)
    backbone.train(training)
    top1, top5, examples = world.all_ranks.all_reduce(hits).tolist()
    return {"top1": top1 / max(1, examples), "top5": top5 / max(1, examples), "examples": examples,
            **by_class.scores()}


def note_on_unmatched(of, scores, names):
    """A line on the queries without a match among the images `of` a split, with names of some of their classes."""
    more = ", …" * (scores["queries_without_match"] > len(names))
    return one_line(f"note: {scores['queries_without_match']} of {scores['examples']} images of {of} have no other "
                    f"image of their class to find, so they count in no share: classes {', '.join(names)}{more}")
