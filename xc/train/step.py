"""The overlapping pipeline: forward and backward of one step in micro-batches, communication under computation.

    compute   forward 0 | forward 1 | head 0 | head 1    | backward 0 | backward 1
    network             | gather 0  | gather 1 | scatter 0 | scatter 1 | gradients of the backbone, bucket by bucket

Song et al. 2020, overlapping pipeline; the sequence is ours, since the paper's is not known.
"""

import torch

from xc.comm.shard import Shard
from xc.optim import noise_scale
from xc.optim.optimizers import set_lr


def run(backbone, head, exchange, batch, labels, now, timer, feature_bits=32):
    """Leaves the gradients of a step in the backbone and in the head, complete after `exchange.reduce` and
    `head.reduce`. `head.select` has chosen the step's classes. Collective.

    batch         [(images (B, …), labels (B,)), …] of this rank, its near-equal part of each micro-batch of `now`
    labels        of all of them, as `head.select` had them
    now           of the schedule
    feature_bits  32, or 16: features travel as float16, and their gradients, which can be very small, as bfloat16;
                  gradients are summed in float32 all the same
    returns       the loss (), the same on every rank; the features (B, D) of the first micro-batch, detached

    Examples are independent but for norms over a batch, so the numbers are those of the unsplit step; with such norms
    they are those of gradients accumulated over the micro-batches.
    """
    world, shards, num_parts = head.world, head.world.shards, now.micro_batches
    counts = [len(Shard.of(now.global_batch // num_parts, world.size, rank)) for rank in world.shard_ranks]
    assert [len(part) for _, part in batch] == num_parts * [counts[shards.rank]]
    # The group's labels lie rank by rank, and of each rank micro-batch by micro-batch.
    pieces = head.gather_labels(labels)[1].split([count for count in counts for _ in range(num_parts)])
    scale = exchange.loss_scale.scale
    per_selection = num_parts // len(head.selections)
    features, gathered, gradients = {}, {}, {}  # by micro-batch, each until it is used up
    losses, of_first = [], None

    def short(tensor, dtype):
        return tensor if feature_bits == 32 else tensor.to(dtype)

    for i in range(num_parts + 2):
        if i < num_parts:
            with timer("forward"):
                features[i] = head.directions(backbone(batch[i][0]))
                gathered[i] = shards.all_gather_async(short(features[i].detach(), torch.float16), counts)
        if 0 <= (j := i - 1) < num_parts:
            with timer("wait"):
                group_features = gathered.pop(j)().to(features[j].dtype).requires_grad_()  # (G, D)
            with timer("head"):
                if j % per_selection == 0:
                    head.use_selection(j // per_selection)
                last = (j + 1) % per_selection == 0
                loss = head.loss(group_features, torch.cat(pieces[j::num_parts]), now.global_batch, last)
                loss.backward()
                losses.append(loss.detach())
                gradients[j] = shards.reduce_scatter_async(short(group_features.grad, torch.bfloat16), counts)
                if j == num_parts - 1:
                    head.reduce_async()
        if 0 <= (j := i - 2):
            with timer("wait"):
                gradient = gradients.pop(j)().to(features[j].dtype)  # (B, D)
            if j == 0:
                of_first = features[0].detach()
            if j == num_parts - 1:
                exchange.begin(now)  # what the next backward pass completes can leave
            with timer("backward"):
                features.pop(j).backward(gradient * scale if exchange.loss_scale.active else gradient)
                if j == 0 and num_parts > 1:
                    exchange.after_first_backward()
    return sum(losses), of_first


def train_step(state, batch, plan, progress, schedule, cfg, timer):
    """One update of the backbone and of the class rows. Collective.

    batch    [(images (B, …), labels (B,)), …] of this rank, one pair a micro-batch of the StepPlan `plan`
    returns  features (B, D) of the first micro-batch, labels of all of them
    """
    head, exchange = state.head, state.exchange
    set_lr(state.backbone_optimizer, plan.lr)
    set_lr(state.head_optimizer, plan.lr * cfg.head_lr_scale)
    with timer("select"):
        labels = torch.cat([labels for _, labels in batch])
        head.select(labels, plan.first_accumulation_step, plan.accumulation_steps)
    measured = progress.step % noise_scale.EVERY == 0 and schedule.is_warm(progress)
    exchange.noise_seed = progress.step if measured else None
    loss, features = run(state.backbone, head, exchange, batch, labels, plan, timer, cfg.feature_bits)
    with timer("exchange"):
        finite = exchange.reduce()
        head.reduce()
        if finite and (norms := exchange.norms(plan)):
            state.noise.measure(*norms, grows_from=cfg.global_batch if schedule.grows(progress) else 0)
    with timer("update"):
        if finite:  # fp16: gradients overflow on all ranks alike, and the step is skipped
            state.backbone_optimizer.step()
            state.head_optimizer.step()
        exchange.loss_scale.update(finite)
        exchange.zero_grad()
        head.zero_grad()
        state.losses.add(loss, progress.step)
    return features, labels
