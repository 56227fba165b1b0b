"""Train an image classifier over very many classes.

    python train.py --data PACKS --out RUN                      one process
    horovodrun -np 4 python train.py --data PACKS --out RUN     four ranks; mpirun and srun --mpi=pmix do as well
    python train.py --check                                     the doctor: what is wrong here, before a run
    python train.py --help                                      all flags

The run, top to bottom. The last line on standard output is one JSON object.
"""

from xc.run import signals as stop

stop.listen()  # first of all: what follows takes seconds

# ruff: noqa: E402
import json
import sys
import time

import torch

from xc import config
from xc.checkpoint import layout, newest
from xc.checkpoint import state as checkpoint
from xc.checkpoint.rollback import Rollbacks
from xc.checkpoint.writer import Saver
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.data import loader as data
from xc.errors import ExitRun
from xc.gradients import exchanges
from xc.model import backbone as backbones
from xc.model import head_table as heads
from xc.optim import noise_scale, schedule_plot
from xc.optim.optimizers import RowSGD, backbone_optimizer, set_lr
from xc.optim.schedule import Position, Schedule
from xc.preflight import check as preflight
from xc.run import folder as run_folder
from xc.run import watchdog
from xc.run.loss_meter import Losses
from xc.run.metrics import Metrics, Timer, peak_rss_mb
from xc.run.trace import Timeline
from xc.train import step as pipeline
from xc.train.evaluate import evaluate

_AUDITED = 4  # examples per rank that head.selection_quality looks at, against all classes


def main():
    # --- settings, ranks, data: all that a user can get wrong, before anything is written ---
    start = time.perf_counter()
    cfg = config.parse()
    world = open_world(cfg.device, cfg.model_parallel_size)
    watch = watchdog.Watchdog(world, cfg.stall_seconds)
    if cfg.check:
        raise ExitRun(*preflight.check(cfg, world))
    with world.agreed():
        if not cfg.schedule_plot:
            run_folder.check(cfg)
        packs = data.open_splits(cfg)
        loader = data.Loader(packs["train"], cfg, world)
        schedule = Schedule.of(cfg, len(packs["train"]), world.size)
        if cfg.schedule_plot and world.rank == 0:
            schedule_plot.draw(schedule, cfg.schedule_plot)
    if cfg.schedule_plot:
        return

    # --- model: the backbone on every rank, the class rows split over the shard group ---
    with world.agreed():
        backbone = backbones.build(cfg.backbone, packs["train"].input_shape, cfg.feature_dim, cfg.seed, world, cfg.amp)
        head = heads.build(cfg, packs["train"].num_classes, world)
        exchange = exchanges.build(backbone, world, cfg)
    state = checkpoint.State(backbone, backbone_optimizer(backbone, cfg, exchange.keeps_momentum), head,
                             RowSGD(head, cfg.head_momentum), exchange,
                             noise_scale.NoiseScale(), Losses(world.device))

    # --- resume: any number of ranks from any number of ranks ---
    position = Position()
    identity = {"seed": cfg.seed, "sampler": cfg.sampler, "logits": cfg.logits, "num_records": len(packs["train"]),
                "data_seed": packs["train"].data_seed, "classes_digest": packs["train"].classes_digest,
                "course": schedule.batch_schedule}
    folder = newest.to_resume(cfg.resume, cfg.out, world)
    with world.agreed():
        if folder:
            position = schedule.resume(checkpoint.load(folder, state, identity))
    with world.agreed():
        if world.rank == 0:
            run_folder.create(cfg, world.size)

    # --- the loop over steps ---
    batches = loader.train(position.examples, schedule.examples, cfg.global_batch // cfg.micro_batches)
    test = data.Loader(packs["test"], cfg, world) if "test" in packs else None
    saver = Saver(cfg.out, world, identity, cfg.keep)
    metrics = Metrics(cfg.out, world.rank, position, schedule.num_steps, schedule.examples)
    timer = Timer()
    timeline = Timeline(cfg.timeline_steps, position.step, schedule.least_steps, cfg.out, world, timer)
    stopping = stop.Stop(world)
    rollbacks = Rollbacks(cfg.max_rollbacks, cfg.out, world)
    begun = logged = position
    # An evaluation of this run that was interrupted, or not even begun, is made up for.
    known = world.everyone.all_gather_object(folder and layout.top1_of(folder))[0]
    owed = test and folder and cfg.resume == "auto" and known is None and (
        schedule.due(position, cfg.eval_every) or position.examples == schedule.examples)
    now = labels = features = found = None  # of the last step, and of the last evaluation

    while True:
        # what the step before leaves to be done
        over = position.examples == schedule.examples
        moved = position.step > begun.step
        if moved or owed:
            with world.traffic.uncounted():
                stopped = stopping.asked() and not over
            log = moved and (position.step % cfg.log_steps == 0 or over)
            eval = test and (schedule.due(position, cfg.eval_every) or over)
            save = schedule.due(position, cfg.save_every) or over
            if log or eval or save or stopped:
                state.losses.look()
                if state.losses.bad_step is not None:  # looked for before a save: there must be one to go on from
                    saver.finish()
                    folder = rollbacks.folder(state.losses)
                    state.losses = Losses(world.device)
                    with world.agreed():
                        position = begun = logged = schedule.resume(checkpoint.load(folder, state, identity))
                    batches = loader.train(position.examples, schedule.examples, cfg.global_batch // cfg.micro_batches)
                    metrics.back_to(position)
                    continue
            if log:
                num_steps, examples = position.step - logged.step, position.examples - logged.examples
                metrics.log(position, loss=state.losses.take(), lr=now.lr, global_batch=now.global_batch,
                            peak_rss_mb=peak_rss_mb(), noise_scale=state.noise.examples,
                            loss_scale=exchange.loss_scale.scale if exchange.loss_scale.active else None,
                            bad_records=loader.bad_records(), **world.traffic.take(num_steps),
                            **timer.take(num_steps, examples))
                logged = position
            with world.traffic.uncounted():
                if log or eval or save:  # and not where the run was stopped, which must change nothing
                    exchange.average_buffers()
                found = None
                if eval and not stopped:
                    found = evaluate(backbone, head, test.test(cfg.global_batch), world, stopping.asked)
                    stopped = found is None
                if not moved and found:
                    saver.add_top1(folder, found["top1"])
                elif moved and (save or stopped):
                    saver.save(state, position, found and found["top1"])
                if found:
                    metrics.log(position, **found, train_seconds=timer.total, bad_test_records=test.bad_records(),
                                **(head.selection_quality(features, labels[: len(features)])
                                   if features is not None else {}))
            if stopped:
                saver.finish(last=True)
                raise ExitRun(stop.EXIT_CODE, f"told to stop after {position.step} steps, all of which are saved; go on "
                                            f"with it: {run_folder.resume_command(cfg, world.size)}")
            owed = False
        timeline.at(position.step)
        if over:
            break

        # the step
        watchdog.at(position.step)
        now = schedule.plan(position, state.noise.grown)
        set_lr(state.backbone_optimizer, now.lr)
        set_lr(state.head_optimizer, now.lr * cfg.head_lr_scale)
        with timer("refresh"), world.traffic.uncounted():
            refreshed = head.refresh(now.first_accumulation_step, schedule.due(position, cfg.graph_every))
        if refreshed:
            metrics.log(position, **refreshed)
        with timer("data"):
            batch = batches.take(now.micro_batches)
        if position.step in rollbacks.skipped:
            position = position.after(now)
            continue
        with timer("select"):
            labels = torch.cat([labels for _, labels in batch])
            head.select(labels, now.first_accumulation_step, now.accumulation_steps)
        watched = position.step % noise_scale.EVERY == 0 and schedule.is_warm(position)
        exchange.watched = position.step if watched else None
        loss, features = pipeline.run(backbone, head, exchange, batch, labels, now, timer, cfg.feature_bits)
        with timer("exchange"):
            finite = exchange.reduce()
            head.reduce()
            if finite and (norms := exchange.norms(now)):
                state.noise.measure(*norms, grows_from=cfg.global_batch if schedule.grows(position) else 0)
        with timer("update"):
            if finite:  # or else losses were scaled too far up: on all ranks
                state.backbone_optimizer.step()
                state.head_optimizer.step()
            exchange.loss_scale.update(finite)
            exchange.zero_grad()
            head.zero_grad()
            features = features[:_AUDITED]  # of the first micro-batch, which has the first labels
            state.losses.add(loss, position.step)
        position = position.after(now)
    if schedule.auto and state.noise.grown == 1 and world.rank == 0:
        print("warning: --fccs auto never let the batch grow: the noise did not, or it was not known", file=sys.stderr)

    # --- the result ---
    saver.finish(last=True)
    if test and found is None:  # there was nothing left to do
        found = evaluate(backbone, head, test.test(cfg.global_batch), world)
    result = found or {"top1": None, "top5": None}
    metrics.close()
    peak = world.everyone.all_reduce(torch.tensor(peak_rss_mb(), device=world.device), "max").item()
    watch.close()
    result |= {"images_per_second": round(timer.images_per_second, 1), "peak_rss_mb": round(peak),
               "steps": position.step, "seconds": round(time.perf_counter() - start, 1), "run": cfg.out}
    if world.rank == 0:
        print(f"go on with it: {run_folder.resume_command(cfg, world.size)}")
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run(main)
