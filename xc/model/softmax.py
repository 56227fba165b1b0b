"""The exact softmax over class rows that are split over ranks, in blocks of classes.

Hybrid parallel (Song et al. 2020): the features of the shard group are gathered, every rank scores them against its
own class rows, and two small reductions join the softmaxes of the shards.
"""

import torch

from xc.comm.autograd import group_logsumexp


class ShardedSoftmax(torch.autograd.Function):
    """Loss, feature gradient and row gradients of one batch against the active rows of this shard.

    1. Each block of classes gives logits, the log-sum-exp of this shard, and the target logits that it owns.
    2. The group joins them: the log-sum-exp by maximum and sum, the target logits by sum.
    3. The logits of each block give softmax - one-hot, and that gives the gradients of features and rows.

    forward() computes the gradients too, since it has all they need. Logits beyond the memory for them are computed
    twice rather than kept. The feature gradient is the part of this shard; whoever gathered the features sums the
    parts. The chain rule through the length of the rows is written out: autograd would read every block five times
    more.
    """

    @staticmethod
    def forward(ctx, features, labels, head, global_batch, last):
        """loss () of features (G, D) and labels (G,); adds to head.row_grad. See Head.forward. Collective."""
        blocks = _LogitBlocks(features * head.scale, labels, head)
        lse, target_logit, kept = _log_sum_exp(blocks, head)
        lse, target_logit = group_logsumexp(lse, head.world.shards, target_logit)
        loss = head.world.replicas.all_reduce((lse - target_logit).sum() / global_batch)
        if not ctx.needs_input_grad[0]:
            return loss

        feature_grad = torch.zeros_like(features)
        scaled_mean = blocks.scaled / global_batch
        first = head.row_grad is None
        if first:
            head.row_grad = head.memory("row_grad", head.num_active, head.feature_dim)
        for i, block in enumerate(blocks.rows.blocks):
            if i < len(kept):
                rows, length, share, top, target, slope = kept[i]
                error = share.mul_((top - lse[:, None]).exp_())  # softmax
            else:
                rows, length, logits, target, slope = blocks.logits(i)
                error = logits.sub_(lse[:, None]).exp_()
            error[target] = (error[target] - 1) * slope
            feature_grad.addmm_(error, rows)
            rows_grad = head.row_grad[block]
            torch.addmm(rows_grad, error.T, scaled_mean, beta=0 if first else 1, out=rows_grad)
            if head.cosine and last:  # the length of a row changes no logit: drop the gradient along the row
                rows_grad.sub_(rows * (rows * rows_grad).sum(1, keepdim=True)).div_(length)
        ctx.save_for_backward(feature_grad.mul_(head.scale / global_batch))
        return loss

    @staticmethod
    def backward(ctx, grad):
        (feature_grad,) = ctx.saved_tensors
        return grad * feature_grad, None, None, None, None


def _log_sum_exp(blocks, head):
    """Log-sum-exp (G,) and target logits (G,) of this shard; [(rows, length, share, top, target, slope)] of the blocks
    whose logits are kept. share (G, A) is exp(logits - top), top (G, 1) the highest logit of the block."""
    scaled, num_kept = blocks.scaled, blocks.rows.num_kept
    lse = scaled.new_full((len(scaled),), -torch.inf)
    target_logit = scaled.new_zeros(len(scaled))
    kept = []
    for i, block in enumerate(blocks.rows.blocks):
        rows, length, logits, target, slope = blocks.logits(i)
        target_logit[target[0]] = logits[target]
        top = logits.amax(1, keepdim=True)
        share = logits.sub_(top).exp_()
        lse = torch.logaddexp(lse, share.sum(1).log_().add_(top[:, 0]))
        if block.stop <= num_kept:
            kept.append((rows, length, share, top, target, slope))
    return lse, target_logit, kept


class _LogitBlocks:
    """The logits of a batch, block by block.

    scaled  (G, D)  features times the scale of the logits
    rows            ActiveRows of the head's selection
    """

    def __init__(self, scaled, labels, head):
        self.scaled, self._head = scaled, head
        self._examples = head.shard.owns(labels).nonzero().squeeze(1)  # whose target class this shard owns
        self._columns = labels[self._examples] - head.shard.first  # of their target classes among the active rows
        if head.selection.active is not None:
            self._columns = torch.searchsorted(head.selection.active, self._columns)
        if head.active_row_cache is None:
            head.active_row_cache = ActiveRows(head, len(labels))
        self.rows = head.active_row_cache
        self._memory = head.memory("logits", self.rows.num_kept, len(labels))

    def logits(self, i):
        """Of block i: rows (A, D), their lengths (A, 1), logits (G, A) with the margin, the target logits' indices
        (examples, columns), and the slope of the margin at these."""
        head, block = self._head, self.rows.blocks[i]
        rows, length = self.rows.block(i)
        num_examples, kept = len(self.scaled), block.stop <= self.rows.num_kept
        logits = self._memory[block].view(num_examples, len(rows)) if kept else None
        if head.selection.offset is None:
            logits = torch.mm(self.scaled, rows.T, out=logits)
        else:
            logits = torch.addmm(head.selection.offset[block], self.scaled, rows.T, out=logits)
        here = (self._columns >= block.start) & (self._columns < block.stop)
        target = self._examples[here], self._columns[here] - block.start
        logits[target], slope = head.with_margin(logits[target])
        return rows, length, logits, target, slope


class ActiveRows:
    """The active rows of a selection in blocks of classes, scaled to length 1 for cosine logits.

    As many blocks as fit the memory for them, at least one, are gathered once and kept for both passes and all
    micro-batches of the selection.

    blocks    slices of the active rows
    num_kept  rows in the blocks that are kept
    """

    def __init__(self, head, num_examples):
        self._head, self.blocks = head, head.blocks(head.num_active, num_examples)
        rows = self.blocks[0].stop if self.blocks else 1
        block_bytes = rows * (num_examples + head.feature_dim) * head.compute_dtype.itemsize
        kept = self.blocks[: max(1, int(head.memory_bytes / max(1, block_bytes)))]
        self.num_kept = kept[-1].stop if kept else 0
        self._memory, self._kept = head.memory("rows", self.num_kept, head.feature_dim), {}

    def block(self, i):
        """Rows (A, D) of block i and their lengths (A, 1); None for inner-product logits."""
        if i in self._kept:
            return self._kept[i]
        head, block = self._head, self.blocks[i]
        keep, ids = block.stop <= self.num_kept, head.active_rows(block)
        if isinstance(ids, slice):
            rows = head.weight[ids]
        else:
            out = self._memory[block] if keep and head.weight.dtype == head.compute_dtype else None
            rows = torch.index_select(head.weight, 0, ids, out=out)
        rows = rows.to(head.compute_dtype)
        length = rows.norm(dim=1, keepdim=True).clamp_(min=1e-12) if head.cosine else None
        rows = torch.div(rows, length, out=self._memory[block] if keep else None) if head.cosine else rows
        if keep:
            self._kept[i] = rows, length
        return rows, length
