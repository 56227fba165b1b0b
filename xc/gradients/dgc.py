"""Deep gradient compression: each rank sends only the largest of its accumulated gradients."""

import torch

from xc.comm.shard import Shard
from xc.errors import UserError
from xc.gradients import sparse_sum
from xc.gradients.allreduce import Bucket, fill_buckets
from xc.gradients.error_feedback import ErrorFeedback
from xc.gradients.topk import unpack

_BUCKET_BYTES = 2**18  # smaller layers share a bucket and a selection


class Dgc(ErrorFeedback):
    """Deep gradient compression (Lin et al. 2018), without gradient clipping and without Nesterov momentum.

    Each rank keeps a momentum u and a residual v for every bucket. With g the rank's gradient and m the factor:

        u ← m u + g                                     momentum correction
        v ← v + u                                       residual
        send the k largest |v|; there v ← 0 and u ← 0   momentum factor masking

    The sum of what was sent replaces the gradient. k is the density of the StepPlan times the size of the bucket. The
    density falls during a warm-up. Numbers are sent to the ranks that own them, and the owners send the largest sums to
    all (sparse_sum.py); Lin et al. send all numbers to all ranks. With 16 bits, values are sent as bfloat16 and v keeps
    the rounding error. Law: the sum of all u so far is what was delivered plus the residuals.

    A bucket is a layer; layers below 256 KiB share one. Two kinds of tensors are summed dense:

    - those of fewer than two dimensions. The optimizer applies their momentum.
    - buckets whose sparse messages would not be smaller. Their u is not masked. So with density 1, or on one rank, all
      numbers are those of the dense exchange with momentum and without weight decay. Weight decay is not accumulated
      here, see optim/optimizers.py.

    momentum   the factor m
    two_level  sum gradients dense inside each host first. Each rank of a host then selects in its own part of every
               bucket, and only these messages travel between hosts
    """

    keeps_momentum = True
    unsent_names = "uv"

    def __init__(self, backbone, world, bucket_mb=4.0, bits=32, loss_scale=None, *, momentum=0.9, two_level=False):
        self.momentum, self._density, self._rounds = momentum, None, []
        super().__init__(backbone, world, bucket_mb, bits, loss_scale, two_level)

    def _make_buckets(self, parameters, max_bytes):
        super()._make_buckets([p for p in parameters if p.dim() <= 1], max_bytes)
        members = list(fill_buckets([p for p in parameters if p.dim() > 1], _BUCKET_BYTES))
        numbers = sum(p.numel() for bucket in members for p in bucket) + self.outer.size  # see Unsent
        if numbers >= 2**31:
            raise UserError(f"--exchange dgc has indices of 31 bits, too few for a backbone of {numbers:,} numbers: "
                            "give --exchange dense or powersgd")
        self._flat = torch.zeros(numbers, device=self.world.device)
        first = 0
        for bucket in members:
            self.compressed.append(SparseBucket(bucket, first, self, self._flat))
            first = self.compressed[-1].last
        self._buckets += self.compressed

    def before_last_backward(self, plan):
        if plan.density != self._density:
            self._density, size = plan.density, self.outer.size
            pieces = sparse_sum.cut([bucket.longest for bucket in self.compressed], plan.density, size, self.bits)
            self._rounds = []
            for bucket in self.compressed:
                bucket.round = None
            for indices in sparse_sum.rounds(pieces, self.bits):
                buckets = [self.compressed[i] for i in indices]
                of_buckets = [(bucket.table, pieces[i]) for bucket, i in zip(buckets, indices, strict=True)]
                self._rounds.append(sparse_sum.Round(self.outer, of_buckets, self.bits))
                for bucket in buckets:
                    bucket.round = self._rounds[-1]
        super().before_last_backward(plan)

    def launch_in_order(self):
        """Begin the exchange of all complete buckets up to the first incomplete one.

        The collectives of a group must begin in the same order on every rank. With two levels, a bucket is selected
        while the next one is summed inside the host.
        """
        before = None
        for bucket in self.compressed:
            if bucket.missing:
                return
            bucket.launch()
            if self.inner.size == 1:
                bucket.select()
            elif before:
                before.select()
            before = bucket

    def _exchange(self):
        for bucket in self.compressed:
            bucket.launch()
        for bucket in self.compressed:
            bucket.select()
        for one in self._rounds:
            one.reduce()
        for bucket in self.compressed:
            if bucket.round:
                bucket.flat.zero_()
        for one in self._rounds:
            values, indices = unpack(self.inner.all_gather(one.finish()))
            self._flat.index_add_(0, indices, values)
        super()._exchange()


class SparseBucket(Bucket):
    """Layers that share a selection.

    first, last  range of the bucket among all sparse parameters, laid end to end
    part         the Shard of `flat` in which this rank selects: all of it, or one part for each rank of the host
    longest      numbers of the longest part
    unsent       {"u": momentum (n,), "v": residual (n,)} of that part
    round        the Round that its numbers travel with; None if it is summed dense
    """

    def __init__(self, parameters, first, dgc, flat):
        self.first, self.last, self._dgc = first, first + sum(p.numel() for p in parameters), dgc
        super().__init__(parameters, flat[first : self.last])
        self._parts = [Shard.of(len(self.flat), dgc.inner.size, rank) for rank in range(dgc.inner.size)]
        self.part, self.longest = self._parts[dgc.inner.rank], len(self._parts[0])
        self.table = sparse_sum.Unsent(first + self.part.first, self.longest, dgc.outer.size, self.flat)
        self.unsent = {"u": self.table.momentum[: len(self.part)], "v": self.table.residual[: len(self.part)]}
        self.round = self._sums = None
        self._selected = False

    def _on_complete(self):
        self._dgc.launch_in_order()

    def launch(self):
        """Begin the sum inside the host, unless it was begun."""
        if self._wait is None:
            self._dgc.on_bucket_ready(self)
            self._wait = self._dgc.inner.reduce_scatter_async(self.flat, [len(part) for part in self._parts])

    def select(self):
        """Add the gradient to momentum and residual, and select what is sent, unless that was done."""
        if self._selected:
            return
        self._selected, momentum, residual = True, self.unsent["u"], self.unsent["v"]
        momentum.mul_(self._dgc.momentum).add_(self._wait())
        residual.add_(momentum)
        if self.round:
            self.round.select()
        else:
            self._sums = self._dgc.outer.all_reduce_async(residual.clone())
            residual.zero_()

    def finish(self):
        """Wait for the sum, if it is dense."""
        if self._sums:
            self.flat.copy_(self._dgc.inner.all_gather(self._sums(), [len(part) for part in self._parts]))
        self._sums, self._selected = None, False
        self._reset()
