"""One step of training: one update of the backbone and of the class rows."""

from xc.comm.short_rows import bits_of
from xc.optim import noise_scale
from xc.optim.optimizers import set_lr
from xc.train.pipeline import forward_backward


def train_step(state, batch, labels, plan, progress, schedule, cfg, timer):
    """One update of the backbone and of the class rows. Collective.

    batch    [(images (B, …), labels (B,)), …] of this rank, one pair a micro-batch of the StepPlan `plan`
    labels   StepLabels
    returns  features (B, D) of the first micro-batch, labels of this rank of all of them
    """
    head, exchange = state.head, state.exchange
    set_lr(state.backbone_optimizer, plan.lr * cfg.backbone_lr_scale)
    set_lr(state.head_optimizer, plan.lr * cfg.head_lr_scale)
    with timer("select"):
        head.labels.know(labels.own, labels.counts, labels.of_all)
        head.select(labels.own, plan.first_accumulation_step, plan.accumulation_steps, plan.micro_batches)
    measured = progress.step % noise_scale.EVERY == 0 and schedule.is_warm(progress)
    exchange.noise_seed = progress.step if measured else None
    loss, features = forward_backward(state.backbone, head, exchange, batch, labels.own, plan, timer, bits_of(cfg))
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
    return features, labels.own
