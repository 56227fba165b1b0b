"""Loss scaling for float16, in which small gradients become zero."""

from dataclasses import dataclass

_GROW_AFTER = 2000  # steps without an overflow
_LARGEST = 2.0**24


@dataclass
class LossScale:
    """Factor on the feature gradients before they enter the backbone; its gradients are divided by it afterwards.

    Dynamic (Micikevicius et al. 2018): a step whose gradients overflow halves the factor and is skipped on all ranks;
    2,000 steps without an overflow double it. Without fp16 the factor stays 1 and nothing is checked for overflows.
    """

    active: bool = False
    scale: float = 1.0
    good_steps: int = 0

    @classmethod
    def of(cls, cfg):
        """The LossScale of a Config."""
        return cls(True, 2.0**16) if cfg.amp == "fp16" else cls()

    def update(self, finite):
        """Call after every step. finite: whether its gradients were finite, the same on every rank."""
        if not finite:
            self.scale, self.good_steps = max(1.0, self.scale / 2), 0
        elif self.active:
            self.good_steps += 1
            if self.good_steps >= _GROW_AFTER:
                self.scale, self.good_steps = min(_LARGEST, self.scale * 2), 0
