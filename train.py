"""Train an image classifier over very many classes.

    python train.py --data PACKS --out RUN                      one process
    horovodrun -np 4 python train.py --data PACKS --out RUN     four ranks; mpirun and srun --mpi=pmix do as well
    python train.py --help                                      all flags

The run, top to bottom. The last line on standard output is one JSON object.
"""

import json
import time

import torch

from xc import backbone as backbones
from xc import checkpoint, config, data, heads, pipeline, run_folder
from xc import exchange as exchanges
from xc.evaluate import evaluate
from xc.metrics import Metrics, Timer, check_finite, peak_rss_mb
from xc.optim import RowSGD, backbone_sgd, set_lr
from xc.schedule import Schedule
from xc.timeline import Timeline
from xc.world import open_world, run

_AUDITED = 4  # examples per rank that head.audit looks at, against all classes


def main():
    # --- settings, ranks, data: all that a user can get wrong, before anything is written ---
    start = time.perf_counter()
    cfg = config.parse()
    world = open_world(cfg.device, cfg.model_parallel_size)
    with world.agreed():
        run_folder.check(cfg)
        packs = data.open_splits(cfg)
        schedule = Schedule.of(cfg, len(packs["train"]), world.size)

    # --- model: the backbone on every rank, the class rows split over the shard group ---
    with world.agreed():
        backbone = backbones.build(cfg.backbone, packs["train"].input_shape, cfg.feature_dim, cfg.seed, world)
        head = heads.build(cfg, packs["train"].num_classes, world)
        exchange = exchanges.build(backbone, world, cfg)
    state = checkpoint.State(backbone, backbone_sgd(backbone, cfg, exchange.keeps_momentum), head,
                             RowSGD(head, cfg.head_momentum, cfg.head_weight_decay), exchange)

    # --- resume: any number of ranks from any number of ranks ---
    first_step = 0
    identity = {"seed": cfg.seed, "logits": cfg.logits, "num_records": len(packs["train"]),
                "classes_digest": packs["train"].classes_digest}
    with world.agreed():
        if folder := checkpoint.to_resume(cfg.resume, cfg.out):
            first_step = schedule.resume(checkpoint.load(folder, state, identity))
    with world.agreed():
        if world.rank == 0:
            run_folder.create(cfg, world.size)

    # --- the loop over steps ---
    steps = range(first_step, schedule.steps)
    batches = data.Loader(packs["train"], cfg, world).train(
        (schedule.examples_before(step), schedule.at(step).global_batch, schedule.at(step).micro_batches)
        for step in steps)
    test = data.Loader(packs["test"], cfg, world) if "test" in packs else None
    metrics = Metrics(cfg.out, world.rank, first_step, schedule.steps)
    timer = Timer()
    timeline = Timeline(cfg.timeline_steps, steps, cfg.out, world, timer)
    logged, loss_sum = first_step, torch.zeros((), device=world.device)

    for step in steps:
        timeline.at(step)
        now = schedule.at(step)
        set_lr(state.body_optimizer, now.lr)
        set_lr(state.head_optimizer, now.lr * cfg.head_lr_scale)

        with timer("refresh"), world.traffic.uncounted():
            refreshed = head.refresh(step, schedule.due(step, cfg.graph_every))
        with timer("data"):
            batch = next(batches)
        with timer("select"):
            labels = torch.cat([labels for _, labels in batch])
            head.select(labels, step)
        loss, features = pipeline.run(backbone, head, exchange, batch, labels, now, timer, cfg.feature_bits)
        with timer("exchange"):
            exchange.reduce()
            head.reduce()
        with timer("update"):
            state.body_optimizer.step()
            state.head_optimizer.step()
            exchange.zero_grad()
            head.zero_grad()
            features = features[:_AUDITED]  # of the first micro-batch, which has the first labels
            loss_sum += loss

        done = step + 1
        if refreshed:
            metrics.log(step, **refreshed)
        log = done % cfg.log_steps == 0 or done == schedule.steps
        eval = test and schedule.due(done, cfg.eval_epochs)
        save = schedule.due(done, cfg.save_epochs) or done == schedule.steps
        if log or eval or save:
            mean_loss = loss_sum.item() / (done - logged)
            check_finite(mean_loss, logged, done)  # before a save: the last checkpoint must be one to go on from
        if log:
            examples = schedule.examples_before(done) - schedule.examples_before(logged)
            metrics.log(done, loss=mean_loss, lr=now.lr, global_batch=now.global_batch, peak_rss_mb=peak_rss_mb(),
                        **world.traffic.take(done - logged), **timer.take(done - logged, examples))
            logged, loss_sum = done, torch.zeros_like(loss_sum)
        with world.traffic.uncounted():
            if log or eval or save:
                exchange.average_buffers()
            if eval:
                metrics.log(done, **evaluate(backbone, head, test.test(cfg.global_batch), world),
                            train_seconds=timer.total, **head.audit(features, labels[: len(features)]))
            if save:
                position = {"step": done, "examples": schedule.examples_before(done)}
                checkpoint.save(cfg.out, world, state, position, identity, cfg.keep)
    timeline.at(schedule.steps)

    # --- the result ---
    result = evaluate(backbone, head, test.test(cfg.global_batch), world) if test else {"top1": None, "top5": None}
    if test and steps:
        metrics.log(schedule.steps, **result, train_seconds=timer.total,
                    **head.audit(features, labels[: len(features)]))
    metrics.close()
    peak = world.everyone.all_reduce(torch.tensor(peak_rss_mb(), device=world.device), "max").item()
    result |= {"images_per_second": round(timer.images_per_second, 1), "peak_rss_mb": round(peak),
               "steps": schedule.steps, "seconds": round(time.perf_counter() - start, 1), "run": cfg.out}
    if world.rank == 0:
        print(f"go on with it: {run_folder.resume_command(cfg, world.size)}")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run(main)
