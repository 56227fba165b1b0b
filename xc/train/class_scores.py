"""Accuracy by class: its mean over classes, and by the number of images that train has of a class.

Where few classes have most images, the share of all examples says little about the many classes that have few.
"""

import numpy as np
import torch

from xc.data.evaluated import blocks_of

FREQUENCIES = ("0", "1", "2-9", "10-99", "100+")  # images of a class in train
_BEGINS = (1, 2, 10, 100)  # of all but the first


def frequencies_of(train, shard):
    """(S,) uint8: the place in FREQUENCIES of each class of the shard. PackError where the counts are damaged."""
    found = np.empty(len(shard), np.uint8)
    for first, last in blocks_of(shard.first, shard.last):
        found[first - shard.first : last - shard.first] = np.digitize(train.class_counts(first, last), _BEGINS)
    return found


class ClassScores:
    """Counts examples and hits of every class. A rank counts those of the classes whose rows it has."""

    def __init__(self, frequencies, head):
        """frequencies: of `frequencies_of`, for the shard of the head"""
        self._frequencies, self._head = frequencies, head
        self._counts = torch.zeros(2, len(frequencies), dtype=torch.int32, device=head.world.device)

    def add(self, labels, hits):
        """Count the examples of this rank: labels (B,) and whether each is a top-1 hit (B,). Collective."""
        counts, labels = self._head.labels.of_copy(labels)  # (G,)
        hits = self._head.world.shards.all_gather(hits.to(torch.uint8), counts)
        own = self._head.shard.owns(labels)
        rows, ones = labels[own] - self._head.shard.first, torch.ones_like(labels[own], dtype=torch.int32)
        self._counts[0].index_add_(0, rows, ones)
        self._counts[1].index_add_(0, rows, hits[own].to(torch.int32))

    def scores(self):
        """Scores of all examples that were added. Collective; the same numbers at any W.

        top1_class_mean        mean over the classes that have examples of the share of their hits
        classes                number of those classes
        top1_by_frequency      {name in FREQUENCIES: share of hits among the examples of such classes}
        examples_by_frequency  {name: number of those examples}; a frequency without examples is left out of both
        """
        world = self._head.world
        counts = world.replicas.all_reduce(self._counts)
        classes = counts[0].nonzero()[:, 0]
        frequencies = torch.from_numpy(self._frequencies).to(classes.device)[classes]
        table = torch.stack([counts[0, classes], counts[1, classes], frequencies.to(torch.int32)], 1)
        rows = world.shards.all_gather(torch.tensor([len(table)], device=table.device)).tolist()
        # All classes of the split, ascending whatever W is: so the mean has the same bits.
        examples, hits, frequencies = world.shards.all_gather(table, rows).cpu().numpy().T.astype(np.int64)
        examples_of, hits_of = (np.bincount(frequencies, numbers, len(FREQUENCIES)) for numbers in (examples, hits))
        found = [(name, int(examples_of[i]), int(hits_of[i])) for i, name in enumerate(FREQUENCIES) if examples_of[i]]
        return {"top1_class_mean": float((hits / examples).mean()) if len(examples) else 0.0, "classes": len(examples),
                "top1_by_frequency": {name: num_hits / num for name, num, num_hits in found},
                "examples_by_frequency": {name: num for name, num, _ in found}}
