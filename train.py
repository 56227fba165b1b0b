"""Train an image classifier over very many classes.

    python train.py --data PACKS --out RUN                      one process
    horovodrun -np 4 python train.py --data PACKS --out RUN     four ranks; mpirun and srun --mpi=pmix work as well
    python train.py --check                                     the preflight check: faults, before a run meets them
    python train.py --plan ranks=256,…                          what a run would take on a cluster that is not here
    python train.py --help                                      all flags

The run, top to bottom. The last line on standard output is one JSON object.
"""

# ruff: noqa: E402
from xc.run import signals

signals.listen()  # before the imports below, which take seconds

from xc import config
from xc.checkpoint.checkpoints import Checkpoints
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.errors import ExitRun
from xc.optim import schedule_plot
from xc.plan.show import show as show_plan
from xc.preflight import check as preflight
from xc.run.log import RunLog
from xc.run.signals import StopSignal
from xc.run.watchdog import Watchdog
from xc.train import setup
from xc.train.batches import StepBatches
from xc.train.due import Due
from xc.train.evaluate import Evaluator
from xc.train.start import Start
from xc.train.step import train_step


def main():
    # --- set up: every mistake of the user is found here, before anything is written ---
    cfg = config.parse()
    if cfg.plan:
        return show_plan(cfg)
    world = open_world(cfg.device, cfg.model_parallel_size)
    watchdog = Watchdog(world, cfg.stall_seconds)
    if cfg.check:
        raise ExitRun(*preflight.check(cfg, world))
    cfg, splits, loader, schedule = setup.data(cfg, world)
    if cfg.schedule_plot:
        return schedule_plot.draw(schedule, cfg.schedule_plot, world)
    state = setup.state(cfg, splits["train"], world)

    # --- start: from a checkpoint of any number of ranks, from the weights of --init, or from random ones ---
    checkpoints = Checkpoints(cfg, state, schedule, splits, world)
    progress = checkpoints.resume()
    start = Start(cfg, state, splits["train"], checkpoints.resumed, world)
    setup.run_folder(cfg, splits["train"], checkpoints.resumed, world)
    log = RunLog(cfg, progress, schedule, world)
    stop = StopSignal(world)
    evaluator = Evaluator(cfg, state, splits, stop, world)
    setup.warn_of_unused(cfg, splits["train"], schedule, world)
    setup.say_what_is_evaluated(cfg, splits, world)
    start.record()
    if not start.fill_rows(loader, stop.requested):
        raise stop.exit(progress, cfg)
    # The launch before may have ended inside of this evaluation.
    unscored = checkpoints.lacks_scores and Due.after(progress, schedule, cfg, splits).evaluate
    if unscored or start.rows_known and evaluator.split:
        scores = evaluator.run()
        if scores is None:
            raise stop.exit(progress, cfg)
        if unscored:
            checkpoints.add_scores(scores)
        log.evaluation(progress, scores, evaluator.details())

    # --- the loop over steps ---
    batches = StepBatches(loader, progress, schedule, world)
    while not schedule.done(progress):
        log.step_begins(progress)
        plan = schedule.plan(progress, state.noise.grown)
        with log.timer("refresh"), world.traffic.uncounted():
            stale = schedule.due(progress, cfg.graph_every, "0" if cfg.init else cfg.graph_from, state.head.has_built)
            stale = state.head.builds and (stale or (start.rows_known and not progress.step))
            if stale:
                checkpoints.wait()  # a save in flight holds the old graph, and there may be no memory for two
            refreshed = state.head.refresh(plan.first_accumulation_step, due=stale)
        log.values(progress, refreshed)
        with log.timer("data"):
            batch, labels = batches.take(plan.micro_batches)
        if progress.step not in checkpoints.skipped_steps:
            evaluator.examples = train_step(state, batch, labels, plan, progress, schedule, cfg, log.timer)
        progress = progress.after(plan)

        due = Due.after(progress, schedule, cfg, splits)
        with world.traffic.uncounted():
            stopping = stop.requested() and not due.last
        if not (due.anything or stopping):
            continue
        # Before a save: there must be a checkpoint to go back to. An evaluation that is told to stop saves, too.
        with world.traffic.uncounted():
            divergence = checkpoints.divergence(progress, before_save=due.save or due.evaluate or stopping)
        if divergence:
            batches.close()
            progress = checkpoints.roll_back(divergence)
            batches = StepBatches(loader, progress, schedule, world)
            log.rewind(progress)
            continue
        if due.log:
            log.training(progress, plan, state, loader)
        with world.traffic.uncounted():
            if due.anything:  # a stop alone changes no number
                state.exchange.average_buffers()
            scores = evaluator.run() if due.evaluate and not stopping else None
            stopping = stopping or evaluator.stopped
            if due.save or stopping:
                checkpoints.save(progress, scores)
            if scores:
                log.evaluation(progress, scores, evaluator.details())
        if stopping:
            batches.close()
            checkpoints.finish()
            raise stop.exit(progress, cfg)

    # --- the result: where there is val, test is used here, once ---
    log.step_begins(progress)  # ends the trace
    checkpoints.finish()
    scored_step = checkpoints.load_best(progress) if evaluator.tests and cfg.test == "best" else progress.step
    scores = evaluator.final(reloaded=scored_step != progress.step)
    if scores is None:
        raise stop.exit(progress, cfg)
    stop.close()
    log.finish(progress, scores, scored_step, state, schedule, watchdog)


if __name__ == "__main__":
    run(main)
