"""What a step uses: learning rate, global batch, density, as pure functions of how far the run is.

Time is counted in rounds, passages of --global-batch examples: a step takes one of them, or with FCCS's growing batch
several, whose gradients are added up. Epochs, examples and shares of the run are rounds at once, whatever the batch
grows to; so are the examples seen. Nothing here knows the number of ranks: they share every round.
"""

import bisect
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property


@dataclass(frozen=True)
class Now:
    """What one step uses."""

    lr: float
    global_batch: int  # examples of the step over all ranks and rounds
    micro_batches: int = 1  # parts that the step is computed in, of all its rounds
    density: float = 1.0  # share of the backbone's gradients that is sent, with --exchange dgc
    rounds: int = 1  # of the step
    round: int = 0  # rounds before it


@dataclass(frozen=True)
class Position:
    """How far a run is, between two steps."""

    step: int = 0  # updates done
    examples: int = 0  # seen, over all ranks
    last_batch: int = 0  # examples of the last update

    def after(self, now):
        """Where the step that used `now` leads."""
        return Position(self.step + 1, self.examples + now.global_batch, now.global_batch)


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then `kind`, in rounds. Where a Config gives a length in steps, they are of one round.

    kind        constant | cosine (to zero) | step (times 0.1 at each of `drops`, shares of the run) | poly (to zero as
                (1 - t)^power) | fccs
    rounds      of the whole run
    batch       examples of a round
    num_records examples of an epoch
    density     reached within density_warmup rounds by quarters: 1/4, 1/16, … (Lin et al. 2018)

    FCCS, fast continuous convergence strategy (Song et al. 2020; its formulas are not known, these are ours): the rate
    is held after the warm-up; after `hold` rounds the batch grows over `growth` rounds to `most` rounds a step,

        1 + (most - 1) (1 - cos pi t) / 2 rounds, t from 0 to 1 over the growth's examples,

    which calms the updates as a falling rate would, with fewer of them (Smith et al. 2018); in the last `tail` rounds
    the rate falls to zero by a cosine. With `auto` it is not t that the batch grows by but `factor`, which
    noise_scale.py measures, up to the noise scale.
    """

    kind: str
    lr: float
    rounds: int
    warmup: int
    batch: int
    num_records: int
    drops: tuple = ()
    power: float = 2.0
    hold: int = 0
    growth: int = 0
    tail: int = 0
    most: int = 1
    auto: bool = False
    micro_batches: int = 1  # of a round
    density: float = 1.0
    density_warmup: int = 0

    @classmethod
    def of(cls, cfg, num_records, num_ranks):
        """The schedule that a Config asks for on a training set of that size; ValueError if it does not fit."""
        batch = cfg.global_batch
        if batch < num_ranks:
            raise ValueError(f"--global-batch {batch} is less than the {num_ranks} ranks: every rank needs an example, "
                             "take a larger batch or fewer ranks")
        if batch % cfg.micro_batches:
            raise ValueError(f"--micro-batches {cfg.micro_batches} does not divide --global-batch {batch}: take a "
                             "divisor")
        if batch // num_ranks < cfg.micro_batches:
            raise ValueError(f"--micro-batches {cfg.micro_batches} is more than the {batch // num_ranks} examples of a "
                             f"rank (--global-batch {batch} on {num_ranks} ranks): take fewer")
        fccs = cfg.schedule == "fccs"
        largest, flag = (cfg.max_batch, "--max-batch") if fccs and cfg.max_batch else (batch, "--global-batch")
        if largest > num_records:
            raise ValueError(f"{flag} {largest} is more than the {num_records} training examples, which cannot fill "
                             "it: take a smaller one")
        if largest % batch:
            raise ValueError(f"--max-batch {largest} is not a multiple of --global-batch {batch}: take "
                             f"{max(1, round(largest / batch)) * batch}")

        def with_rounds(total):
            def rounds(text):
                return _rounds(text, total, batch, num_records)

            one = cls(cfg.schedule, cfg.lr, total, rounds(cfg.warmup), batch, num_records, cfg.lr_drops, cfg.poly_power,
                      micro_batches=cfg.micro_batches, density=cfg.density, density_warmup=rounds(cfg.density_warmup))
            if not fccs:
                return one
            hold, growth, tail = (rounds(text) for text in (cfg.hold, cfg.growth, cfg.tail))
            growth = growth or max(0, total - one.warmup - hold - tail)
            return replace(one, hold=hold, growth=growth, tail=tail, most=largest // batch, auto=cfg.fccs == "auto")

        if cfg.steps and fccs and largest > batch:
            schedule = _of_steps(cfg, with_rounds, largest // batch)
        else:
            total = cfg.steps or round(cfg.epochs * num_records / batch)
            if total > _MOST_ROUNDS:
                given = f"--steps {cfg.steps}" if cfg.steps else f"--epochs {cfg.epochs:g}"
                raise ValueError(f"{given} are {total:.0e} times --global-batch {batch}: take at most "
                                 f"{_MOST_ROUNDS:.0e}")
            schedule = with_rounds(max(1, total))
        schedule._check(cfg)
        return schedule

    def _check(self, cfg):
        steps = "rounds of --global-batch" if self.kind == "fccs" else "steps"
        if self.warmup >= self.rounds > 1:
            raise ValueError(f"--warmup {cfg.warmup} is {self.warmup} {steps}, but the run has {self.rounds}: take a "
                             "shorter warm-up or a longer run")
        if self.kind == "fccs":
            parts = {name: getattr(self, name) for name in ("warmup", "hold", "growth", "tail") if getattr(self, name)}
            if sum(parts.values()) > max(self.rounds, self.warmup):
                text = " + ".join(f"--{name} {getattr(cfg, name)} ({n})" for name, n in parts.items())
                raise ValueError(f"{text} are {sum(parts.values())} {steps}, but the run has {self.rounds}: shorten "
                                 "one, or take a longer run")
            if self.most > 1 and not self.growth and self.rounds > 1:
                raise ValueError(f"--hold {cfg.hold} and --tail {cfg.tail} leave the batch no time to grow to "
                                 f"--max-batch {cfg.max_batch}: shorten one, or leave --max-batch out")
        if cfg.exchange != "dense" and cfg.density < 0.25 and self.density_warmup >= self.rounds > 1:
            raise ValueError(f"--density-warmup {cfg.density_warmup} is {self.density_warmup} {steps}, but the run has "
                             f"{self.rounds} and would not reach --density {cfg.density}: take a shorter warm-up")

    def done(self, progress):
        """Whether the run is complete."""
        return progress.examples == self.examples

    @property
    def micro_batch(self):
        """Examples of a micro-batch over all ranks."""
        return self.batch // self.micro_batches

    @property
    def examples(self):
        """Of the whole run."""
        return self.rounds * self.batch

    @cached_property
    def starts(self):
        """Rounds before each step; not with `auto`."""
        if self.most == 1:
            return range(self.rounds)
        starts, done = [], 0
        while done < self.rounds:
            starts.append(done)
            done += self.rounds_at(done)
        return starts

    @property
    def num_steps(self):
        """Updates of the whole run; None with `auto`, where it is not known before."""
        return None if self.auto else len(self.starts)

    @property
    def course(self):
        """What checkpoints of courses that do not follow from the number of examples have in common."""
        return f"auto, by {self.batch}" if self.auto else "fixed"

    @property
    def least_steps(self):
        return -(-self.rounds // self.most) if self.auto else self.num_steps

    def grows(self, position):
        """Whether `auto` may make the batch grow."""
        return self.auto and position.examples >= (self.warmup + self.hold) * self.batch

    def is_warm(self, position):
        return position.examples >= self.warmup * self.batch

    def resume(self, position):
        """The Position of a checkpoint to go on from; ValueError if it belongs elsewhere."""
        if position.examples > self.examples:
            raise ValueError(f"the checkpoint is {position.step} steps ({position.examples} examples) into its run, "
                             f"this one ends after {self.num_steps or '?'} ({self.examples}): give more --epochs or "
                             "--steps")
        if self.auto:
            expected = position.examples // self.batch
        else:
            expected = [*self.starts[position.step : position.step + 1], self.rounds][0]
        if expected * self.batch != position.examples:
            raise ValueError(
                f"the checkpoint had seen {position.examples} examples after {position.step} steps, this schedule "
                f"{expected * self.batch}: resume with the same --global-batch and the same course of the batch")
        return position

    def at(self, position, factor=1.0):
        """What the step after a Position uses. factor: of the growth, with `auto`."""
        done = position.examples // self.batch
        rounds = self.rounds_at(done, factor)
        return Now(self.lr * self._rate(done), rounds * self.batch, rounds * self.micro_batches, self._density(done),
                   rounds, done)

    def rounds_at(self, done, factor=1.0):
        """Rounds of the step that comes after so many rounds; the last step is cut where the run ends."""
        rounds, grown = 1, done - self.warmup - self.hold
        if self.auto and grown >= 0:
            rounds = min(self.most, round(factor))
        elif self.most > 1 and grown >= 0:
            share = min(1.0, grown / max(1, self.growth))
            rounds = round(1 + (self.most - 1) * (1 - math.cos(math.pi * share)) / 2)
        return min(max(1, rounds), self.rounds - done)

    def due(self, position, every):
        """Whether something is due at a Position that is done after every `interval`; never before the first update
        and after the last one."""
        count, unit = interval(every)
        if not count or not position.step or position.examples >= self.examples:
            return False
        if unit == "steps":
            return position.step // count > (position.step - 1) // count
        every = {"epochs": self.num_records, "examples": 1, "percent": self.examples / 100}[unit] * count
        return position.examples // every > (position.examples - position.last_batch) // every

    def _density(self, done):
        if done >= self.density_warmup:
            return self.density
        stages = math.ceil(math.log(self.density) / math.log(0.25))  # of equal length; the last is the density itself
        return max(self.density, 0.25 ** (1 + done * stages // self.density_warmup))

    def _rate(self, done):
        if done < self.warmup:
            return (done + 1) / self.warmup
        share = min(1.0, (done - self.warmup) / max(1, self.rounds - self.warmup))
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        if self.kind == "poly":
            return (1 - share) ** self.power
        if self.kind == "step":
            return 0.1 ** sum(done >= drop * self.rounds for drop in self.drops)
        if self.kind == "fccs" and done > self.rounds - self.tail:
            return 0.5 * (1 + math.cos(math.pi * (1 - (self.rounds - done) / self.tail)))
        return 1.0


def _of_steps(cfg, with_rounds, most):
    """The schedule of exactly --steps updates, of several rounds each; how many rounds that takes has to be tried."""
    if cfg.fccs == "auto":
        raise ValueError(f"--steps {cfg.steps} cannot be kept to with --fccs auto, whose updates depend on the noise: "
                         "give --epochs")
    if cfg.steps * most > _MOST_ROUNDS:
        raise ValueError(f"--steps {cfg.steps} are up to {cfg.steps * most:.0e} times --global-batch "
                         f"{cfg.global_batch}: take at most {_MOST_ROUNDS:.0e}")
    near = bisect.bisect_left(range(cfg.steps * most), cfg.steps, 1, key=lambda total: with_rounds(total).num_steps)
    for total in sorted(range(max(1, near - 2 * most), near + 2 * most), key=lambda total: abs(total - near)):
        if (schedule := with_rounds(total)).num_steps == cfg.steps:
            return schedule
    raise ValueError(f"no course with these parts has exactly --steps {cfg.steps}: give --epochs")


SCHEDULES = ("constant", "cosine", "step", "poly", "fccs")
_MOST_ROUNDS = 10**8
_UNITS = {"": "epochs", "%": "percent"}


def interval(text):
    """(number, unit: epochs, steps, examples or percent) of a text such as 0.5epochs, 500steps, 1e6examples, 5 % (of
    the run) or 0.5, which are epochs; None if it is not one. Numbers of up to 15 digits."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{0,15})?(?:e\d)?) ?(?:(epoch|step|example)s?|(%?))", text)
    return (float(match[1]), f"{match[2]}s" if match[2] else _UNITS[match[3]]) if match else None


def _rounds(text, total, batch, num_records):
    """An interval in rounds."""
    count, unit = interval(text)
    per_unit = {"epochs": num_records / batch, "steps": 1, "examples": 1 / batch, "percent": total / 100}
    return round(count * per_unit[unit])
