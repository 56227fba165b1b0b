"""The backbone's gradients between ranks: dense, or the largest alone (DGC)."""

import weakref
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from xc.optim.loss_scale import LossScale

_SKETCH = 2**15  # numbers of a gradient's sketch


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
        for members in fill_buckets(parameters, max_bytes):
            self._buckets.append(DenseBucket(members, f"backbone.{len(self._buckets)}", self))

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
        if residual_files(folder):
            raise ValueError("it holds gradients yet to be sent: go on with the --exchange that it was made with")
        self._load_buffers(folder)

    def _load_buffers(self, folder):
        """This rank's own, where as many ranks had some; or else the backbone has their mean."""
        paths = sorted(Path(folder).glob("buffers-*.safetensors"))
        self._buffers_differ = len(paths) == self.world.size
        for name, buffer in load_file(paths[self.world.rank]).items() if self._buffers_differ else ():
            self._own_buffers()[name].copy_(buffer)


def residual_files(folder):
    return sorted(Path(folder).glob("residuals-*-*.safetensors"))


class Bucket:
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


class DenseBucket(Bucket):
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


def fill_buckets(parameters, max_bytes):
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
