"""What a step uses: a learning rate and a global batch, as pure functions of the step."""

import math
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Now:
    """What one step uses."""

    lr: float
    global_batch: int
    micro_batches: int = 1
    density: float = 1.0  # share of the backbone's gradients that is sent, with --exchange dgc


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then `kind`.

    kind          constant | cosine (to zero) | step (times 0.1 at each of `drops`, shares of the run)
    steps         optimizer steps of the whole run
    warmup_steps  steps over which lr rises linearly
    num_records   examples of an epoch
    density       reached within density_warmup_steps by quarters: 1/4, 1/16, … (Lin et al. 2018)
    """

    kind: str
    lr: float
    steps: int
    warmup_steps: int
    drops: tuple
    global_batch: int
    num_records: int
    micro_batches: int = 1
    density: float = 1.0
    density_warmup_steps: int = 0

    @classmethod
    def of(cls, cfg, num_records, num_ranks):
        """The schedule that a Config asks for on a training set of that size; ValueError if it does not fit."""
        if cfg.global_batch < num_ranks:
            raise ValueError(f"--global-batch {cfg.global_batch} is less than the {num_ranks} ranks: every rank needs "
                             "an example, take a larger batch or fewer ranks")
        if cfg.global_batch % cfg.micro_batches:
            raise ValueError(f"--micro-batches {cfg.micro_batches} does not divide --global-batch {cfg.global_batch}: "
                             "take a divisor")
        if cfg.global_batch // num_ranks < cfg.micro_batches:
            raise ValueError(f"--micro-batches {cfg.micro_batches} is more than the {cfg.global_batch // num_ranks} "
                             f"examples of a rank (--global-batch {cfg.global_batch} on {num_ranks} ranks): take fewer")
        steps_per_epoch = num_records / cfg.global_batch
        steps = cfg.steps or max(1, round(cfg.epochs * steps_per_epoch))
        warmup_steps = round(cfg.warmup_epochs * steps_per_epoch)
        if warmup_steps >= steps > 1:
            raise ValueError(f"--warmup-epochs {cfg.warmup_epochs} is {warmup_steps} steps, but the run has {steps}: "
                             "take a shorter warm-up or a longer run")
        density_steps = round(cfg.density_warmup_epochs * steps_per_epoch)
        if cfg.exchange != "dense" and cfg.density < 0.25 and density_steps >= steps > 1:
            raise ValueError(f"--density-warmup-epochs {cfg.density_warmup_epochs} is {density_steps} steps, but the "
                             f"run has {steps} and would not reach --density {cfg.density}: take a shorter warm-up")
        return cls(cfg.schedule, cfg.lr, steps, warmup_steps, cfg.lr_drops, cfg.global_batch, num_records,
                   cfg.micro_batches, cfg.density, density_steps)

    def resume(self, position):
        """First step of a run that goes on from a checkpoint's position; ValueError if it belongs elsewhere."""
        if position["step"] > self.steps:
            raise ValueError(f"the checkpoint is {position['step']} steps into its run, this one ends after "
                             f"{self.steps}: give more --epochs or --steps")
        if position["examples"] != self.examples_before(position["step"]):
            raise ValueError(
                f"the checkpoint had seen {position['examples']} examples after {position['step']} steps, this "
                f"schedule {self.examples_before(position['step'])}: resume with the same --global-batch")
        return position["step"]

    def at(self, step):
        return Now(self.lr * self._factor(step), self.global_batch, self.micro_batches, self._density(step))

    def examples_before(self, step):
        """Examples that all steps before `step` have consumed, over all ranks."""
        return step * self.global_batch

    def due(self, step, every):
        """Whether something is due after `step` updates that is done every so many epochs (0: never) or, as a text,
        after every `interval`; never before the first update and after the last one."""
        count, unit = interval(every) if isinstance(every, str) else (every, "epochs")
        if not count or not 0 < step < self.steps:
            return False
        if unit == "steps":
            return step // count > (step - 1) // count
        every = count * self.num_records
        return self.examples_before(step) // every > self.examples_before(step - 1) // every

    def _density(self, step):
        if step >= self.density_warmup_steps:
            return self.density
        stages = math.ceil(math.log(self.density) / math.log(0.25))  # of equal length; the last is the density itself
        return max(self.density, 0.25 ** (1 + step * stages // self.density_warmup_steps))

    def _factor(self, step):
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.kind == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.kind == "step":
            return 0.1 ** sum(step >= drop * self.steps for drop in self.drops)
        return 1.0


SCHEDULES = ("constant", "cosine", "step")


def interval(text):
    """(number, unit) of a text such as 0.5epochs or 500steps; None if it is not one."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(epochs?|steps?)", text)
    if not match or not float(match[1]):
        return None
    return float(match[1]), match[2].rstrip("s") + "s"
