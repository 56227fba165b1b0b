"""How noisy gradients are: the batch beyond which more examples a step bring little."""

from dataclasses import dataclass

EVERY = 4  # steps between two looks, whose price is two passes over the gradients
_KEEP = 0.95  # weight of what was known before a look


@dataclass
class NoiseScale:
    """Estimates the gradient noise scale B = tr(covariance of an example's gradient) / |gradient|² (McCandlish et al.
    2018, appendix A): a batch of b examples has E|g|² = |gradient|² + tr / b, so two batches of different size tell
    both terms. Each is smoothed for itself, since their quotient has no good mean.

    signal     |gradient|², smoothed
    noise      tr, smoothed
    looks      taken so far
    reference  the noise scale when the batch began to grow; 0 before
    grown      the highest multiple of it since
    """

    signal: float = 0.0
    noise: float = 0.0
    looks: int = 0
    reference: float = 0.0
    grown: float = 1.0

    def look(self, small, per_small, big, per_big):
        """|g|² of a small and of a large batch, or means over several, and one over the batches' sizes, alike."""
        noise = (small - big) / (per_small - per_big)
        keep = min(_KEEP, self.looks / (self.looks + 1))  # the first looks count alike
        self.noise = keep * self.noise + (1 - keep) * noise
        self.signal = keep * self.signal + (1 - keep) * (big - noise * per_big)
        self.looks += 1

    @property
    def examples(self):
        """The noise scale, a batch; None while it is not known. The signal's estimate can be negative."""
        return self.noise / self.signal if self.signal > 0 and self.noise > 0 else None

    def growth(self):
        """What FCCS multiplies the batch by, once it may grow: as much as the noise scale has grown since then, so that
        a step stays as noisy as it was while its gradient shrinks. Never falls."""
        if self.examples:
            self.reference = self.reference or self.examples
            self.grown = max(self.grown, self.examples / self.reference)
        return self.grown
