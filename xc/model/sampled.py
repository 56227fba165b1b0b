"""Sampled softmax: what the heads have in common that leave classes out of a step."""

import math

import numpy as np
import torch

from xc.comm.shard import Shard
from xc.data.hashing import SIGNED_GOLDEN, mix
from xc.errors import UserError
from xc.model.head import Head, Selection
from xc.optim.add_rows import add_rows


class SampledHead(Head):
    """Softmax over the target classes of a step, classes near them, and random others: M classes in all.

    The active classes of a shard, with the `candidates` of a subclass:

    1. The quota of a shard is its near-equal part of M. A shard with more target classes raises it for this step; with
       the sampling correction, to one class more than its target classes.
    2. All target classes of the global batch, of all replicas, are active.
    3. Near classes follow, at most `near_share` of the rest of the quota. If there are more, the nearest are taken; a
       hash of id and step decides between equally near ones, so that each has its turn (ours).
    4. Random classes fill the quota: the shard's other classes are cut into equal strata, and one class of each is
       drawn from (seed, step, shard).

    Neighbour ranks and hashes do not depend on the shards, so the order of the near classes does not depend on the
    number of ranks. How many of them a shard takes (1), and the strata (4), do.

    With several accumulation steps each has its own selection: the budget M is for the examples of one accumulation
    step, so that the cost of an example does not grow with the batch. The row gradients of the selections are added up.

    Without the sampling correction a class that is left out has probability 0, so the loss is never above the full one.
    With it (ours) log n is added to the logit of a random class that was drawn from a stratum of n classes, which makes
    the expected partition function that of the full softmax. This is the log-count correction of sampled softmax
    (Bengio and Senecal 2003), for the random classes alone.
    """

    flags = ("active_classes", "sampling_correction")

    def __init__(self, *args, active_classes, sampling_correction=True, near_share=0.0, **kwargs):
        """active_classes: M; near_share: 0 to 1."""
        super().__init__(*args, **kwargs)
        self.sampling_correction, self.near_share = sampling_correction, near_share
        group = self.world.shards
        self.quota = len(Shard.of(active_classes, group.size, group.rank))
        self._current = 0  # index in `selections` of `selection`
        self._summed, self._sum = None, None  # active rows (A,) of all selections so far; the sum of their gradients

    @classmethod
    def settings(cls, cfg, num_classes):
        return {"active_classes": budget(cfg, num_classes), "sampling_correction": cfg.sampling_correction}

    def select(self, labels, step, accumulation_steps=1, micro_batches=None):
        super().select(labels, step, accumulation_steps, micro_batches)
        self._current, self._summed, self._sum = 0, labels.new_zeros(0), None
        self.selections = self._selections_of(labels, accumulation_steps, micro_batches)
        self.selection = self.selections[0]
        return self.selections

    def _selections_of(self, labels, accumulation_steps, micro_batches):
        """[Selection] of a step, or None for those that are not chosen yet. See `select`. Collective."""
        return self._select(self._labels_by_accumulation_step(labels, accumulation_steps))

    def _select(self, labels):
        """[Selection] of the accumulation steps with these labels, [(G,), …]."""
        selections = [self.choose(of_one, self.step + i, *self.candidates(of_one)) for i, of_one in enumerate(labels)]
        self._summed = torch.unique(torch.cat([selection.active for selection in selections]))
        return selections

    def use_selection(self, i):
        if len(self.selections) > 1:
            self._add_row_gradients()
            self._current, self.selection, self.active_row_cache = i, self.selections[i], None

    def _add_row_gradients(self):
        """Add the row gradients of the current selection to the sum of the step."""
        if self.row_grad is None:
            return
        active = self.selection.active
        union = torch.unique(torch.cat([self._summed, active]))
        if self._sum is None:
            self._summed, self._sum = union, self.memory("sum", len(union), self.feature_dim).zero_()
        elif len(union) > len(self._summed):  # the classes of a later selection were not known before
            known, self._summed = self._summed, union
            larger = self._sum.new_zeros(len(union), self.feature_dim)
            self._sum = larger.index_copy_(0, torch.searchsorted(union, known), self._sum)
        add_rows(self._sum, torch.searchsorted(self._summed, active), self.row_grad)
        self.row_grad = None

    def reduce_async(self):
        if len(self.selections) > 1 or self.selection.parts:  # a row of several parts has several gradients
            self._add_row_gradients()
            self.selection, self.row_grad = Selection(self._summed), self._sum
        super().reduce_async()

    def _labels_by_accumulation_step(self, labels, accumulation_steps):
        """[labels (G,) of all replicas, …] of each accumulation step: all replicas choose alike. Collective."""
        counts, labels = self.labels.of_all(labels)
        pieces = labels.split([count // accumulation_steps for count in counts for _ in range(accumulation_steps)])
        return [torch.cat(pieces[i::accumulation_steps]) for i in range(accumulation_steps)]

    def candidates(self, labels):
        """Classes of this shard near the target classes: local ids (E,) and neighbour ranks (E,), 0 the nearest.

        labels  (G,)  of an accumulation step

        A class may come several times, and may be a target class.
        """
        none = labels.new_zeros(0)
        return none, none

    def choose(self, labels, step, candidates, neighbor_ranks):
        """The Selection of a step by the rules of this class.

        labels                      (G,)  of the accumulation step
        step                        seeds the random choices
        candidates, neighbor_ranks  (E,)  from `candidates`
        """
        num_rows = len(self.weight)
        targets = torch.unique(labels[self.shard.owns(labels)] - self.shard.first)
        quota = max(self.quota, min(num_rows, len(targets) + self.sampling_correction))
        room = quota - len(targets)
        one_random = self.sampling_correction and quota < num_rows  # at least one, which stands for the others
        num_near = min(int(self.near_share * room), room - one_random)
        near = self._nearest(candidates, neighbor_ranks, targets, num_near, step)
        chosen = torch.cat([targets, near]).sort().values
        drawn, sizes = self._draw(chosen, quota - len(chosen), self._generator(step))
        active, order = torch.cat([chosen, drawn]).sort()
        if not self.sampling_correction:
            return Selection(active)
        offset = torch.cat([torch.zeros(len(chosen), device=drawn.device), sizes.log()])
        return Selection(active, offset.to(self.compute_dtype)[order])

    def _nearest(self, candidates, neighbor_ranks, targets, count, step):
        """Up to `count` different candidates (N,) that are not targets, by lowest neighbour rank, then by hash.

        candidates, neighbor_ranks  (E,)
        targets                     (N,)  local ids of the target classes, unique
        """
        candidates, which = torch.unique(candidates, return_inverse=True)
        lowest = torch.empty_like(candidates).scatter_reduce_(0, which, neighbor_ranks, "amin", include_self=False)
        others = ~torch.isin(candidates, targets, assume_unique=True)
        candidates, lowest = candidates[others], lowest[others]
        by_hash = mix((candidates + self.shard.first) * SIGNED_GOLDEN + step).sort().indices
        return candidates[by_hash][lowest[by_hash].sort(stable=True).indices[:count]]

    def _generator(self, step, *use):
        """Random numbers of this shard in a step; other numbers for each use."""
        return np.random.default_rng([self.seed, step, self.shard.first, *use])

    def _draw(self, chosen, count, generator):
        """One class from each of `count` strata of the classes that are not chosen (N,), sorted.

        Returns local ids (R,), ascending, and the sizes of the strata (R,).
        """
        num_others = len(self.weight) - len(chosen)
        edges = torch.arange(count + 1) * num_others // max(1, count)
        sizes = edges.diff()
        uniform = torch.from_numpy(generator.random(count))
        index = (edges[:-1] + (uniform * sizes).long()).to(chosen.device)  # among the classes not chosen
        return skip(chosen, index), sizes.to(chosen.device)


def skip(left_out, index):
    """The numbers at each index (…, R) among those from 0 on without some (…, N), which ascend."""
    before = torch.arange(left_out.shape[-1], device=index.device)
    return index + torch.searchsorted(left_out - before, index, right=True)


def budget(cfg, num_classes):
    """M of a Config: --active-classes as a number of classes; UserError where the classes or the batch forbid it."""
    active = number_of_classes(cfg.active_classes, num_classes)
    needed = min(cfg.global_batch, num_classes)
    if active < needed:
        raise UserError(f"--active-classes {cfg.active_classes:g} is {active} of {num_classes} classes, but a batch of "
                        f"{cfg.global_batch} can have {needed} different ones: take at least {needed}, or a smaller "
                        "--global-batch")
    return active


def number_of_classes(given, num_classes):
    """--active-classes, a share of all classes up to 1 or a number of them, as a number; UserError if it is neither."""
    if given > 1 and given != int(given):
        raise UserError(f"--active-classes {given} is not allowed: give a share of the classes above 0 and up to 1, or "
                        "a whole number of classes")
    active = int(given) if given > 1 else max(1, math.ceil(round(given * num_classes, 6)))
    if active > num_classes:
        raise UserError(f"--active-classes {active} is more than the {num_classes} classes: take fewer, or --head full")
    return active
