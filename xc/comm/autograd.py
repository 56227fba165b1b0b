"""Collectives that gradients flow through. Sums, never means.

Horovod's own allgather averages its gradient over the ranks, which is wrong under a softmax that is split over them.
"""

import torch


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, group, counts):
        ctx.group, ctx.counts = group, counts
        return group.all_gather(rows, counts)

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.reduce_scatter(grad, ctx.counts), None, None


def gather_rows(rows, group, counts):
    """All ranks' rows, one after the other; the gradient of every rank's copy is summed back to the row's owner.

    rows     (B, D)  this rank's
    counts   B of every rank of the group
    returns  (G, D)
    """
    return _GatherRows.apply(rows, group, counts)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return group.all_reduce(tensor.clone())

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.all_reduce(grad.clone()), None


def sum_over(tensor, group):
    """Sum over the group, the same on every rank; the gradients of all ranks' copies are summed too."""
    return _SumOver.apply(tensor, group)


def group_logsumexp(lse, group, addend=None):
    """log(sum over the group of exp(lse)), elementwise; a rank that has nothing to add gives -inf.

    lse      (G,)
    addend   (G,) that is summed over the group in the same collective, or None
    returns  (G,), the same on every rank; with an addend, both
    """
    top = group.all_reduce(lse.clone(), "max")
    share = (lse - top).exp_()
    if addend is None:
        return top + group.all_reduce(share).log_()
    share, addend = group.all_reduce(torch.stack([share, addend])).unbind()
    return top + share.log(), addend
