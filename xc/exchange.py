"""The backbone's gradients between ranks: dense, or the largest alone (DGC)."""

import math
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from xc.config import Config, UserError
from xc.loss_scale import LossScale
from xc.shard import Shard
from xc.topk import message_bytes, pack, top_places, unpack
from xc.traffic import sent_all_gather, sent_all_reduce
from xc.world import Group

_SKETCH = 2**15  # numbers of a gradient's sketch
_GROUP_BYTES = 2**18  # smaller tensors share a selection and a message


def build(backbone, world, cfg):
    """The exchange that a Config asks for; UserError where these ranks cannot have it. Not collective."""
    if cfg.exchange == "dense":
        for flag in ("density", "density_warmup", "dgc_clip") if world.rank == 0 else ():
            if getattr(cfg, flag) != getattr(Config, flag):
                print(f"warning: --{flag.replace('_', '-')} has no effect with --exchange dense", file=sys.stderr)
        return AllReduce(backbone, world, cfg.bucket_mb, cfg.gradient_bits, LossScale.of(cfg))
    if cfg.exchange == "dgc-hier" and world.across is None:
        raise UserError("--exchange dgc-hier needs as many ranks on every host: launch so, or take --exchange dgc")
    dgc = Dgc(backbone, world, cfg.bucket_mb, cfg.gradient_bits, LossScale.of(cfg), momentum=cfg.momentum,
              nesterov=bool(cfg.nesterov), clip=cfg.dgc_clip, two_level=cfg.exchange == "dgc-hier")
    if dgc.outer.size == 1 and world.rank == 0:
        print(f"warning: --exchange {cfg.exchange} has nothing to send sparse on one "
              f"{'rank' if world.size == 1 else 'host'}: all is dense", file=sys.stderr)
    return dgc


class AllReduce:
    """Sums the backbone's gradients over all ranks, bucket by bucket, while the backward pass goes on.

    The gradients of a bucket live in one flat tensor, of which every parameter's .grad is a view; when the last of
    them has been accumulated, the whole is handed to Horovod. Buckets are fixed when the exchange is made, in reverse
    order of the parameters, which is about the order in which gradients appear: the sums have the same bits in every
    run, which Horovod's own fusion, grouping by arrival, does not promise.

    Construct once; then per step: backward passes, of which the last comes after `begin`, `reduce`, optimizer step,
    `zero_grad`. In a step of several micro-batches before which `watched` was set to a number, `norms` tells those of
    the first one's gradient and of the whole.

    They are norms of sums over all ranks, of which no rank may ever hold the whole, so each rank adds up its gradient,
    cut into rows of 2^15 numbers, with random signs to one row, and these are summed over the ranks. Its norm is right
    on average, and about 1 % off (a sketch; Alon, Matias and Szegedy 1996). Norms of a rank's own gradient would not
    do: with a norm of the features over the global batch, much of it cancels between ranks.
    """

    keeps_momentum = False  # whether momentum is taken here, for parameters of two dimensions and more

    def __init__(self, backbone, world, bucket_mb=4.0, bits=32, loss_scale=None):
        """bits: of every number on the way, 16 are float16's. loss_scale: what backward passes begin with."""
        self.world, self.bits, self.loss_scale = world, bits, loss_scale or LossScale()
        self.watched, self._sketches = None, {}
        self._buffers_differ = False  # between ranks
        self._backbone, self._buckets = backbone, []
        self._make_buckets([p for p in reversed(list(backbone.parameters())) if p.requires_grad], bucket_mb * 2**20)

    def _make_buckets(self, parameters, max_bytes):
        for members in _fill_buckets(parameters, max_bytes):
            self._buckets.append(_DenseBucket(members, f"backbone.{len(self._buckets)}", self))

    def first_passed(self):
        """The backward pass of the first of several micro-batches is over."""
        if self.watched is not None:
            for bucket in self._buckets:
                self._sketch("first", bucket, self.loss_scale.scale)

    def begin(self, now):
        """The next backward pass is the last of the step `now` of the schedule: what it completes can leave."""
        self._buffers_differ = True
        for bucket in self._buckets:
            bucket.begin(now)

    def reduce(self):
        """Wait until every .grad of the backbone is the sum over all ranks. Returns whether all are finite, which is
        looked at where losses are scaled; where they are not, no rank may use them. Collective."""
        self._exchange()
        if not self.loss_scale.active:
            return True
        for bucket in self._buckets:
            bucket.flat.div_(self.loss_scale.scale)
        return self._all_finite()

    def _exchange(self):
        for bucket in self._buckets:
            bucket.launch()  # unless it is under way: some parameter took no part in the loss
        for bucket in self._buckets:
            bucket.finish()

    def _all_finite(self):
        return all(bool(bucket.flat.isfinite().all()) for bucket in self._buckets)

    def note(self, bucket):
        """Its gradients are complete on this rank, and yet to be changed."""
        if "first" in self._sketches:
            self._sketch("all", bucket, self.loss_scale.scale)

    def _sketch(self, name, bucket, scale):
        if name not in self._sketches:
            self._sketches[name] = bucket.flat.new_zeros(_SKETCH)
        total, rows = self._sketches[name], bucket.flat.split(_SKETCH)
        random = np.random.default_rng([self.watched, self._buckets.index(bucket)])  # the same on all ranks
        signs = torch.from_numpy(random.integers(2, size=2 * _SKETCH) * 2 - 1).to(bucket.flat)
        for row, first in zip(rows, random.integers(_SKETCH, size=len(rows)).tolist(), strict=True):
            total[: len(row)].addcmul_(row, signs[first : first + len(row)], value=1 / scale)

    def norms(self, now):
        """Squared norms of a watched step's gradients and one over the numbers of their examples: of the mean over the
        first micro-batch's, 1 / its examples, of the mean over all, 1 / all; the same on all ranks. None where there
        was one micro-batch only. Collective.
        """
        if "all" not in self._sketches:
            return None
        sums = torch.stack([self._sketches["first"], self._sketches["all"]])
        first, whole = self.world.everyone.all_reduce(sums).double().square().sum(1).tolist()
        return first * now.micro_batches**2, now.micro_batches / now.global_batch, whole, 1 / now.global_batch

    def average_buffers(self):
        """Make the buffers (batch-norm statistics, which every rank takes of its own examples) the same. Collective."""
        buffers = self._own_buffers()
        for name, mean in self.mean_buffers().items():
            buffers[name].copy_(mean)
        self._buffers_differ = False

    def mean_buffers(self):
        """{name: mean over the ranks} of the buffers, if they may differ. Collective."""
        buffers = self._own_buffers() if self._buffers_differ else {}
        return {name: self.world.everyone.all_reduce(buffer.clone()).div_(self.world.size)
                for name, buffer in buffers.items()}

    def _own_buffers(self):
        return {name: buffer for name, buffer in self._backbone.named_buffers() if buffer.is_floating_point()}

    def zero_grad(self):
        self._sketches = {}
        for bucket in self._buckets:
            bucket.flat.zero_()

    def files(self):
        """{file name: {name: tensor}} of what this rank has for itself, for a checkpoint: what it has yet to deliver,
        and its buffers since they were averaged."""
        buffers = self._own_buffers()
        if not buffers or not self._buffers_differ or self.world.size == 1:
            return {}
        return {f"buffers-{self.world.rank:06d}.safetensors": buffers}

    def load(self, folder):
        """Read what `files` had, on any number of ranks. Not collective; ValueError if it is another exchange's."""
        if _residuals(folder):
            raise ValueError("it holds gradients yet to be sent: go on with the --exchange that it was made with")
        self._load_buffers(folder)

    def _load_buffers(self, folder):
        """This rank's own, where as many ranks had some; or else the backbone has their mean."""
        paths = sorted(Path(folder).glob("buffers-*.safetensors"))
        self._buffers_differ = len(paths) == self.world.size
        for name, buffer in load_file(paths[self.world.rank]).items() if self._buffers_differ else ():
            self._own_buffers()[name].copy_(buffer)


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
        for members in _fill_buckets([p for p in parameters if p.dim() > 1], _GROUP_BYTES):
            self._sparse.append(_SparseBucket(members, first, self))
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
        if not _residuals(folder):
            raise ValueError("it holds no gradients yet to be sent: go on with the --exchange that it was made with")
        for bucket in self._sparse:
            for rows in bucket.kept.values():
                rows.fill_(-0.0)  # to which any number is added without a change of a bit
        for path in _residuals(folder):
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


def _residuals(folder):
    return sorted(Path(folder).glob("residuals-*-*.safetensors"))


class _Bucket:
    """Parameters whose gradients are exchanged together: views of `flat` (N,)."""

    def __init__(self, parameters):
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self._num_parameters = len(parameters)
        self.missing, self._last_pass, self._wait = len(parameters), False, None
        ready = weakref.WeakMethod(self._ready)  # or nothing would ever be freed: gc sees no cycles through autograd

        def hook(parameter):
            if method := ready():
                method(parameter)

        for parameter, piece in zip(parameters, self.flat.split(sizes), strict=True):
            parameter.grad = piece.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(hook)

    def begin(self, now):
        self._last_pass = True

    def _ready(self, parameter):
        if self._last_pass:
            self.missing -= 1
            if not self.missing:
                self._complete()

    def _again(self):
        self.missing, self._last_pass, self._wait = self._num_parameters, False, None


class _DenseBucket(_Bucket):
    def __init__(self, parameters, name, exchange):
        super().__init__(parameters)
        self._name, self._exchange = name, exchange

    def _complete(self):
        self.launch()

    def launch(self):
        if self._wait is None:
            self._exchange.note(self)
            out = self.flat.half() if self._exchange.bits == 16 else self.flat
            self._wait = self._exchange.world.all_reduce_async(out, self._name)

    def finish(self):
        total = self._wait()
        if total is not self.flat:
            self.flat.copy_(total)
        self._again()


class _SparseBucket(_Bucket):
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


def _fill_buckets(parameters, max_bytes):
    bucket, nbytes = [], 0
    for p in parameters:
        size = p.numel() * p.element_size()
        if bucket and (nbytes + size > max_bytes or p.dtype != bucket[0].dtype):
            yield bucket
            bucket, nbytes = [], 0
        bucket.append(p)
        nbytes += size
    if bucket:
        yield bucket
