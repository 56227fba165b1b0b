"""MACH: R hashes of the classes into M buckets, and R softmaxes over buckets (Medini et al. 2019)."""

import torch

from xc.comm.autograd import group_logsumexp
from xc.comm.shard import Shard
from xc.errors import UserError
from xc.model.head import Head, ShardedSoftmax
from xc.model.sampled import share_of

_PRIME = 2**31 - 1  # of the hashes; above the number of classes, and its products fit int64


class MachHead(Head):
    """Class c is bucket h_r(c) of repetition r; it is predicted by the mean over r of the buckets' probabilities.

    Each repetition is a full softmax over its buckets, split over the shard group like any other. A class has no row
    of its own, so R M rows do for any number of classes, and classes that share all R buckets cannot be told apart.

    weight  (S, R D)  rows of this shard's buckets, those of the R repetitions side by side
    """

    flags = ("active_classes", "repetitions")

    def __init__(self, num_classes, feature_dim, world, *, buckets, repetitions=4, seed=0, **kwargs):
        super().__init__(buckets, feature_dim, world, seed=seed, **kwargs)
        self.num_classes = num_classes
        self.rows_are = f"buckets of {repetitions} hashes"
        self.parts = [Head(buckets, feature_dim, world, seed=(seed * 1009 + r) % 2**32, **kwargs)
                      for r in range(repetitions)]
        self.weight = torch.cat([part.weight for part in self.parts], 1)
        for part, own in zip(self.parts, self.weight.split(feature_dim, 1), strict=True):
            part.weight = own
        generator = torch.Generator().manual_seed(seed)
        a = torch.randint(1, _PRIME, (repetitions,), generator=generator)
        b = torch.randint(0, _PRIME, (repetitions,), generator=generator)
        self._hashes = list(zip(a.tolist(), b.tolist(), strict=True))

    @classmethod
    def settings(cls, cfg, num_classes):
        buckets = share_of(cfg.active_classes, num_classes) // cfg.repetitions
        if buckets < 2:
            raise UserError(f"--repetitions {cfg.repetitions} leave {buckets} buckets each of --active-classes "
                            f"{cfg.active_classes:g}: take fewer repetitions or more active classes")
        return {"buckets": buckets, "repetitions": cfg.repetitions}

    def buckets(self, classes):
        """(R, N) buckets of classes (N,)."""
        return torch.stack([(a * classes + b) % _PRIME % self.num_rows for a, b in self._hashes])

    def loss(self, features, labels, global_batch, last=True):
        """As of `Head`; the mean over the repetitions. Every bucket row gets its own softmax's gradient."""
        losses = [ShardedSoftmax.apply(features, *of_part, global_batch, last)
                  for of_part in zip(self.buckets(labels), self.parts, strict=True)]
        return torch.stack(losses).mean()

    def reduce_async(self):
        for part in self.parts:
            part.reduce_async()

    def reduce(self):
        for part in self.parts:
            part.reduce()
        self.row_grad = torch.cat([part.row_grad for part in self.parts], 1)

    def zero_grad(self):
        self.row_grad = None
        for part in self.parts:
            part.zero_grad()

    @torch.no_grad()
    def label_places(self, features, labels):
        group = self.world.shards
        features, labels, mine = self._gathered(features, labels)
        bucket_counts = [len(Shard.of(self.num_rows, group.size, rank)) for rank in range(group.size)]
        probabilities = []  # (M, G) of every repetition
        for part in self.parts:
            logits = part.scale * part._unit(part.weight) @ features.T  # (S, G)
            own = (logits - group_logsumexp(logits.logsumexp(0), group)).exp_()
            probabilities.append(group.all_gather(own, bucket_counts))

        def scores(classes):
            return sum(p[of_part] for p, of_part in zip(probabilities, self.buckets(classes), strict=True))  # (N, G)

        right = scores(labels).diagonal()
        places = torch.zeros_like(labels)
        classes = Shard.of(self.num_classes, group.size, group.rank)
        for block in self.parts[0].blocks(len(classes), len(labels)):
            ids = torch.arange(block.start, block.stop, device=labels.device)[:, None] + classes.first  # (block, 1)
            found = scores(ids[:, 0])
            behind = (found < right) | ((found == right) & (ids > labels))  # which no nan is
            places += (~behind & (ids != labels)).sum(0)
        return group.all_reduce(places)[mine]

    def audit(self, features, labels):
        return {"active": self.num_rows * len(self.parts)}
