"""The labels of all ranks in a step: gathered once, though several places ask for them."""

import torch


class GroupLabels:
    """Labels of the examples of a batch, in the order of ranks. Keeps those of the last batch."""

    def __init__(self, world):
        self._world, self._own, self._of_all = world, None, None

    def know(self, own, counts, of_all):
        """Labels (B,) of this rank, the B of every rank, and the labels of all ranks, which were gathered before."""
        self._own, self._of_all = own, (counts, of_all)

    def of_all(self, own):
        """Numbers of labels of all ranks, and the labels. Collective, unless these are the ones it knows."""
        if own is not self._own:
            counts = counts_of(own, self._world.all_ranks)
            self.know(own, counts, self._world.all_ranks.all_gather(own, counts))
        return self._of_all

    def of_copy(self, own):
        """Numbers of labels of the ranks of this copy of the classifier, and their labels (G,). Collective likewise."""
        ranks, (counts, labels) = self._world.shard_ranks, self.of_all(own)
        first, counts = sum(counts[: ranks.start]), counts[ranks.start : ranks.stop]
        return counts, labels[first : first + sum(counts)]

    def counts_of_last(self):
        """Numbers of labels of the ranks of this copy in the last batch."""
        return self.of_copy(self._own)[0]


def counts_of(rows, group):
    """Numbers of rows of the ranks of a group. Collective."""
    return group.all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
