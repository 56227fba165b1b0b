"""PowerSGD: the gradient of every layer is sent as the product of two narrow matrices."""

import math

import torch

from xc.comm.shard import Shard
from xc.gradients.allreduce import Bucket, fill_buckets
from xc.gradients.error_feedback import ErrorFeedback


class PowerSgd(ErrorFeedback):
    """Low-rank compression with error feedback and a warm start (Vogels et al. 2019, algorithms 1 and 2).

    A gradient is a matrix G (n, m): of a convolution, n output channels. Each rank keeps an error E (n, m); all have
    the same Q (m, r). In a step, with sums over the W ranks:

        E ← E + G        P = Σ E Q, made orthonormal        Q ← Σ Eᵀ P        delivered: P Qᵀ        E ← E - P Qᵀ / W

    Law: the sum of all gradients so far is what was delivered plus the errors of all ranks. What is delivered is the
    sum of E, projected onto P. The optimizer applies the momentum, so any optimizer may follow.

    Vectors are summed dense, and so are matrices whose P and Q are no smaller. P and Q are float32; `bits` is of what
    is summed dense. Ranks must compute alike: each of them makes P orthonormal.
    """

    unsent_names, shared_names = "e", "q"

    def __init__(self, backbone, world, bucket_mb=4.0, bits=32, loss_scale=None, *, rank=4):
        """rank: r"""
        self.low_rank = rank
        super().__init__(backbone, world, bucket_mb, bits, loss_scale)

    def _make_buckets(self, parameters, max_bytes):
        narrow = [p for p in parameters if numbers_sent(p.shape, self.low_rank)]
        among = set(narrow)
        super()._make_buckets([p for p in parameters if p not in among], max_bytes)
        first = 0
        for members in fill_buckets(narrow, max_bytes):
            self.compressed.append(LowRankBucket(members, first, self))
            first = self.compressed[-1].last
        self._buckets += self.compressed

    def _exchange(self):
        for bucket in self._buckets:
            bucket.launch()
        for bucket in self.compressed:
            bucket.launch_second()
        super()._exchange()

    def files(self):
        files = super().files()
        files[self.residual_file()] |= {f"q.{bucket.first}.{i}": layer.right for bucket in self.compressed
                                        for i, layer in enumerate(bucket.layers)}
        return files

    def _load_shared(self, file):
        for bucket in self.compressed:
            for i, layer in enumerate(bucket.layers):
                key = f"q.{bucket.first}.{i}"
                if key not in file.keys() or file.get_slice(key).get_shape() != list(layer.right.shape):
                    raise ValueError("it holds unsent gradients of another --exchange or --powersgd-rank: resume with "
                                     "those that it was written with")
                layer.right = file.get_tensor(key).to(layer.right.device)


class LowRankBucket(Bucket):
    """Layers whose P and Q are sent together.

    first, last  range of the bucket among all compressed parameters, laid end to end
    unsent       {"e": (N,)}, the errors
    layers       [Layer]
    """

    def __init__(self, parameters, first, exchange):
        super().__init__(parameters)
        self.first, self.last, self.part = first, first + len(self.flat), Shard(0, len(self.flat))
        self.unsent = {"e": torch.zeros_like(self.flat)}
        self._exchange, self._wait_second = exchange, None
        errors, sums = (flat.split([p.numel() for p in parameters]) for flat in (self.unsent["e"], self.flat))
        self.layers = [Layer(error.view(len(p), -1), total.view(len(p), -1), exchange.low_rank, first + i)
                       for i, (p, error, total) in enumerate(zip(parameters, errors, sums, strict=True))]

    def _on_complete(self):
        self.launch()

    def launch(self):
        """Add the gradients to the errors and begin the sums of P, unless it was begun."""
        if self._wait is None:
            self._exchange.on_bucket_ready(self)
            self.unsent["e"].add_(self.flat)
            self._wait = self._begin("p", [layer.error @ layer.right for layer in self.layers])

    def launch_second(self):
        """Wait for the sums of P, and begin those of Q."""
        for layer, left in zip(self.layers, self._wait(), strict=True):
            layer.left = torch.linalg.qr(left).Q
        self._wait_second = self._begin("q", [layer.error.T @ layer.left for layer in self.layers])

    def finish(self):
        """Wait for the sums of Q."""
        for layer, right in zip(self.layers, self._wait_second(), strict=True):
            layer.right = right
            torch.mm(layer.left, right.T, out=layer.total)
        self.unsent["e"].sub_(self.flat, alpha=1 / self._exchange.world.size)
        self._reset()

    def _begin(self, name, matrices):
        """Begin the sums of matrices over all ranks. Returns a function that waits for them."""
        flat = torch.cat([matrix.flatten() for matrix in matrices])
        wait = self._exchange.world.all_reduce_async(flat, f"powersgd.{name}.{self.first}")
        return lambda: [piece.view_as(matrix) for piece, matrix in
                        zip(wait().split([matrix.numel() for matrix in matrices]), matrices, strict=True)]


class Layer:
    """error, total (n, m): E, and the view of .grad; right (m, r): Q; left (n, r): P"""

    def __init__(self, error, total, rank, seed):
        self.error, self.total, self.left = error, total, None
        generator = torch.Generator().manual_seed(seed)  # the same on all ranks
        self.right = torch.randn(error.shape[1], rank, generator=generator).to(error.device)


def numbers_sent(shape, rank):
    """Numbers of P and of Q of a parameter of this shape; None if it is summed dense, since they are no fewer."""
    if len(shape) < 2:
        return None
    n, m = shape[0], math.prod(shape[1:])
    return (rank * n, rank * m) if rank * (n + m) < n * m else None
