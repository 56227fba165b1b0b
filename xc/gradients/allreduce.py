"""The dense exchange: sums the backbone's gradients over all ranks during the backward pass."""

import weakref
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from xc.optim.loss_scale import LossScale

SKETCH_SIZE = 2**15  # numbers in the sketch of a gradient


class AllReduce:
    """Sums the gradients of the backbone over all ranks, bucket by bucket, during the backward pass.

    The gradients of a bucket lie in one flat tensor. Every parameter's .grad is a view of it. When the last gradient of
    a bucket is complete, Horovod gets the whole tensor. The buckets are fixed. Their order is the reverse of the
    parameters', which is about the order in which gradients appear. So sums have the same bits in every run. Horovod's
    own fusion groups tensors by their arrival, so its sums may differ.

    The calls of a step: the backward passes, with `before_last_backward` before the last one; `reduce`; the optimizers;
    `zero_grad`.

    noise_seed  None, or a number that was set before a step of several micro-batches. `norms` then gives the squared
                norms of the gradient of the first micro-batch and of the whole step

    These are norms of sums over all ranks, and no rank may hold the whole sum. So each rank makes a sketch: it cuts its
    gradient into rows of 2^15 numbers and adds them with random signs. The sketches are summed over the ranks. The
    squared norm of a sketch is unbiased and off by about 1 % (Alon, Matias and Szegedy 1996). Norms of each rank's own
    gradient would be wrong: FeatureNorm uses the global batch, so large parts of the ranks' gradients cancel.
    """

    keeps_momentum = False  # whether the exchange applies momentum to parameters with two or more dimensions

    def __init__(self, backbone, world, bucket_mb=4.0, bits=32, loss_scale=None):
        """bucket_mb: MiB of a bucket. bits: of each number sent; 16 is float16. loss_scale: LossScale of the step."""
        self.world, self.bits, self.loss_scale = world, bits, loss_scale or LossScale()
        self.noise_seed, self._sketches = None, {}
        self._buffers_differ = False  # whether the ranks have different buffers
        self._backbone, self._buckets = backbone, []
        self._frozen = set(frozen_buffers(backbone))  # a mean over the ranks would round them
        self._make_buckets([p for p in reversed(list(backbone.parameters())) if p.requires_grad], bucket_mb * 2**20)

    def _make_buckets(self, parameters, max_bytes):
        for members in fill_buckets(parameters, max_bytes):
            self._buckets.append(DenseBucket(members, f"backbone.{len(self._buckets)}", self))

    def after_first_backward(self):
        """To be called after the backward pass of the first of several micro-batches."""
        if self.noise_seed is not None:
            for bucket in self._buckets:
                self._sketch("first", bucket, self.loss_scale.scale)

    def before_last_backward(self, plan):
        """To be called before the last backward pass of a step. Complete buckets are sent from now on."""
        self._buffers_differ = True
        for bucket in self._buckets:
            bucket.before_last_backward(plan)

    def reduce(self):
        """Wait until every .grad of the backbone is the sum over all ranks. Collective.

        returns  whether all sums are finite; the same on all ranks. If not, no rank may use them. Sums are only checked
                 if the loss is scaled
        """
        self._exchange()
        if not self.loss_scale.active:
            return True
        for bucket in self._buckets:
            bucket.flat.div_(self.loss_scale.scale)
        return self._all_finite()

    def _exchange(self):
        for bucket in self._buckets:
            bucket.launch()  # a parameter without a gradient may have held the bucket back
        for bucket in self._buckets:
            bucket.finish()

    def _all_finite(self):
        return all(bool(bucket.flat.isfinite().all()) for bucket in self._buckets)

    def on_bucket_ready(self, bucket):
        """Called when the gradients of a bucket are complete on this rank, and before they are sent."""
        if "first" in self._sketches:
            self._sketch("all", bucket, self.loss_scale.scale)

    def _sketch(self, name, bucket, scale):
        if name not in self._sketches:
            self._sketches[name] = bucket.flat.new_zeros(SKETCH_SIZE)
        sketch, rows = self._sketches[name], bucket.flat.split(SKETCH_SIZE)
        random = np.random.default_rng([self.noise_seed, self._buckets.index(bucket)])  # the same on all ranks
        signs = torch.from_numpy(random.integers(2, size=2 * SKETCH_SIZE) * 2 - 1).to(bucket.flat)
        for row, first in zip(rows, random.integers(SKETCH_SIZE, size=len(rows)).tolist(), strict=True):
            sketch[: len(row)].addcmul_(row, signs[first : first + len(row)], value=1 / scale)

    def norms(self, plan):
        """What NoiseScale.measure needs; the same on all ranks. None without `noise_seed` or with one micro-batch.

        returns  |mean gradient of the first micro-batch|², 1 / its examples, |mean gradient of the step|², 1 / G

        Collective.
        """
        if "all" not in self._sketches:
            return None
        sums = torch.stack([self._sketches["first"], self._sketches["all"]])
        first, whole = self.world.all_ranks.all_reduce(sums).double().square().sum(1).tolist()
        return first * plan.micro_batches**2, plan.micro_batches / plan.global_batch, whole, 1 / plan.global_batch

    def average_buffers(self):
        """Average the buffers over the ranks: batch-norm statistics of each rank's own examples. Collective."""
        buffers = self._own_buffers()
        for name, mean in self.mean_buffers().items():
            buffers[name].copy_(mean)
        self._buffers_differ = False

    def mean_buffers(self):
        """{name: mean of the buffer over the ranks}; empty if all ranks have the same buffers. Collective."""
        buffers = self._own_buffers() if self._buffers_differ else {}
        return {name: self.world.all_ranks.all_reduce(buffer.clone()).div_(self.world.size)
                for name, buffer in buffers.items()}

    def _own_buffers(self):
        return {name: buffer for name, buffer in self._backbone.named_buffers()
                if buffer.is_floating_point() and name not in self._frozen}

    def zero_grad(self):
        """Set all gradients to zero, for the next step."""
        self._sketches = {}
        for bucket in self._buckets:
            bucket.flat.zero_()

    def files(self):
        """{file name: {name: tensor}}: the state that this rank alone has, for a checkpoint. Unsent gradients, and
        buffers if ranks have different ones."""
        buffers = self._own_buffers()
        if not buffers or not self._buffers_differ or self.world.size == 1:
            return {}
        return {f"buffers-{self.world.rank:06d}.safetensors": buffers}

    def load(self, folder):
        """Read the files of a checkpoint of any number of ranks. ValueError for another exchange. Not collective."""
        if residual_files(folder):
            raise ValueError("it holds unsent gradients: resume with the --exchange that it was written with")
        self._load_buffers(folder)

    def _load_buffers(self, folder):
        """Load this rank's own buffers if as many ranks wrote them. If not, the backbone keeps their mean."""
        paths = sorted(Path(folder).glob("buffers-*.safetensors"))
        self._buffers_differ = len(paths) == self.world.size
        renamed, own = getattr(self._backbone, "renamed", dict), self._own_buffers()
        for name, buffer in renamed(load_file(paths[self.world.rank])).items() if self._buffers_differ else ():
            if name in own:  # else it was frozen since
                own[name].copy_(buffer)


def frozen_buffers(backbone):
    """Names of the buffers of modules that have parameters, none of which is trained."""
    for prefix, module in backbone.named_modules():
        parameters = list(module.parameters(recurse=False))
        if parameters and not any(p.requires_grad for p in parameters):
            yield from (f"{prefix}.{name}" for name, _ in module.named_buffers(recurse=False))


def residual_files(folder):
    """Paths of the files with unsent gradients in a checkpoint."""
    return sorted(Path(folder).glob("residuals-*-*.safetensors"))


class Bucket:
    """Parameters whose gradients are exchanged together.

    flat     (N,)  their gradients; every parameter's .grad is a view of it
    missing  number of parameters whose gradient of the last backward pass is not there yet
    """

    def __init__(self, parameters, flat=None):
        """flat: zeros; None for new ones"""
        sizes = [p.numel() for p in parameters]
        if flat is None:
            flat = torch.zeros(sum(sizes), dtype=parameters[0].dtype, device=parameters[0].device)
        self.flat = flat
        self._num_parameters = len(parameters)
        self._reset()
        on_gradient = weakref.WeakMethod(self._on_gradient)  # weak, since gc cannot free cycles through autograd

        def hook(parameter):
            if method := on_gradient():
                method()

        for parameter, piece in zip(parameters, self.flat.split(sizes), strict=True):
            parameter.grad = piece.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(hook)

    def before_last_backward(self, plan):
        self._last_backward = True

    def _on_gradient(self):
        if self._last_backward:
            self.missing -= 1
            if not self.missing:
                self._on_complete()

    def _reset(self):
        self.missing, self._last_backward, self._wait = self._num_parameters, False, None


class DenseBucket(Bucket):
    """A bucket that is summed over all ranks as it is."""

    def __init__(self, parameters, name, exchange):
        super().__init__(parameters)
        self._name, self._exchange = name, exchange

    def _on_complete(self):
        self.launch()

    def launch(self):
        """Begin the sum, unless it was begun."""
        if self._wait is None:
            self._exchange.on_bucket_ready(self)
            out = self.flat.half() if self._exchange.bits == 16 else self.flat
            self._wait = self._exchange.world.all_reduce_async(out, self._name)

    def finish(self):
        """Wait for the sum."""
        total = self._wait()
        if total is not self.flat:
            self.flat.copy_(total)
        self._reset()


def fill_buckets(parameters, max_bytes):
    """Yield lists of consecutive parameters of one type, each of at most max_bytes or of one parameter."""
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
