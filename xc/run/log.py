"""What a run records: metrics, phase times, a trace of some steps, and the last line."""

import json
import sys
import time

import torch

from xc.run import watchdog
from xc.run.folder import resume_command
from xc.run.metrics import Metrics, Timer, peak_rss_mb
from xc.run.trace import Trace

_STARTED = time.perf_counter()  # of the launch, but for the imports before this one


class RunLog:
    """The records of one launch.

    timer  phases of the step: `with log.timer("forward"): …`
    """

    def __init__(self, cfg, progress, schedule, world):
        """progress: where this launch begins."""
        self._cfg, self._world, self._logged = cfg, world, progress
        self.timer = Timer()
        self._metrics = Metrics(cfg.out, world.rank, progress, schedule.num_steps, schedule.examples)
        self._trace = Trace(cfg.trace_steps, progress.step, schedule.least_steps, cfg.out, world, self.timer)

    def step_begins(self, progress):
        """Before every step, and once after the last one. Collective where a trace begins or ends."""
        self._trace.at(progress.step)
        watchdog.at_step(progress.step)

    def values(self, progress, values):
        """Log {name: number}, if there are any."""
        if values:
            self._metrics.log(progress, **values)

    def training(self, progress, plan, state, loader):
        """Log the interval since the last call, whose last step used `plan`. Collective."""
        steps, examples = progress.step - self._logged.step, progress.examples - self._logged.examples
        loss_scale = state.exchange.loss_scale
        self._metrics.log(
            progress, loss=state.losses.pop_mean(), lr=plan.lr, global_batch=plan.global_batch,
            peak_rss_mb=peak_rss_mb(), noise_scale=state.noise.examples,
            loss_scale=loss_scale.scale if loss_scale.active else None, bad_records=loader.bad_records(),
            **self._world.traffic.pop_metrics(steps), **self.timer.take(steps, examples))
        self._logged = progress

    def evaluation(self, progress, scores, details):
        """Log the scores {split, top1, …} of an evaluation, and its details {name: number}."""
        self._metrics.log(progress, split=scores["split"], **named(scores), **details, train_seconds=self.timer.total)

    def rewind(self, progress):
        """The run went back to this Progress: later lines are dropped."""
        self._logged = progress
        self._metrics.rewind(progress)

    def finish(self, progress, scores, scored_step, state, schedule, watchdog):
        """Close the records and print the result of the run on rank 0. Collective.

        scores       {split: scores} of the evaluations at the end
        scored_step  the step whose weights had them
        """
        if len(scores) == 2:  # test was kept for the end; otherwise its line is in the log
            self._metrics.log_once(progress, split="test", **named(scores["test"]), scored_step=scored_step)
        self._metrics.close()
        world, rss = self._world, torch.tensor(peak_rss_mb(), device=self._world.device)
        peak = world.all_ranks.all_reduce(rss, "max").item()
        watchdog.close()
        if world.rank != 0:
            return
        if schedule.auto and state.noise.grown == 1:
            print("warning: --batch-growth auto never let the batch grow: the gradient noise did not grow, or was not "
                  "known", file=sys.stderr)
        result = {"top1": None, "top5": None}
        for split in sorted(scores):
            result |= {name: value for name, value in named(scores[split]).items() if value is not None}
        result |= {"scored_step": scored_step,
                   "images_per_second": round(self.timer.images_per_second, 1), "peak_rss_mb": round(peak),
                   "steps": progress.step, "seconds": round(time.perf_counter() - _STARTED, 1), "run": self._cfg.out}
        print(f"resume with: {resume_command(self._cfg, world.size)}")
        print(json.dumps(result), flush=True)


def named(scores):
    """The scores as logs name them. Those of val have val_ before their names, so that they are never taken for those
    of test."""
    split = scores["split"]
    prefix = "" if split == "test" else f"{split}_"
    names = {"bad_records": f"bad_{split}_records"}
    return {names.get(name, prefix + name): value for name, value in scores.items() if name != "split"}
