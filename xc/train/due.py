"""What is to be done after a step, decided in one place."""

from dataclasses import dataclass

from xc.data.evaluated import split_while_training


@dataclass(frozen=True)
class Due:
    """log, evaluate, save  whether it is due; last: the step was the last one of the run, after which all of them
    are"""

    log: bool
    evaluate: bool
    save: bool
    last: bool

    @classmethod
    def after(cls, progress, schedule, cfg, splits):
        """What is due at this Progress. Evaluations need a split val or test."""
        last = schedule.done(progress)
        return cls(log=progress.step % cfg.log_steps == 0 or last,
                   evaluate=bool(split_while_training(splits)) and (schedule.due(progress, cfg.eval_every) or last),
                   save=schedule.due(progress, cfg.save_every) or last, last=last)

    @property
    def anything(self):
        return self.log or self.evaluate or self.save
