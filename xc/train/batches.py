"""Batches of a step, with the labels of all ranks, which travel during the step before."""

from collections import deque
from dataclasses import dataclass

import torch

from xc.comm.shard import Shard


@dataclass(frozen=True)
class StepLabels:
    """Labels of the examples of a step, each rank's in the order of its micro-batches.

    own     (B,)  of this rank
    counts  the B of every rank
    of_all  of all ranks, in the order of ranks
    """

    own: torch.Tensor
    counts: list
    of_all: torch.Tensor


class StepBatches:
    """Batches from progress.examples to the end of the run. Collective, as `take` and `close` are."""

    def __init__(self, loader, progress, schedule, world):
        micro_batch = schedule.micro_batch
        self._queue, self._group = loader.train(progress.examples, schedule.examples, micro_batch), world.all_ranks
        self._counts = [len(Shard.of(micro_batch, world.size, rank)) for rank in range(world.size)]
        self._ahead = deque()  # (labels, function that waits for those of all ranks), by micro-batch

    def take(self, count):
        """The next `count` micro-batches [(images (B, …), labels (B,)), …] and their StepLabels. Begins to gather the
        labels of as many more."""
        self._gather(count)  # those that were not foreseen
        batch = self._queue.take(count)
        taken = [self._ahead.popleft() for _ in batch]
        self._gather(count)
        by_rank = [wait().split(self._counts) for _, wait in taken]
        of_all = torch.cat([of_part[rank] for rank in range(self._group.size) for of_part in by_rank])
        counts = [len(batch) * count for count in self._counts]
        return batch, StepLabels(torch.cat([labels for _, labels in batch]), counts, of_all)

    def close(self):
        """Wait for what travels, which would otherwise arrive in memory that is free by then."""
        while self._ahead:
            self._ahead.popleft()[1]()

    def _gather(self, count):
        for labels in self._queue.labels_ahead(len(self._ahead), max(count, len(self._ahead))):
            self._ahead.append((labels, self._group.all_gather_async(labels, self._counts)))
