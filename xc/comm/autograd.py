"""Collectives with gradients. They sum and never average.

Horovod's own allgather averages its gradient over the ranks, which is wrong for a softmax that is split over them.
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
    """Gather the rows of all ranks. Backward, the gradients of all ranks' copies are summed on the owner of a row.

    rows     (B, D)  of this rank
    counts   the B of every rank of the group
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
    """Sum over the group, the same on every rank. Backward, the gradients of all ranks' copies are summed as well."""
    return _SumOver.apply(tensor, group)


def group_logsumexp(lse, group, addend=None):
    """log(sum over the group of exp(lse)), elementwise. A rank that has nothing to add gives -inf.

    lse      (G,)
    addend   (G,)  is summed over the group in the same collective; or None
    returns  (G,), the same on every rank; with an addend, both results
    """
    top = group.all_reduce(lse.clone(), "max")
    share = (lse - top).exp_()
    if addend is None:
        return top + group.all_reduce(share).log_()
    share, addend = group.all_reduce(torch.stack([share, addend])).unbind()
    return top + share.log(), addend
