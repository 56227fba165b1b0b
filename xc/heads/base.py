"""The classifier: class rows split over the shard group, and the exact softmax over all of them.

Hybrid parallel: every rank gathers the features of its shard group and scores them against the class rows that it
owns; two small reductions join the shards' softmaxes. Song et al. 2020, hybrid parallel framework; the sequence is
written out in `_ShardedSoftmax`.
"""

import torch
import torch.nn.functional as F

from xc.collective import gather_rows, group_logsumexp
from xc.margin import MARGINS
from xc.shard import Shard

_INIT_BLOCK = 4096  # class rows that share one random generator: a rank draws its own blocks alone


class Head:
    """Full softmax: all classes take part in every step.

    weight    (S, D)  class rows of this shard; no autograd leaf, they have one owner and one optimizer (RowSGD)
    row_grad  (S, D)  their gradient, summed over the micro-batches and, by `reduce`, over the replicas
    """

    def __init__(self, num_classes, feature_dim, world, *, cosine=True, scale=20.0, margin="none", margin_size=0.0,
                 logits_mb=0.0, seed=0, dtype=torch.float32):
        self.num_classes, self.feature_dim = num_classes, feature_dim
        self.world = world
        self.cosine, self.scale = cosine, scale if cosine else 1.0
        self.margin, self.margin_size = MARGINS[margin], margin_size
        self.logits_bytes = (logits_mb or (1 if world.device.type == "cpu" else 256)) * 2**20
        self.shard = Shard.of(num_classes, world.shards.size, world.shards.rank)
        self.weight = initial_rows(self.shard, feature_dim, seed, dtype).to(world.device)
        self.row_grad = torch.zeros_like(self.weight)

    def forward(self, features, labels, global_batch):
        """Cross-entropy of this rank's examples and of all others', summed over them and divided by `global_batch`.

        features      (B, D)  this rank's, B may differ between ranks
        labels        (B,)    global class ids
        global_batch  examples of the whole step over all ranks and micro-batches
        returns       ()      the same on every rank; its gradients are sums over all ranks, complete after `reduce`

        Collective. The gradient of the class rows is taken here, not in backward(), and added to `row_grad`.
        """
        group = self.world.shards
        if self.cosine:
            features = F.normalize(features)
        counts = self._counts(labels)
        labels = group.all_gather(labels, counts)  # (G,)
        features = gather_rows(features, group, counts)  # (G, D)
        return _ShardedSoftmax.apply(features, labels, self, global_batch)

    __call__ = forward

    def reduce(self):
        """Sum the row gradients over the copies of this shard. Collective."""
        self.world.replicas.all_reduce(self.row_grad)

    def zero_grad(self):
        self.row_grad.zero_()

    @torch.no_grad()
    def label_places(self, features, labels):
        """How many classes score above the right one: 0 is a top-1 hit. Of equal scores the lower class id wins.

        features  (B, D)  this rank's
        labels    (B,)    global class ids
        returns   (B,)    int64, exact over all classes

        Collective.
        """
        group = self.world.shards
        counts = self._counts(labels)
        first = sum(counts[: group.rank])
        labels = group.all_gather(labels, counts)  # (G,)
        features = group.all_gather(F.normalize(features) if self.cosine else features, counts)  # (G, D)

        own = self.shard.owns(labels)
        score = features.new_zeros(len(labels))  # of the right class, known to its owner
        score[own] = (features[own] * self._unit(self.weight[labels[own] - self.shard.first])).sum(1)
        score = group.all_reduce(score)[:, None]  # (G, 1)
        places = torch.zeros_like(labels)
        for block in self._blocks(len(self.weight), len(labels)):
            scores = features @ self._unit(self.weight[block]).T  # (G, block)
            ids = torch.arange(block.start, block.stop, device=labels.device) + self.shard.first
            ahead = (scores > score) | ((scores == score) & (ids < labels[:, None]))
            places += (ahead & (ids != labels[:, None])).sum(1)
        return group.all_reduce(places)[first : first + counts[group.rank]]

    def _counts(self, labels):
        one = torch.tensor([len(labels)], device=labels.device)
        return self.world.shards.all_gather(one).tolist()

    def _unit(self, rows):
        return F.normalize(rows) if self.cosine else rows

    def _with_margin(self, logits):
        """Right classes' logits with the margin, and d(with) / d(without), both (N,)."""
        with torch.enable_grad():
            cosine = (logits / self.scale).requires_grad_()
            shifted = self.margin(cosine, self.margin_size)
            (slope,) = torch.autograd.grad(shifted.sum(), cosine)
        return shifted.detach() * self.scale, slope

    def _blocks(self, num_rows, num_examples):
        """Slices of the class rows whose logits fit the memory for them."""
        size = max(1, int(self.logits_bytes / (max(1, num_examples) * self.weight.element_size())))
        return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]


class _ShardedSoftmax(torch.autograd.Function):
    """Loss, feature gradient and row gradients of one batch against this shard's rows, in blocks of classes.

    1. logits of each block -> log-sum-exp of this shard, logit of the right class where this shard owns it
    2. both are joined over the group: log-sum-exp by max and sum, right logits by sum
    3. logits of each block again -> softmax - one-hot -> gradients of features and rows

    Everything is known for the gradients when the loss is, so they are taken in forward(): the logits are never whole
    in memory. With a single block nothing is computed twice. The feature gradient that leaves here is this shard's
    part; `gather_rows` sums the shards. The chain rule through the rows' length is written out, since autograd would
    go over every block of logits five times more.
    """

    @staticmethod
    def forward(ctx, features, labels, head, global_batch):
        group, shard = head.world.shards, head.shard
        example = shard.owns(labels).nonzero().squeeze(1)
        local = labels[example] - shard.first  # rows of the right classes that live here
        scaled = features * head.scale
        blocks = head._blocks(len(head.weight), len(labels))

        def logits_of(block):
            """Rows (A, D), their lengths, logits (G, A) with margin, the right ones' (examples, columns), slopes."""
            rows = head.weight[block]
            length = rows.norm(dim=1, keepdim=True).clamp_(min=1e-12) if head.cosine else None
            rows = rows / length if head.cosine else rows
            logits = scaled @ rows.T
            here = (local >= block.start) & (local < block.stop)
            right = example[here], local[here] - block.start
            logits[right], slope = head._with_margin(logits[right])
            return rows, length, logits, right, slope

        lse = features.new_full((len(labels),), -torch.inf)
        right_logit = features.new_zeros(len(labels))
        for block in blocks:
            *_, logits, right, _ = last = logits_of(block)
            right_logit[right[0]] = logits[right]
            lse = torch.logaddexp(lse, logits.logsumexp(1))
        lse = group_logsumexp(lse, group)
        right_logit = group.all_reduce(right_logit)
        loss = head.world.replicas.all_reduce((lse - right_logit).sum() / global_batch)
        if not ctx.needs_input_grad[0]:
            return loss

        feature_grad = torch.zeros_like(features)
        scaled_mean = scaled / global_batch
        for block in blocks:
            rows, length, logits, right, slope = last if len(blocks) == 1 else logits_of(block)
            error = logits.sub_(lse[:, None]).exp_()  # softmax
            error[right] = (error[right] - 1) * slope
            feature_grad.addmm_(error, rows)
            rows_grad = error.T @ scaled_mean
            if head.cosine:  # a row's length changes no logit: only the part across the row counts
                rows_grad.sub_(rows * (rows * rows_grad).sum(1, keepdim=True)).div_(length)
            head.row_grad[block] += rows_grad
        ctx.save_for_backward(feature_grad.mul_(head.scale / global_batch))
        return loss

    @staticmethod
    def backward(ctx, grad):
        (feature_grad,) = ctx.saved_tensors
        return grad * feature_grad, None, None, None


def initial_rows(shard, feature_dim, seed, dtype=torch.float32):
    """Random class rows, (S, D); a class gets the same row in any shard of any world.

    Of the length that torch's nn.Linear starts with, 1/sqrt(3): the longer a row, the less a step turns it.
    """
    rows = torch.empty(len(shard), feature_dim, dtype=dtype)
    for block in range(shard.first // _INIT_BLOCK, -(-shard.last // _INIT_BLOCK)):
        first = block * _INIT_BLOCK
        generator = torch.Generator().manual_seed(seed * 2**31 + block)
        drawn = torch.randn(_INIT_BLOCK, feature_dim, generator=generator).div_((3 * feature_dim) ** 0.5)
        start, stop = max(first, shard.first), min(first + _INIT_BLOCK, shard.last)
        rows[start - shard.first : stop - shard.first] = drawn[start - first : stop - first]
    return rows
