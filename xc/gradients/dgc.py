"""Deep gradient compression: each rank sends only the largest of its accumulated gradients.

Wire format: each rank sends one message for each bucket: an int32 buffer with the indices of the k values, then the k
values. `pack` writes it and `unpack` reads it, both in topk.py. An all-gather brings the messages to all ranks. All of
them have the same k, so a message needs no header.
"""

import math

import torch
from safetensors import safe_open

from xc.comm.groups import Group
from xc.comm.shard import Shard
from xc.comm.traffic import sent_all_gather, sent_all_reduce
from xc.gradients.allreduce import AllReduce, Bucket, fill_buckets, residual_files
from xc.gradients.topk import message_bytes, pack, topk_indices, unpack

_BUCKET_BYTES = 2**18  # smaller layers share a bucket: one selection and one message


class Dgc(AllReduce):
    """Deep gradient compression (Lin et al. 2018), without gradient clipping and without Nesterov momentum.

    Each rank keeps a momentum u and a residual v for every bucket. With g the rank's gradient and m the factor:

        u ← m u + g                                     momentum correction
        v ← v + u                                       residual
        send the k largest |v|; there v ← 0 and u ← 0   momentum factor masking

    The sum of what all ranks sent replaces the gradient. k is the density of the StepPlan times the size of the bucket.
    The density falls during a warm-up. With 16 bits, values are sent as bfloat16 and v keeps the rounding error. Law:
    the sum of all u so far is what was sent plus the residuals.

    A bucket is a layer; layers below 256 KiB share one. Two kinds of tensors are summed dense:

    - those of fewer than two dimensions. The optimizer applies their momentum.
    - buckets whose sparse messages would not be smaller, above a density of about 1/W. Their u is not masked. So with
      density 1, or on one rank, all numbers are those of the dense exchange with momentum and without weight decay.
      Weight decay is not accumulated here, see optim/optimizers.py.

    momentum   the factor m
    two_level  sum gradients dense inside each host first. Each rank of a host then selects in its own part of every
               bucket, and only these messages travel between hosts
    """

    keeps_momentum = True

    def __init__(self, backbone, world, bucket_mb=4.0, bits=32, loss_scale=None, *, momentum=0.9, two_level=False):
        self.momentum = momentum
        self.inner, self.outer = (world.host, world.cross_host) if two_level else (Group(), world.all_ranks)
        self.sparse_buckets = []
        super().__init__(backbone, world, bucket_mb, bits, loss_scale)

    def _make_buckets(self, parameters, max_bytes):
        super()._make_buckets([p for p in parameters if p.dim() <= 1], max_bytes)
        first = 0
        for members in fill_buckets([p for p in parameters if p.dim() > 1], _BUCKET_BYTES):
            self.sparse_buckets.append(SparseBucket(members, first, self))
            first = self.sparse_buckets[-1].last
        self._buckets += self.sparse_buckets

    def launch_in_order(self):
        """Begin the exchange of all complete buckets up to the first incomplete one.

        The collectives of a group must begin in the same order on every rank. With two levels, a bucket is selected
        while the next one is summed inside the host.
        """
        before = None
        for bucket in self.sparse_buckets:
            if bucket.missing:
                return
            bucket.launch()
            if self.inner.size == 1:
                bucket.select()
            elif before:
                before.select()
            before = bucket

    def before_last_backward(self, plan):
        self._plan, self._buffers_differ = plan, True
        if not self.loss_scale.active:
            super().before_last_backward(plan)

    def reduce(self):
        if self.loss_scale.active:  # nothing was sent yet: if any rank overflowed, no rank may change its residuals
            for bucket in self._buckets:
                bucket.flat.div_(self.loss_scale.scale)
            overflow = torch.tensor([not self._all_finite()], dtype=torch.int32, device=self.world.device)
            if self.world.all_ranks.all_reduce(overflow, "max").item():
                return False
            super().before_last_backward(self._plan)
        self._exchange()
        return True

    def _exchange(self):
        for bucket in self.sparse_buckets:
            bucket.launch()
        for bucket in self.sparse_buckets:
            bucket.select()
        super()._exchange()

    def on_bucket_ready(self, bucket):
        if "first" in self._sketches:
            self._sketch("all", bucket, 1.0)  # `reduce` has divided its gradients by the loss scale already

    def files(self):
        tables = {f"{name}.{bucket.first + bucket.part.first}": rows
                  for bucket in self.sparse_buckets for name, rows in bucket.unsent.items()}
        return super().files() | {f"residuals-{self.outer.rank:06d}-{self.inner.rank:06d}.safetensors": tables}

    def load(self, folder):
        """Read the files of a checkpoint of any number W' of ranks. Rank r mod W adds what rank r of W' had.

        ValueError for the files of another exchange. Not collective.
        """
        if not residual_files(folder):
            raise ValueError("it holds no residuals of DGC: resume with the --exchange that it was written with")
        for bucket in self.sparse_buckets:
            for rows in bucket.unsent.values():
                rows.fill_(-0.0)  # -0 + x has the bits of x for every x, 0 + x has not
        for path in residual_files(folder):
            if int(path.stem.split("-")[1]) % self.outer.size == self.outer.rank:
                with safe_open(path, "pt") as file:
                    self._add_residuals(file)
        self._load_buffers(folder)

    def _add_residuals(self, file):
        for key in file.keys():
            name, first = key.split(".")
            saved, first = file.get_slice(key), int(first)
            last = first + saved.get_shape()[0]
            for bucket in self.sparse_buckets:
                mine = Shard(bucket.first + bucket.part.first, bucket.first + bucket.part.last)
                start, stop = max(first, mine.first), min(last, mine.last)
                if start < stop:
                    bucket.unsent[name][start - mine.first : stop - mine.first] += saved[start - first : stop - first]


class SparseBucket(Bucket):
    """Layers that share a selection and a message.

    first, last  range of the bucket among all sparse parameters, laid end to end
    part         the Shard of `flat` in which this rank selects: all of it, or one part for each rank of the host
    unsent       {"u": momentum (n,), "v": residual (n,)} of that part. Checkpoints use the same names
    """

    def __init__(self, parameters, first, dgc):
        super().__init__(parameters)
        self.first, self.last, self._dgc = first, first + len(self.flat), dgc
        self._parts = [Shard.of(len(self.flat), dgc.inner.size, rank) for rank in range(dgc.inner.size)]
        self.part = self._parts[dgc.inner.rank]
        self.unsent = {name: torch.zeros_like(self.flat[: len(self.part)]) for name in "uv"}
        self._sums = self._messages = None

    def before_last_backward(self, plan):
        super().before_last_backward(plan)
        self.density = plan.density

    def _on_complete(self):
        self._dgc.launch_in_order()

    def _num_sent(self, part):
        """k, the number of values sent of a part; None if a dense sum sends no more bytes."""
        longest, size = len(self._parts[0]), self._dgc.outer.size  # the longest part decides for all parts
        k = math.ceil(self.density * longest)
        sparse = sent_all_gather(size, message_bytes(k, self._dgc.bits))
        return None if k >= longest or sparse >= sent_all_reduce(size, 4 * longest) else min(k, len(part))

    def launch(self):
        """Begin the sum inside the host, unless it was begun."""
        if self._wait is None:
            self._dgc.on_bucket_ready(self)
            self._wait = self._dgc.inner.reduce_scatter_async(self.flat, [len(part) for part in self._parts])

    def select(self):
        """Add the gradient to momentum and residual, and begin to send the largest residuals, unless that was begun."""
        if self._sums is not None or self._messages is not None:
            return
        dgc, grad, momentum, residual = self._dgc, self._wait(), self.unsent["u"], self.unsent["v"]
        momentum.mul_(dgc.momentum).add_(grad)
        residual.add_(momentum)
        k = self._num_sent(self.part)
        if k is None:
            self._sums = dgc.outer.all_reduce_async(residual.clone())
            residual.zero_()
            return
        indices = topk_indices(residual, k)
        message, sent = pack(residual[indices], indices, dgc.bits)
        residual[indices] -= sent
        momentum[indices] = 0
        self._messages = dgc.outer.all_gather_async(message)

    def finish(self):
        """Wait for the messages of all ranks and sum them into `flat`."""
        inner, outer = self._dgc.inner, self._dgc.outer
        if self._sums:
            self.flat.copy_(inner.all_gather(self._sums(), [len(part) for part in self._parts]))
        else:
            ks = [self._num_sent(part) for part in self._parts]
            sizes = [message_bytes(k, self._dgc.bits) // 4 for k in ks]
            messages = inner.all_gather(self._messages(), [outer.size * size for size in sizes])
            self.flat.zero_()
            by_part = messages.split([outer.size * size for size in sizes])
            for part, k, part_messages in zip(self._parts, ks, by_part, strict=True):
                for message in part_messages.chunk(outer.size):
                    values, indices = unpack(message, k, self._dgc.bits)
                    self.flat[part.first : part.last].index_add_(0, indices, values)
        self._sums = self._messages = None
        self._reset()
