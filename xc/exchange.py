"""The backbone's gradients between ranks."""

import torch


class AllReduce:
    """Sums the backbone's gradients over all ranks, bucket by bucket, while the backward pass goes on.

    The gradients of a bucket live in one flat tensor, of which every parameter's .grad is a view; when the last of
    them has been accumulated, the whole is handed to Horovod. Buckets are fixed when the exchange is made, in reverse
    order of the parameters, which is about the order in which gradients appear: the sums have the same bits in every
    run, which Horovod's own fusion, grouping by arrival, does not promise.

    Construct once; then per step: backward, `reduce`, optimizer step, `zero_grad`.
    """

    def __init__(self, backbone, world, bucket_mb=4.0):
        self.world = world
        self.sent_mb = 0.0  # handed to the network by this rank in the last step
        self._backbone, self._buckets = backbone, []
        parameters = [p for p in reversed(list(backbone.parameters())) if p.requires_grad]
        for members in _fill_buckets(parameters, bucket_mb * 2**20):
            self._buckets.append(_Bucket(members, f"backbone.{len(self._buckets)}", world))

    def reduce(self):
        """Wait until every .grad of the backbone is the sum over all ranks. Collective."""
        for bucket in self._buckets:
            bucket.wait()
        self.sent_mb = sum(b.flat.nbytes for b in self._buckets) / 2**20 if self.world.size > 1 else 0.0

    def average_buffers(self):
        """Make the buffers (batch-norm statistics, which every rank takes of its own examples) the same. Collective."""
        for buffer in self._backbone.buffers():
            if buffer.is_floating_point():
                self.world.everyone.all_reduce(buffer).div_(self.world.size)

    def zero_grad(self):
        for bucket in self._buckets:
            bucket.flat.zero_()


class _Bucket:
    def __init__(self, parameters, name, world):
        self.name, self.world, self.size = name, world, len(parameters)
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype,
                                device=parameters[0].device)
        self._missing, self._handle = self.size, None
        for parameter, piece in zip(parameters, self.flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = piece.view_as(parameter)
            parameter.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, parameter):
        self._missing -= 1
        if not self._missing:
            self._launch()

    def _launch(self):
        self._handle = self.world.all_reduce_async(self.flat, self.name)

    def wait(self):
        if self._handle is None:  # some parameter took no part in the loss, or this rank had no example
            self._launch()
        self.world.wait(self._handle)
        self._missing, self._handle = self.size, None


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
