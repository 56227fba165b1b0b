"""The overlapping pipeline: forward and backward of one step in micro-batches, communication under computation.

    compute   forward 0 | forward 1 | head 0 | head 1    | backward 0 | backward 1
    network             | gather 0  | gather 1 | scatter 0 | scatter 1 | gradients of the backbone, bucket by bucket

Song et al. 2020, overlapping pipeline; the sequence is ours, since the paper's is not known.
"""

import torch

from xc.comm import short_rows
from xc.comm.shard import Shard


def forward_backward(backbone, head, exchange, batch, labels, plan, timer, feature_bits=32):
    """Compute the gradients of a step. They are complete after `exchange.reduce` and `head.reduce`. Collective.

    batch         [(images (B, …), labels (B,)), …] of this rank: its near-equal part of each micro-batch of the plan
    labels        of all of them, as `head.select` got them
    plan          the StepPlan
    feature_bits  32, 16 or 8: of each number of the features and of their gradients on the way, see comm/short_rows.py
    returns       the loss (), the same on every rank; the features (B, D) of the first micro-batch, detached

    The numbers are those of the unsplit step, since examples are independent. With norms over a batch they are those of
    gradients accumulated over the micro-batches.
    """
    world, shards, num_parts = head.world, head.world.shards, plan.micro_batches
    counts = [len(Shard.of(plan.global_batch // num_parts, world.size, rank)) for rank in world.shard_ranks]
    assert [len(part) for _, part in batch] == num_parts * [counts[shards.rank]]
    # The labels of the group are in the order of ranks, and those of a rank in the order of micro-batches.
    pieces = head.labels.of_copy(labels)[1].split([count for count in counts for _ in range(num_parts)])
    scale = exchange.loss_scale.scale
    per_selection = num_parts // len(head.selections)
    features, gathered, gradients = {}, {}, {}  # by micro-batch, until they are used
    losses, of_first = [], None

    for i in range(num_parts + 2):
        if i < num_parts:
            with timer("forward"):
                features[i] = head.directions(backbone(batch[i][0]))
                gathered[i] = short_rows.gather_async(features[i].detach(), shards, counts, feature_bits)
        if 0 <= (j := i - 1) < num_parts:
            with timer("wait"):
                group_features = gathered.pop(j)().requires_grad_()  # (G, D)
            with timer("head"):
                if j % per_selection == 0:
                    head.use_selection(j // per_selection)
                last = (j + 1) % per_selection == 0
                loss = head.loss(group_features, torch.cat(pieces[j::num_parts]), plan.global_batch, last)
                loss.backward()
                losses.append(loss.detach())
                gradients[j] = short_rows.reduce_scatter_async(group_features.grad, shards, counts, feature_bits)
                if j == num_parts - 1:
                    head.reduce_async()
        if 0 <= (j := i - 2):
            with timer("wait"):
                gradient = gradients.pop(j)()  # (B, D)
            if j == 0:
                of_first = features[0].detach()
            if j == num_parts - 1:
                exchange.before_last_backward(plan)  # the next backward pass is the last one
            with timer("backward"):
                features.pop(j).backward(gradient * scale if exchange.loss_scale.active else gradient)
                if j == 0 and num_parts > 1:
                    exchange.after_first_backward()
    return sum(losses), of_first
