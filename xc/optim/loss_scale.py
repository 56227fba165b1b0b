"""Loss scaling, without which small gradients vanish in float16."""

from dataclasses import dataclass

_GROW_AFTER = 2000  # steps without an overflow
_LARGEST = 2.0**24


@dataclass
class LossScale:
    """What feature gradients are multiplied by before they enter the backbone, and its gradients divided by again.

    Dynamic (Micikevicius et al. 2018): halved by a step whose gradients overflow, which is skipped on all ranks;
    doubled after 2,000 steps without one. With anything but fp16 it is 1 for ever, and nobody looks for overflows.
    """

    active: bool = False
    scale: float = 1.0
    good_steps: int = 0

    @classmethod
    def of(cls, cfg):
        return cls(True, 2.0**16) if cfg.amp == "fp16" else cls()

    def update(self, finite):
        """After every step. finite: whether its gradients were, the same on every rank."""
        if not finite:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
        elif self.active:
            self.good_steps += 1
            if self.good_steps >= _GROW_AFTER:
                self.scale, self.good_steps = min(_LARGEST, self.scale * 2), 0
