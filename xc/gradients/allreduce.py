"""The backbone's gradients summed over all ranks, dense, while the backward pass goes on."""

import weakref
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from xc.optim.loss_scale import LossScale

_SKETCH = 2**15  # numbers of a gradient's sketch


class AllReduce:
    """Sums the gradients of the backbone over all ranks, bucket by bucket, while the backward pass goes on.

    The gradients of a bucket lie in one flat tensor, and every parameter's .grad is a view of it. When the last
    gradient of a bucket is complete, Horovod gets the whole tensor. The buckets are fixed, in the reverse order of the
    parameters, which is about the order in which gradients appear. So the sums have the same bits in every run.
    Horovod's own fusion groups by arrival and does not promise that.

    The calls of a step: backward passes, with `begin` before the last one, then `reduce`, the optimizers, `zero_grad`.

    Where `noise_seed` was set to a number before a step of several micro-batches, `norms` gives the squared norms of
    the first micro-batch's gradient and of the whole. These are norms of sums over all ranks, and no rank may hold the
    whole sum. So each rank cuts its gradient into rows of 2^15 numbers and adds them up with random signs; the results
    are summed over the ranks. The norm of this sketch is right on average, and off by about 1 % (Alon, Matias and
    Szegedy 1996). Norms of a rank's own gradient would be wrong: FeatureNorm uses the global batch, so much of a
    rank's gradient cancels between ranks.
    """

    keeps_momentum = False  # whether the exchange applies the momentum of parameters with two or more dimensions

    def __init__(self, backbone, world, bucket_mb=4.0, bits=32, loss_scale=None):
        """bits: of every number that is sent; 16 is float16. loss_scale: the LossScale of the backward passes."""
        self.world, self.bits, self.loss_scale = world, bits, loss_scale or LossScale()
        self.noise_seed, self._sketches = None, {}
        self._buffers_differ = False  # between ranks
        self._backbone, self._buckets = backbone, []
        self._make_buckets([p for p in reversed(list(backbone.parameters())) if p.requires_grad], bucket_mb * 2**20)

    def _make_buckets(self, parameters, max_bytes):
        for members in fill_buckets(parameters, max_bytes):
            self._buckets.append(DenseBucket(members, f"backbone.{len(self._buckets)}", self))

    def after_first_backward(self):
        """Called after the backward pass of the first of several micro-batches."""
        if self.noise_seed is not None:
            for bucket in self._buckets:
                self._sketch("first", bucket, self.loss_scale.scale)

    def begin(self, plan):
        """Called before the last backward pass of a step: complete buckets can be sent from now on."""
        self._buffers_differ = True
        for bucket in self._buckets:
            bucket.begin(plan)

    def reduce(self):
        """Wait until every .grad of the backbone is the sum over all ranks. Collective.

        returns  whether all sums are finite, the same on all ranks. Only looked at where losses are scaled; no rank may
                 use sums that are not
        """
        self._exchange()
        if not self.loss_scale.active:
            return True
        for bucket in self._buckets:
            bucket.flat.div_(self.loss_scale.scale)
        return self._all_finite()

    def _exchange(self):
        for bucket in self._buckets:
            bucket.launch()  # if it is not under way: a parameter without a gradient holds it back
        for bucket in self._buckets:
            bucket.finish()

    def _all_finite(self):
        return all(bool(bucket.flat.isfinite().all()) for bucket in self._buckets)

    def on_bucket_ready(self, bucket):
        """Called when the gradients of a bucket are complete on this rank and not yet changed."""
        if "first" in self._sketches:
            self._sketch("all", bucket, self.loss_scale.scale)

    def _sketch(self, name, bucket, scale):
        if name not in self._sketches:
            self._sketches[name] = bucket.flat.new_zeros(_SKETCH)
        total, rows = self._sketches[name], bucket.flat.split(_SKETCH)
        random = np.random.default_rng([self.noise_seed, self._buckets.index(bucket)])  # the same on all ranks
        signs = torch.from_numpy(random.integers(2, size=2 * _SKETCH) * 2 - 1).to(bucket.flat)
        for row, first in zip(rows, random.integers(_SKETCH, size=len(rows)).tolist(), strict=True):
            total[: len(row)].addcmul_(row, signs[first : first + len(row)], value=1 / scale)

    def norms(self, plan):
        """Squared norms for the noise scale, the same on all ranks; None without `noise_seed`, or with one micro-batch.

        returns  |mean gradient of the first micro-batch|², 1 / its examples, |mean gradient of all|², 1 / all examples

        Collective.
        """
        if "all" not in self._sketches:
            return None
        sums = torch.stack([self._sketches["first"], self._sketches["all"]])
        first, whole = self.world.all_ranks.all_reduce(sums).double().square().sum(1).tolist()
        return first * plan.micro_batches**2, plan.micro_batches / plan.global_batch, whole, 1 / plan.global_batch

    def average_buffers(self):
        """Average the buffers (batch-norm statistics of each rank's own examples) over the ranks. Collective."""
        buffers = self._own_buffers()
        for name, mean in self.mean_buffers().items():
            buffers[name].copy_(mean)
        self._buffers_differ = False

    def mean_buffers(self):
        """{name: mean over the ranks} of the buffers; empty where all ranks have the same. Collective."""
        buffers = self._own_buffers() if self._buffers_differ else {}
        return {name: self.world.all_ranks.all_reduce(buffer.clone()).div_(self.world.size)
                for name, buffer in buffers.items()}

    def _own_buffers(self):
        return {name: buffer for name, buffer in self._backbone.named_buffers() if buffer.is_floating_point()}

    def zero_grad(self):
        self._sketches = {}
        for bucket in self._buckets:
            bucket.flat.zero_()

    def files(self):
        """{file name: {name: tensor}}: this rank's own state for a checkpoint, unsent gradients and buffers that
        differ."""
        buffers = self._own_buffers()
        if not buffers or not self._buffers_differ or self.world.size == 1:
            return {}
        return {f"buffers-{self.world.rank:06d}.safetensors": buffers}

    def load(self, folder):
        """Read what `files` wrote on any number of ranks. ValueError for files of another exchange. Not collective."""
        if residual_files(folder):
            raise ValueError("it holds unsent gradients: resume with the --exchange that it was written with")
        self._load_buffers(folder)

    def _load_buffers(self, folder):
        """Load this rank's own buffers where as many ranks wrote some. Otherwise the backbone keeps their mean."""
        paths = sorted(Path(folder).glob("buffers-*.safetensors"))
        self._buffers_differ = len(paths) == self.world.size
        for name, buffer in load_file(paths[self.world.rank]).items() if self._buffers_differ else ():
            self._own_buffers()[name].copy_(buffer)


def residual_files(folder):
    return sorted(Path(folder).glob("residuals-*-*.safetensors"))


class Bucket:
    """Parameters whose gradients are exchanged together, as views of `flat` (N,)."""

    def __init__(self, parameters):
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self._num_parameters = len(parameters)
        self.missing, self._last_pass, self._wait = len(parameters), False, None
        ready = weakref.WeakMethod(self._ready)  # gc sees no cycles through autograd

        def hook(parameter):
            if method := ready():
                method(parameter)

        for parameter, piece in zip(parameters, self.flat.split(sizes), strict=True):
            parameter.grad = piece.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(hook)

    def begin(self, plan):
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
            self._exchange.on_bucket_ready(self)
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
