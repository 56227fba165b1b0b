"""Collectives with gradients. They sum and never average.

Horovod's own allgather averages its gradient over the ranks. That is wrong for a softmax that is split over the ranks.
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
    """Gather the rows of all ranks. The backward pass sums a row's gradients of all ranks on the rank that owns it.

    rows     (B, D)  of this rank
    counts   the B of every rank of the group
    returns  (G, D), the same on every rank

    Collective, and so is its backward pass.
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
    """Sum a tensor over the group. The backward pass sums the gradients of all ranks, too.

    Collective, and so is its backward pass.
    """
    return _SumOver.apply(tensor, group)


def group_logsumexp(lse, group, addend=None):
    """log(sum over the group of exp(lse)), elementwise. Collective; it has no gradient.

    lse      (G,)  -inf where this rank has nothing to add
    addend   (G,)  summed over the group in the same collective; or None
    returns  (G,), the same on every rank; with an addend, a pair of that and the sum of the addends
    """
    largest = group.all_reduce(lse.clone(), "max")
    share = (lse - largest).exp_()
    if addend is None:
        return largest + group.all_reduce(share).log_()
    share, addend = group.all_reduce(torch.stack([share, addend])).unbind()
    return largest + share.log(), addend
