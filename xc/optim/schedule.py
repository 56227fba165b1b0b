"""Learning rate, global batch and density of a step, as pure functions of how far the run is.

Time is counted in accumulation steps: passes over --global-batch examples. A step is one of them or, while FCCS grows
the batch, several whose gradients are added up. Epochs, examples and shares of the run convert to accumulation steps
directly, whatever the batch grows to. Nothing here depends on the number of ranks: they share every accumulation step.

A new schedule of the learning rate is one function and one line in DECAYS.
"""

import bisect
import math
from dataclasses import dataclass, replace
from functools import cached_property

from xc.config import FLAGS_OF_EXCHANGES
from xc.intervals import interval


@dataclass(frozen=True)
class StepPlan:
    """What one step uses."""

    lr: float
    global_batch: int  # examples over all ranks and accumulation steps
    micro_batches: int = 1  # over all accumulation steps
    density: float = 1.0  # share of the backbone's gradients that is sent, with --exchange dgc
    accumulation_steps: int = 1
    first_accumulation_step: int = 0  # accumulation steps of the run before this step


@dataclass(frozen=True)
class Progress:
    """How far a run is, between two steps."""

    step: int = 0  # steps done
    examples: int = 0  # seen by all ranks
    last_batch: int = 0  # examples of the last step

    def after(self, plan):
        """The Progress after a step with this StepPlan."""
        return Progress(self.step + 1, self.examples + plan.global_batch, plan.global_batch)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a decay of the learning rate; with FCCS the batch grows. Lengths are in accumulation steps.

    kind            name in DECAYS
    length          of the whole run
    batch           examples of an accumulation step
    num_records     examples of an epoch
    micro_batches   of an accumulation step
    density         share of gradients sent after density_warmup, during which it falls 1/4, 1/16, … (Lin et al. 2018)

    FCCS, fast continuous convergence strategy (Song et al. 2020; its formulas are not published, these are ours): the
    rate is constant after the warm-up. After `hold` the batch grows, over `growth`, to max_accumulation_steps = n:

        1 + (n - 1) (1 - cos pi t) / 2 accumulation steps per step, t from 0 to 1 over the examples of the growth

    A growing batch calms the updates as a falling rate would, with fewer updates (Smith et al. 2018). In the last
    `tail` the rate falls to zero by a cosine. With `auto` the batch grows with the noise scale of noise_scale.py.
    """

    kind: str
    lr: float
    length: int
    warmup: int
    batch: int
    num_records: int
    hold: int = 0
    growth: int = 0
    tail: int = 0
    max_accumulation_steps: int = 1
    auto: bool = False
    micro_batches: int = 1
    density: float = 1.0
    density_warmup: int = 0

    @classmethod
    def of(cls, cfg, num_records, num_ranks):
        """The Schedule of a Config for a training set of num_records examples; ValueError where it does not fit."""
        batch, fccs = cfg.global_batch, cfg.schedule == "fccs"
        largest = _largest_batch(cfg, num_records, num_ranks)

        def of_length(length):
            def steps(text):
                return _accumulation_steps(text, length, batch, num_records)

            one = cls(cfg.schedule, cfg.lr, length, steps(cfg.warmup), batch, num_records,
                      micro_batches=cfg.micro_batches, density=cfg.density, density_warmup=steps(cfg.density_warmup))
            if not fccs:
                return one
            hold, growth, tail = (steps(text) for text in (cfg.fccs_hold, cfg.fccs_growth, cfg.fccs_tail))
            growth = growth or max(0, length - one.warmup - hold - tail)
            return replace(one, hold=hold, growth=growth, tail=tail, max_accumulation_steps=largest // batch,
                           auto=cfg.batch_growth == "auto")

        if cfg.steps and fccs and largest > batch:
            schedule = _with_steps(cfg, of_length, largest // batch)
        else:
            length = cfg.steps or round(cfg.epochs * num_records / batch)
            if length > _MAX_LENGTH:
                given = f"--steps {cfg.steps}" if cfg.steps else f"--epochs {cfg.epochs:g}"
                raise ValueError(f"{given} are {length:.0e} times --global-batch {batch}: take at most "
                                 f"{_MAX_LENGTH:.0e}")
            schedule = of_length(max(1, length))
        schedule._check(cfg)
        return schedule

    def _check(self, cfg):
        """ValueError where the parts of the schedule do not fit the run."""
        steps = "accumulation steps of --global-batch" if self.kind == "fccs" else "steps"
        if self.warmup >= self.length > 1:
            raise ValueError(f"--warmup {cfg.warmup} is {self.warmup} {steps}, but the run has {self.length}: take a "
                             "shorter warm-up or a longer run")
        if self.kind == "fccs":
            parts = {"warmup": self.warmup, "fccs_hold": self.hold, "fccs_growth": self.growth, "fccs_tail": self.tail}
            if sum(parts.values()) > max(self.length, self.warmup):
                text = " + ".join(f"--{name.replace('_', '-')} {getattr(cfg, name)} ({n})"
                                  for name, n in parts.items() if n)
                raise ValueError(f"{text} are {sum(parts.values())} {steps}, but the run has {self.length}: shorten "
                                 "one, or take a longer run")
            if self.max_accumulation_steps > 1 and not self.growth and self.length > 1:
                raise ValueError(f"--fccs-hold {cfg.fccs_hold} and --fccs-tail {cfg.fccs_tail} leave the batch no "
                                 f"time to grow to --max-batch {cfg.max_batch}: shorten one, or leave --max-batch out")
        sparse = "density" in FLAGS_OF_EXCHANGES[cfg.exchange] and cfg.density < 0.25
        if sparse and self.density_warmup >= self.length > 1:
            raise ValueError(f"--density-warmup {cfg.density_warmup} is {self.density_warmup} {steps}, but the run has "
                             f"{self.length} and would not reach --density {cfg.density}: take a shorter warm-up")

    def done(self, progress):
        """Whether the run is complete."""
        return progress.examples == self.examples

    @property
    def micro_batch(self):
        """Examples of a micro-batch over all ranks."""
        return self.batch // self.micro_batches

    @property
    def examples(self):
        """Examples of the whole run."""
        return self.length * self.batch

    @cached_property
    def starts(self):
        """The first accumulation step of each step; not defined with `auto`."""
        if self.max_accumulation_steps == 1:
            return range(self.length)
        starts, done = [], 0
        while done < self.length:
            starts.append(done)
            done += self.accumulation_steps_at(done)
        return starts

    @property
    def num_steps(self):
        """Steps of the whole run; None with `auto`, where it is not known in advance."""
        return None if self.auto else len(self.starts)

    @property
    def least_steps(self):
        """The smallest number of steps that the run can have."""
        return -(-self.length // self.max_accumulation_steps) if self.auto else self.num_steps

    @property
    def batch_schedule(self):
        """A text that a checkpoint and the run that resumes it must share; only `auto` is told apart."""
        return f"auto, by {self.batch}" if self.auto else "fixed"

    def grows(self, progress):
        """Whether `auto` may make the batch grow at a Progress."""
        return self.auto and progress.examples >= (self.warmup + self.hold) * self.batch

    def is_warm(self, progress):
        """Whether the warm-up of the learning rate is over at a Progress."""
        return progress.examples >= self.warmup * self.batch

    def resume(self, progress):
        """The given Progress of a checkpoint; ValueError where this schedule never comes by it."""
        if progress.examples > self.examples:
            raise ValueError(f"the checkpoint is {progress.step} steps ({progress.examples} examples) into its run, "
                             f"this one ends after {self.num_steps or '?'} ({self.examples}): give more --epochs or "
                             "--steps")
        if self.auto:
            expected = progress.examples // self.batch
        else:
            expected = [*self.starts[progress.step : progress.step + 1], self.length][0]
        if expected * self.batch != progress.examples:
            raise ValueError(
                f"the checkpoint had seen {progress.examples} examples after {progress.step} steps, this schedule "
                f"{expected * self.batch}: resume with the same --global-batch and the same schedule of the batch")
        return progress

    def plan(self, progress, factor=1.0):
        """The StepPlan of the step after a Progress. factor: measured growth of the batch, with `auto`."""
        done = progress.examples // self.batch
        steps = self.accumulation_steps_at(done, factor)
        return StepPlan(self.lr * self._rate(done), steps * self.batch, steps * self.micro_batches,
                        self._density(done), steps, done)

    def accumulation_steps_at(self, done, factor=1.0):
        """Accumulation steps of the step that follows after `done` of them; the end of the run cuts the last step."""
        steps, growing = 1, done - self.warmup - self.hold
        if self.auto and growing >= 0:
            steps = min(self.max_accumulation_steps, round(factor))
        elif self.max_accumulation_steps > 1 and growing >= 0:
            share = min(1.0, growing / max(1, self.growth))
            steps = round(1 + (self.max_accumulation_steps - 1) * (1 - math.cos(math.pi * share)) / 2)
        return min(max(1, steps), self.length - done)

    def due(self, progress, every, first="0", begun=True):
        """Whether something that is done every `interval` is due at a Progress; never before the first step and after
        the last one.

        first, begun  it is done for the first time at the time `first`, and from then on every interval; where it was
                      begun before, every interval until then, too. 0: for the first time after an interval
        """
        count, unit = interval(every)
        if not count or not progress.step or progress.examples >= self.examples:
            return False
        start = _count(first, self.length, self.batch, self.num_records) * self.batch
        if unit == "steps" and not start:
            return progress.step // count > (progress.step - 1) // count
        every = {"epochs": self.num_records, "examples": 1, "percent": self.examples / 100, "steps": self.batch}[unit]
        now, before = progress.examples, progress.examples - progress.last_batch
        if now < start:
            return begun and now // (every * count) > before // (every * count)
        if start and not begun:
            return True
        return (now - start) // (every * count) > (before - start) // (every * count)

    def times_due(self, every, first="0"):
        """How often something that is done every `interval`, from the time `first` on, is done in the whole run."""
        count, start = (_count(text, self.length, self.batch, self.num_records) for text in (every, first))
        if not count:
            return 0
        return max(0, math.ceil((self.length - start) / count - 1e-9) - (not start))

    def _density(self, done):
        if done >= self.density_warmup:
            return self.density
        stages = math.ceil(math.log(self.density) / math.log(0.25))  # of equal length; the last has the final density
        return max(self.density, 0.25 ** (1 + done * stages // self.density_warmup))

    def _rate(self, done):
        """The learning rate after `done` accumulation steps, as a share of the highest."""
        return (done + 1) / self.warmup if done < self.warmup else DECAYS[self.kind](self, done)


def _constant(schedule, done):
    return 1.0


def _cosine(schedule, done):
    """To zero at the end of the run by half a cosine wave (Loshchilov and Hutter 2017)."""
    share = min(1.0, (done - schedule.warmup) / max(1, schedule.length - schedule.warmup))
    return 0.5 * (1 + math.cos(math.pi * share))


def _step(schedule, done):
    """To a tenth after half of the run, and again after three quarters."""
    return 0.1 ** sum(done >= drop * schedule.length for drop in (0.5, 0.75))


def _fccs(schedule, done):
    """Constant until the tail, then to zero by half a cosine wave."""
    if done <= schedule.length - schedule.tail:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (1 - (schedule.length - done) / schedule.tail)))


# name -> f(schedule, accumulation steps done) -> learning rate after the warm-up as a share of the highest
DECAYS = {"constant": _constant, "cosine": _cosine, "step": _step, "fccs": _fccs}
_MAX_LENGTH = 10**8


def _largest_batch(cfg, num_records, num_ranks):
    """Examples of the largest step of a Config; ValueError where the batches do not fit the data or the ranks."""
    batch = cfg.global_batch
    if batch < num_ranks:
        raise ValueError(f"--global-batch {batch} is less than the {num_ranks} ranks: every rank needs an example, "
                         "take a larger batch or fewer ranks")
    if batch % cfg.micro_batches:
        raise ValueError(f"--micro-batches {cfg.micro_batches} does not divide --global-batch {batch}: take a divisor")
    if batch // num_ranks < cfg.micro_batches:
        raise ValueError(f"--micro-batches {cfg.micro_batches} is more than the {batch // num_ranks} examples of a "
                         f"rank (--global-batch {batch} on {num_ranks} ranks): take fewer")
    if batch == cfg.micro_batches:
        flags = f"--global-batch {batch}" + f" in --micro-batches {batch}" * (batch > 1)
        raise ValueError(f"{flags}: a micro-batch of one example has no statistics, its features would all be 0; take "
                         "at least two examples for each micro-batch")
    grows = cfg.schedule == "fccs" and cfg.max_batch
    largest, flag = (cfg.max_batch, "--max-batch") if grows else (batch, "--global-batch")
    if largest > num_records:
        raise ValueError(f"{flag} {largest} is more than the {num_records} training examples: take a smaller one")
    if largest % batch:
        raise ValueError(f"--max-batch {largest} is not a multiple of --global-batch {batch}: take "
                         f"{max(1, round(largest / batch)) * batch}")
    return largest


def _with_steps(cfg, of_length, max_accumulation_steps):
    """The Schedule of exactly --steps steps with a growing batch; the length that gives it is found by trying."""
    if cfg.batch_growth == "auto":
        raise ValueError(f"--steps {cfg.steps} cannot be kept to with --batch-growth auto, where the noise decides how "
                         "many steps there are: give --epochs")
    longest = cfg.steps * max_accumulation_steps
    if longest > _MAX_LENGTH:
        raise ValueError(f"--steps {cfg.steps} are up to {longest:.0e} times --global-batch {cfg.global_batch}: take "
                         f"at most {_MAX_LENGTH:.0e}")
    near = bisect.bisect_left(range(longest), cfg.steps, 1, key=lambda length: of_length(length).num_steps)
    lengths = range(max(1, near - 2 * max_accumulation_steps), near + 2 * max_accumulation_steps)
    for length in sorted(lengths, key=lambda length: abs(length - near)):
        if (schedule := of_length(length)).num_steps == cfg.steps:
            return schedule
    raise ValueError(f"no schedule with these parts has exactly --steps {cfg.steps}: give --epochs")


def _accumulation_steps(text, length, batch, num_records):
    """An interval in whole accumulation steps."""
    return round(_count(text, length, batch, num_records))


def _count(text, length, batch, num_records):
    """An interval in accumulation steps, not rounded."""
    count, unit = interval(text)
    return count * {"epochs": num_records / batch, "steps": 1, "examples": 1 / batch, "percent": length / 100}[unit]
