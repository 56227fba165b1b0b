"""The exact softmax over class rows that are split over ranks, in blocks of classes.

Hybrid parallel: every rank gathers the features of its shard group and scores them against the class rows that it
owns; two small reductions join the shards' softmaxes. Song et al. 2020, hybrid parallel framework.
"""

import torch

from xc.comm.autograd import group_logsumexp


class ShardedSoftmax(torch.autograd.Function):
    """Loss, feature gradient and row gradients of one batch against this shard's active rows, in blocks of classes.

    1. logits of each block -> log-sum-exp of this shard, logit of the right class where this shard owns it
    2. both are joined over the group: log-sum-exp by max and sum, right logits by sum
    3. logits of each block again -> softmax - one-hot -> gradients of features and rows

    Everything is known for the gradients when the loss is, so they are taken in forward(): beyond the memory for them
    logits are not kept but computed again. The feature gradient that leaves here is this shard's part; whoever gathered
    the features sums the shards'. The chain rule through the rows' length is written out, since autograd would
    go over every block of logits five times more.
    """

    @staticmethod
    def forward(ctx, features, labels, head, global_batch, last):
        group, shard = head.world.shards, head.shard
        example = shard.owns(labels).nonzero().squeeze(1)
        place = labels[example] - shard.first  # of the right classes that live here, among the active rows
        if head.active is not None:
            place = torch.searchsorted(head.active, place)
        scaled = features * head.scale
        if head.rows_of_step is None:
            head.rows_of_step = ActiveRows(head, len(labels))
        active = head.rows_of_step
        logits_memory = head.memory("logits", active.num_kept, len(labels))

        def logits_of(i, block):
            """Rows (A, D), their lengths, logits (G, A) with margin, the right ones' (examples, columns), slopes."""
            rows, length = active.block(i)
            logits = logits_memory[block].view(len(labels), len(rows)) if block.stop <= active.num_kept else None
            if head.offset is None:
                logits = torch.mm(scaled, rows.T, out=logits)
            else:
                logits = torch.addmm(head.offset[block], scaled, rows.T, out=logits)
            here = (place >= block.start) & (place < block.stop)
            right = example[here], place[here] - block.start
            logits[right], slope = head._with_margin(logits[right])
            return rows, length, logits, right, slope

        lse = features.new_full((len(labels),), -torch.inf)
        right_logit = features.new_zeros(len(labels))
        kept = []
        for i, block in enumerate(active.blocks):
            rows, length, logits, right, slope = logits_of(i, block)
            right_logit[right[0]] = logits[right]
            top = logits.amax(1, keepdim=True)
            share = logits.sub_(top).exp_()  # of the softmax, but for a factor of each example
            lse = torch.logaddexp(lse, share.sum(1).log_().add_(top[:, 0]))
            if block.stop <= active.num_kept:
                kept.append((rows, length, share, top, right, slope))
        lse, right_logit = group_logsumexp(lse, group, right_logit)
        loss = head.world.replicas.all_reduce((lse - right_logit).sum() / global_batch)
        if not ctx.needs_input_grad[0]:
            return loss

        feature_grad = torch.zeros_like(features)
        scaled_mean = scaled / global_batch
        first = head.row_grad is None
        if first:
            head.row_grad = head.memory("row_grad", head.num_active, head.feature_dim)
        for i, block in enumerate(active.blocks):
            if i < len(kept):
                rows, length, share, top, right, slope = kept[i]
                error = share.mul_((top - lse[:, None]).exp_())  # softmax
            else:
                rows, length, logits, right, slope = logits_of(i, block)
                error = logits.sub_(lse[:, None]).exp_()
            error[right] = (error[right] - 1) * slope
            feature_grad.addmm_(error, rows)
            rows_grad = head.row_grad[block]
            torch.addmm(rows_grad, error.T, scaled_mean, beta=0 if first else 1, out=rows_grad)
            if head.cosine and last:  # a row's length changes no logit: only the part across the row counts
                rows_grad.sub_(rows * (rows * rows_grad).sum(1, keepdim=True)).div_(length)
        ctx.save_for_backward(feature_grad.mul_(head.scale / global_batch))
        return loss

    @staticmethod
    def backward(ctx, grad):
        (feature_grad,) = ctx.saved_tensors
        return grad * feature_grad, None, None, None, None


class ActiveRows:
    """The active rows of a step in blocks of classes, of length 1 for cosine logits.

    As many as fit the memory for them are gathered once, for both passes and all micro-batches of the step; one block
    always is.
    """

    def __init__(self, head, num_examples):
        self._head, self.blocks = head, head.blocks(head.num_active, num_examples)
        rows = self.blocks[0].stop if self.blocks else 1
        block_bytes = rows * (num_examples + head.feature_dim) * head.compute_dtype.itemsize
        kept = self.blocks[: max(1, int(head.memory_bytes / max(1, block_bytes)))]
        self.num_kept = kept[-1].stop if kept else 0  # rows
        self._memory, self._kept = head.memory("rows", self.num_kept, head.feature_dim), {}

    def block(self, i):
        """Rows (A, D) of block i and their lengths (A, 1), None for logits that heed them."""
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
