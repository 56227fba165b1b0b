"""The exact softmax over class rows that are split over ranks, in blocks of classes.

Hybrid parallel (Song et al. 2020): the features of the shard group are gathered, every rank scores them against its
own class rows, and two small reductions join the softmaxes of the shards.
"""

from itertools import accumulate

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
        order = head.selection.order
        sorted_features = features if order is None else features[order]
        pieces = _Pieces(sorted_features * head.scale, labels if order is None else labels[order], head)
        lse, target_logit, kept = _log_sum_exp(pieces)
        lse, target_logit = group_logsumexp(lse, head.world.shards, target_logit)
        loss = head.world.replicas.all_reduce((lse - target_logit).sum() / global_batch)
        if not ctx.needs_input_grad[0]:
            return loss

        feature_grad = torch.zeros_like(features)
        scaled_mean = pieces.scaled / global_batch
        first = head.row_grad is None
        if first:
            head.row_grad = head.memory("row_grad", head.num_active, head.feature_dim)
        for i, block in enumerate(pieces.rows.blocks):
            rows_grad = head.row_grad[block]
            examples, _ = pieces.rows.uses[i]
            if i in kept:
                share, top, target, slope = kept[i]
                rows, length = pieces.rows.block(i)
                error = share.mul_((top - lse[examples, None]).exp_())  # softmax
            else:
                rows, length, logits, target, slope = pieces.logits(i)
                error = logits.sub_(lse[examples, None]).exp_()
            if len(slope):
                error[target] = (error[target] - 1) * slope
            feature_grad[examples].addmm_(error, rows)
            torch.addmm(rows_grad, error.T, scaled_mean[examples], beta=0 if first else 1, out=rows_grad)
            if head.cosine and last:  # the length of a row changes no logit: drop the gradient along the row
                rows_grad.sub_(rows * (rows * rows_grad).sum(1, keepdim=True)).div_(length)
        feature_grad.mul_(head.scale / global_batch)
        ctx.save_for_backward(feature_grad if order is None else torch.empty_like(feature_grad).index_copy_(
            0, order, feature_grad))
        return loss

    @staticmethod
    def backward(ctx, grad):
        (feature_grad,) = ctx.saved_tensors
        return grad * feature_grad, None, None, None, None


def _log_sum_exp(pieces):
    """Log-sum-exp (G,) and target logits (G,) of this shard; {i: (share, top, target, slope)} of the pieces whose
    logits are kept. share (N, A) is exp(logits - top), top (N, 1) the highest logit of the piece."""
    scaled, num_kept = pieces.scaled, pieces.rows.num_kept
    lse = scaled.new_full((len(scaled),), -torch.inf)
    target_logit = scaled.new_zeros(len(scaled))
    kept = {}
    for i, block in enumerate(pieces.rows.blocks):
        examples, _ = pieces.rows.uses[i]
        _, _, logits, target, slope = pieces.logits(i)
        if len(slope):
            target_logit[examples][target[0]] = logits[target]
        top = logits.amax(1, keepdim=True)
        share = logits.sub_(top).exp_()
        lse[examples] = torch.logaddexp(lse[examples], share.sum(1).log_().add_(top[:, 0]))
        if block.stop <= num_kept:
            kept[i] = share, top, target, slope
    return lse, target_logit, kept


class _Pieces:
    """The logits of a batch, in pieces: some examples against a block of the active rows.

    Rows that all examples share are scored against all of them, the rows of a part against its examples alone.

    scaled  (G, D)  features times the scale of the logits, in the order of the selection
    rows            ActiveRows of the head's selection
    """

    def __init__(self, scaled, labels, head):
        self.scaled, self._head, self.selection = scaled, head, head.selection
        owned = head.shard.owns(labels)
        self._columns = torch.where(owned, labels - head.shard.first, -1)  # target classes among the active rows, or -1
        if self.selection.active is not None:
            shared = self.selection.active[: self.selection.num_shared]
            self._columns[owned] = torch.searchsorted(shared, self._columns[owned])
        if head.active_row_cache is None:
            head.active_row_cache = ActiveRows(head, len(labels))
        self.rows, self._places = head.active_row_cache, [0]  # of each kept block in the memory for logits, and the end
        for block, (examples, _) in zip(self.rows.blocks, self.rows.uses, strict=True):
            if block.stop <= self.rows.num_kept:
                self._places.append(self._places[-1] + len(scaled[examples]) * (block.stop - block.start))

    def logits(self, i):
        """Of block i: rows (A, D), their lengths (A, 1), logits (N, A) with the margin, the target logits' indices
        (examples, columns), and the slope of the margin at these."""
        head, block = self._head, self.rows.blocks[i]
        rows, length = self.rows.block(i)
        examples, offset = self.rows.uses[i]
        scaled = self.scaled[examples]
        logits = None
        if block.stop <= self.rows.num_kept:
            first, last = self._places[i : i + 2]
            logits = head.memory("logits", self._places[-1], 1)[first:last].view(len(scaled), len(rows))
        if offset is None:
            logits = torch.mm(scaled, rows.T, out=logits)
        else:
            logits = torch.addmm(offset, scaled, rows.T, out=logits)
        columns = self._columns[examples]
        if self.selection.parts and block.start >= self.selection.num_shared:  # no target class is there
            return rows, length, logits, (columns[:0], columns[:0]), logits[:0, 0]
        here = ((columns >= block.start) & (columns < block.stop)).nonzero().squeeze(1)
        target = here, columns[here] - block.start
        logits[target], slope = head.with_margin(logits[target])
        return rows, length, logits, target, slope


class ActiveRows:
    """The active rows of a selection in blocks of classes, scaled to length 1 for cosine logits.

    Of as many blocks as fit the memory for it, at least one, the logits are kept from one pass to the other. Where some
    rows are active, those of these blocks are gathered once and kept as well, for all micro-batches of the selection.
    Where all are, they need not be gathered, and only their lengths are kept: scaling them again is cheap.

    blocks    slices of the active rows; none has both shared rows and rows of one part of the examples
    uses      (examples, offset) of each block: the slice of the examples that are compared with it, and what is added
              to the logits, (A,) or None
    num_kept  rows in the blocks whose logits are kept
    """

    def __init__(self, head, num_examples):
        self._head, self.blocks, self.uses, num_bytes = head, [], [], []
        self._gathers, self._lengths = head.selection.active is not None, {}
        for span, examples, offset in head.selection.spans(head.num_active):
            count = len(range(num_examples)[examples])
            # A part has few examples: then it is its rows that must fit the cache, beside their logits.
            widest = max(count, min(num_examples, head.feature_dim))
            for block in head.blocks(span.stop - span.start, widest):
                self.blocks.append(slice(span.start + block.start, span.start + block.stop))
                self.uses.append((examples, None if offset is None else offset[block]))
                width = count + (head.feature_dim if self._gathers else 1)
                num_bytes.append((block.stop - block.start) * width * head.compute_dtype.itemsize)
        num_fitting = sum(total <= head.memory_bytes for total in accumulate(num_bytes))
        kept = self.blocks[: max(1, num_fitting)]
        self.num_kept = kept[-1].stop if kept else 0
        self._memory, self._kept = head.memory("rows", self.num_kept if self._gathers else 0, head.feature_dim), {}
        longest = max((block.stop - block.start for block in self.blocks), default=0)
        self._scratch = head.memory("row block", longest, head.feature_dim)  # for rows that are not kept

    def block(self, i):
        """Rows (A, D) of block i, until the next call, and their lengths (A, 1), None for inner-product logits."""
        if i in self._kept:
            return self._kept[i]
        head, block = self._head, self.blocks[i]
        keep, ids = self._gathers and block.stop <= self.num_kept, head.active_rows(block)
        out = self._memory[block] if keep else self._scratch[: block.stop - block.start]
        if isinstance(ids, slice):
            rows = head.weight[ids]
        else:
            rows = torch.index_select(head.weight, 0, ids, out=out if head.weight.dtype == head.compute_dtype else None)
        rows = rows.to(head.compute_dtype)
        length = self._lengths.get(i)
        if length is None and head.cosine:
            length = self._lengths[i] = rows.norm(dim=1, keepdim=True).clamp_(min=1e-12)
        rows = torch.div(rows, length, out=out) if head.cosine else rows
        if keep:
            self._kept[i] = rows, length
        return rows, length
