"""Deep gradient compression: of every layer only the largest sums of unsent gradients are sent.

The message of a layer is written and read by `pack` and `unpack` of topk.py: that is the wire format.
"""

import math

import torch
from safetensors import safe_open

from xc.comm.groups import Group
from xc.comm.shard import Shard
from xc.comm.traffic import sent_all_gather, sent_all_reduce
from xc.gradients.allreduce import AllReduce, Bucket, fill_buckets, residual_files
from xc.gradients.topk import message_bytes, pack, top_places, unpack

_GROUP_BYTES = 2**18  # smaller tensors share a selection and a message


class Dgc(AllReduce):
    """Deep gradient compression (Lin et al. 2018): only the largest sums of what was not yet sent are.

    Of every layer, g its local gradient, m the momentum, u and v kept on this rank:

        u ← m u + g          momentum correction; Nesterov: u ← m (u + g), and u + g in place of u below
        v ← v + u            residual
        the k places of the largest |v| are sent and summed over the ranks; there v ← 0, u ← 0 (factor masking)

    k is `now.density` of the layer, which falls during a warm-up. clip: g of a layer, or of layers taken together, is
    scaled to a norm of at most clip / sqrt(W). With 16 bits values travel as bfloat16, and v keeps what rounding took.
    What was given, the sum of all u, is what was delivered plus the residuals.

    Tensors of fewer than two dimensions are summed as they are, with the optimizer's momentum. So is a layer's u where
    the places would send no less than a dense sum, which is above a density of about 1/W: u is not masked then, and
    with density 1, or one rank, all numbers are those of the dense exchange with momentum (and without weight decay,
    which is not summed up here, see optim.py). Layers below 256 KB are taken together.

    two_level: gradients are summed inside a host first, dense; each of its ranks selects in its part of every layer,
    and only these messages travel between hosts.
    """

    keeps_momentum = True

    def __init__(self, backbone, world, bucket_mb=4.0, bits=32, loss_scale=None, *, momentum=0.9, nesterov=False,
                 clip=0.0, two_level=False):
        self.momentum, self.nesterov, self.clip = momentum, nesterov, clip
        self.inner, self.outer = (world.host, world.across) if two_level else (Group(), world.everyone)
        self._sparse = []
        super().__init__(backbone, world, bucket_mb, bits, loss_scale)

    def _make_buckets(self, parameters, max_bytes):
        super()._make_buckets([p for p in parameters if p.dim() <= 1], max_bytes)
        first = 0
        for members in fill_buckets([p for p in parameters if p.dim() > 1], _GROUP_BYTES):
            self._sparse.append(SparseBucket(members, first, self))
            first = self._sparse[-1].last
        self._buckets += self._sparse

    def launch_in_order(self):
        """Begin to exchange the layers that are complete and that all before them are: collectives of a group must
        begin in the same order on every rank. Between hosts a layer follows while the next one is summed inside."""
        before = None
        for bucket in self._sparse:
            if bucket.missing:
                return
            bucket.launch()
            if self.inner.size == 1:
                bucket.select()
            elif before:
                before.select()
            before = bucket

    def begin(self, now):
        self._now, self._buffers_differ = now, True
        if not self.loss_scale.active:
            super().begin(now)

    def reduce(self):
        if self.loss_scale.active:  # what overflowed on any rank must reach no residual: nothing left so far
            for bucket in self._buckets:
                bucket.flat.div_(self.loss_scale.scale)
            overflow = torch.tensor([not self._all_finite()], dtype=torch.int32, device=self.world.device)
            if self.world.everyone.all_reduce(overflow, "max").item():
                return False
            super().begin(self._now)
        self._exchange()
        return True

    def _exchange(self):
        for bucket in self._sparse:
            bucket.launch()
        for bucket in self._sparse:
            bucket.select()
        super()._exchange()

    def note(self, bucket):
        if "first" in self._sketches:
            self._sketch("all", bucket, 1.0)  # scaled back before anything left

    def files(self):
        tables = {f"{name}.{bucket.first + bucket.part.first}": rows
                  for bucket in self._sparse for name, rows in bucket.kept.items()}
        return super().files() | {f"residuals-{self.outer.rank:06d}-{self.inner.rank:06d}.safetensors": tables}

    def load(self, folder):
        """What rank r of W' kept goes to rank r mod W: residuals are summed, none is lost."""
        if not residual_files(folder):
            raise ValueError("it holds no gradients yet to be sent: go on with the --exchange that it was made with")
        for bucket in self._sparse:
            for rows in bucket.kept.values():
                rows.fill_(-0.0)  # to which any number is added without a change of a bit
        for path in residual_files(folder):
            if int(path.stem.split("-")[1]) % self.outer.size == self.outer.rank:
                with safe_open(path, "pt") as file:
                    self._add_kept(file)
        self._load_buffers(folder)

    def _add_kept(self, file):
        for key in file.keys():
            name, first = key.split(".")
            piece, first = file.get_slice(key), int(first)
            last = first + piece.get_shape()[0]
            for bucket in self._sparse:
                mine = Shard(bucket.first + bucket.part.first, bucket.first + bucket.part.last)
                start, stop = max(first, mine.first), min(last, mine.last)
                if start < stop:
                    bucket.kept[name][start - mine.first : stop - mine.first] += piece[start - first : stop - first]


class SparseBucket(Bucket):
    """kept  u and v (n,), of the part of `flat` that this rank selects in: all, or its part among those of its host

    first, last: where the bucket lies in all sparse parameters, laid end to end.
    """

    def __init__(self, parameters, first, dgc):
        super().__init__(parameters)
        self.first, self.last, self._dgc = first, first + len(self.flat), dgc
        self._parts = [Shard.of(len(self.flat), dgc.inner.size, rank) for rank in range(dgc.inner.size)]
        self.part = self._parts[dgc.inner.rank]
        self.kept = {name: torch.zeros_like(self.flat[: len(self.part)]) for name in "uv"}
        self._sums = self._messages = None

    def begin(self, now):
        super().begin(now)
        self.density = now.density

    def _complete(self):
        self._dgc.launch_in_order()

    def _num_sent(self, part):
        """k of a part, or None where a dense sum sends no more."""
        longest, size = len(self._parts[0]), self._dgc.outer.size  # all parts go the same way
        k = math.ceil(self.density * longest)
        sparse = sent_all_gather(size, message_bytes(k, self._dgc.bits))
        return None if k >= longest or sparse >= sent_all_reduce(size, 4 * longest) else min(k, len(part))

    def launch(self):
        if self._wait is None:
            self._dgc.note(self)
            if self._dgc.clip:
                most = self._dgc.clip * self._dgc.world.size**-0.5
                self.flat.mul_((most / self.flat.norm().clamp(min=1e-12)).clamp(max=1))
            self._wait = self._dgc.inner.reduce_scatter_async(self.flat, [len(part) for part in self._parts])

    def select(self):
        if self._sums or self._messages:
            return
        dgc, grad, u, v = self._dgc, self._wait(), self.kept["u"], self.kept["v"]
        u.mul_(dgc.momentum).add_(grad, alpha=dgc.momentum if dgc.nesterov else 1.0)
        v.add_(u)
        if dgc.nesterov:
            v.add_(grad)
        k = self._num_sent(self.part)
        if k is None:
            self._sums = dgc.outer.all_reduce_async(v.clone())
            v.zero_()
            return
        places = top_places(v, k)
        message, sent = pack(v[places], places, dgc.bits)
        v[places] -= sent
        u[places] = 0
        self._messages = dgc.outer.all_gather_async(message)

    def finish(self):
        inner, outer = self._dgc.inner, self._dgc.outer
        if self._sums:
            self.flat.copy_(inner.all_gather(self._sums(), [len(part) for part in self._parts]))
        else:
            ks = [self._num_sent(part) for part in self._parts]
            sizes = [message_bytes(k, self._dgc.bits) // 4 for k in ks]
            messages = inner.all_gather(self._messages(), [outer.size * size for size in sizes])
            self.flat.zero_()
            for part, k, of_part in zip(self._parts, ks, messages.split([outer.size * s for s in sizes]), strict=True):
                for message in of_part.chunk(outer.size):
                    values, places = unpack(message, k, self._dgc.bits)
                    self.flat[part.first : part.last].index_add_(0, places, values)
        self._sums = self._messages = None
        self._again()
