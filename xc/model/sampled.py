"""Softmax over a part of the classes: what the heads that leave classes out have in common."""

import math

import numpy as np
import torch

from xc.comm.shard import Shard
from xc.errors import UserError
from xc.model.head import Head

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2**64 over the golden ratio, as a signed number; products wrap


class SampledHead(Head):
    """Softmax over the right classes of a step, classes near them, and random others: a budget of M classes in all.

    Which classes of a shard are active, from `candidates` of a subclass:

    1. The quota of a shard is its near-equal part of M, the same every step. Where its right classes need more, it is
       raised for this step, with corrected padding to one class more than them.
    2. All right classes of the global batch, of all copies of the classifier.
    3. Near classes, at most `near_share` of what is left of the quota; too many: by best place, and of one place by a
       hash of id and step (ours: by id alone, neighbours of low ids would always take part and the others never).
    4. Random ones up to the quota: one from each of R equal stretches of the shard's other classes, drawn anew each
       step from (seed, step, shard).

    Places and hashes know nothing of shards, so the order in which classes are taken does not depend on the number of
    ranks; how many of it a shard takes (1), and the stretches (4), do.

    A step of several rounds chooses for each of them anew: the budget is for the examples of a round, so that an
    example's cost does not grow with the batch. The gradients of the rounds are added up over all their classes.

    Plain padding: a class that is left out counts as probability zero, so the loss is never above the full one.
    Corrected padding (ours): a random class stands for the n classes of its stretch, log n is added to its logit. Then
    the expected partition function is that of the full softmax; near classes count once, as themselves. It is the
    correction of sampled softmax (Bengio and Senecal 2003), for the far classes alone.
    """

    flags = ("active_classes", "padding", "warmup_full_steps")

    def __init__(self, *args, active_classes, padding="corrected", near_share=0.0, warmup_full_steps=0, **kwargs):
        """active_classes M; near_share 0 to 1; warmup_full_steps: first steps, in which all classes take part."""
        super().__init__(*args, **kwargs)
        self.corrected, self.near_share, self.warmup_full_steps = padding == "corrected", near_share, warmup_full_steps
        group = self.world.shards
        self.quota = len(Shard.of(active_classes, group.size, group.rank))

    @classmethod
    def settings(cls, cfg, num_classes):
        return {"active_classes": budget(cfg, num_classes), "padding": cfg.padding,
                "warmup_full_steps": cfg.warmup_full_steps}

    def select(self, labels, step, num_rounds=1):
        super().select(labels, step, num_rounds)
        self.active = self.offset = None
        self._chosen, self._all_active, self._total = [], labels.new_zeros(0), None
        if step >= self.warmup_full_steps:
            self.num_selections = num_rounds
            self.select_rounds(self.labels_of_rounds(labels, num_rounds))

    def select_rounds(self, labels):
        """Choose for every round. labels: [(G,), …]"""
        for i, of_round in enumerate(labels):
            self.choose(i, of_round, *self.candidates(of_round))
        self._all_active = torch.unique(torch.cat([active for active, _ in self._chosen]))

    def choose(self, selection, labels, candidates, places):
        """`activate` for that round of the step."""
        first = self.step
        self.step += selection
        self.activate(labels, candidates, places)
        self.step = first
        self._chosen.append((self.active, self.offset))

    def turn_to(self, selection):
        if self.num_selections > 1:
            self._add_up()
            self.rows_of_step = None
            if selection < len(self._chosen):
                self.active, self.offset = self._chosen[selection]

    def _add_up(self):
        """Add the row gradients of the selection that is over to those of the whole step."""
        if self.row_grad is None:
            return
        union = torch.unique(torch.cat([self._all_active, self.active]))
        if self._total is None:
            self._all_active, self._total = union, self.memory("total", len(union), self.feature_dim).zero_()
        elif len(union) > len(self._all_active):  # classes that are chosen by feature are not known before
            known, self._all_active = self._all_active, union
            total = self._total.new_zeros(len(union), self.feature_dim)
            self._total = total.index_copy_(0, torch.searchsorted(union, known), self._total)
        self._total.index_add_(0, torch.searchsorted(self._all_active, self.active), self.row_grad)
        self.row_grad = None

    def reduce_async(self):
        if self.num_selections > 1:
            self._add_up()
            self.active, self.offset, self.row_grad = self._all_active, None, self._total
        super().reduce_async()

    def zero_grad(self):
        super().zero_grad()
        if self.num_selections > 1:  # as `audit` looks at them: of the first examples
            self.active, self.offset = self._chosen[0]

    def labels_of_rounds(self, labels, num_rounds):
        """[labels (G,) of a round, …] over all copies: all must choose alike. Collective."""
        everyone = self.world.all_ranks
        if self.world.replicas.size == 1:
            counts, labels = self.gather_labels(labels)
        else:
            counts = self._counts(labels, everyone)
            labels = everyone.all_gather(labels, counts)
        pieces = labels.split([count // num_rounds for count in counts for _ in range(num_rounds)])
        return [torch.cat(pieces[i::num_rounds]) for i in range(num_rounds)]

    def candidates(self, labels):
        """Classes of this shard that are near the right ones: local ids (E,) and places (E,), the best place is 0.

        labels  (G,)  of the whole step

        A class may come several times, and may be a right one. Not collective.
        """
        none = labels.new_zeros(0)
        return none, none

    def activate(self, labels, candidates, places):
        """Set `active` and `offset` for a step: the rules of this class.

        labels              (G,)  of the whole step
        candidates, places  (E,)  as `candidates` returns them
        """
        num_rows = len(self.weight)
        right = torch.unique(labels[self.shard.owns(labels)] - self.shard.first)
        quota = max(self.quota, min(num_rows, len(right) + self.corrected))
        room = quota - len(right)
        keep_one = self.corrected and quota < num_rows  # random class, to stand for the others
        near = self._best(candidates, places, right, min(int(self.near_share * room), room - keep_one))
        chosen = torch.cat([right, near]).sort().values
        far, stands_for = self._random(chosen, quota - len(chosen))
        self.active, order = torch.cat([chosen, far]).sort()
        self.offset = None
        if self.corrected:
            offset = torch.cat([torch.zeros(len(chosen), device=far.device), stands_for.log()])
            self.offset = offset.to(self.compute_dtype)[order]

    def _best(self, candidates, places, right, count):
        """Up to `count` different candidates (N,) that are not right classes: by best place, then by hash.

        candidates, places  (E,)
        right               (N,)  local ids of the right classes, unique
        """
        candidates, which = torch.unique(candidates, return_inverse=True)
        best = torch.empty_like(candidates).scatter_reduce_(0, which, places, "amin", include_self=False)
        others = ~torch.isin(candidates, right, assume_unique=True)
        candidates, best = candidates[others], best[others]
        by_hash = _mix((candidates + self.shard.first) * _GOLDEN + self.step).sort().indices
        return candidates[by_hash][best[by_hash].sort(stable=True).indices[:count]]

    def _random(self, chosen, count):
        """One class from each of `count` stretches of the classes not chosen: ids (R,), sorted, and stretches' sizes.

        chosen  (N,)  sorted
        """
        others = len(self.weight) - len(chosen)
        edges = torch.arange(count + 1) * others // max(1, count)
        sizes = edges.diff()
        drawn = torch.from_numpy(np.random.default_rng([self.seed, self.step, self.shard.first]).random(count))
        rank = (edges[:-1] + (drawn * sizes).long()).to(chosen.device)  # among the classes not chosen
        before = torch.searchsorted(chosen - torch.arange(len(chosen), device=chosen.device), rank, right=True)
        return rank + before, sizes.to(chosen.device)


def _mix(x):
    """splitmix64's output function (Steele et al. 2014) of int64: numbers one apart become unrelated."""
    for shift, factor in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * (factor - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


def budget(cfg, num_classes):
    """M of a Config: --active-classes as a number of classes; UserError if it cannot be."""
    active = share_of(cfg.active_classes, num_classes)
    needed = min(cfg.global_batch, num_classes)
    if active < needed:
        raise UserError(f"--active-classes {cfg.active_classes:g} is {active} of {num_classes} classes, but a batch of "
                        f"{cfg.global_batch} can have {needed} different ones: take at least {needed}, or a smaller "
                        "--global-batch")
    return active


def share_of(given, num_classes):
    """A number of classes given as such, or as a share of all; UserError if it is neither."""
    if given > 1 and given != int(given):
        raise UserError(f"--active-classes {given} is not allowed: a share of the classes above 0 and up to 1, or a "
                        "whole number of classes")
    active = int(given) if given > 1 else max(1, math.ceil(round(given * num_classes, 6)))
    if active > num_classes:
        raise UserError(f"--active-classes {active} is more than the {num_classes} classes: take fewer, or --head full")
    return active
