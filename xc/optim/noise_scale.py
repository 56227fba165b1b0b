"""How noisy gradients are: the batch beyond which more examples a step bring little."""

from dataclasses import dataclass

EVERY = 4  # steps between two looks, whose price is two passes over the gradients
_KEEP = 0.98  # weight of what was known before a look
_SURE = 2.0  # standard errors that the signal must be above 0 for its noise scale to count as known
_FASTEST = 1.1  # growth of the batch from one look to the next


@dataclass
class NoiseScale:
    """Estimates the gradient noise scale B = tr(covariance of an example's gradient) / |gradient|² (McCandlish et al.
    2018, appendix A): a batch of b examples has E|g|² = |gradient|² + tr / b, so two batches of different size tell
    both terms. Each is smoothed for itself, since their quotient has no good mean.

    signal     |gradient|², smoothed over about 50 looks
    noise      tr, smoothed alike
    last       |gradient|² of the last look
    scatter    its variance: half the squared difference of two looks, smoothed, so that a falling signal is none
    looks      taken so far
    grown      what FCCS multiplies the batch by: up to the noise scale, at which a step is worth half of one that knew
               the gradient itself; never down
    """

    signal: float = 0.0
    noise: float = 0.0
    last: float = 0.0
    scatter: float = 0.0
    looks: int = 0
    grown: float = 1.0

    def look(self, small, per_small, big, per_big, grows_from=0):
        """|g|² of a small and of a large batch, and one over the batches' sizes.

        grows_from: the batch that `grown` multiplies; 0 while it may not grow
        """
        noise = (small - big) / (per_small - per_big)
        signal = big - noise * per_big
        keep = min(_KEEP, self.looks / (self.looks + 1))  # the first looks count alike
        self.noise += (1 - keep) * (noise - self.noise)
        self.signal += (1 - keep) * (signal - self.signal)
        if self.looks:
            keep = min(_KEEP, (self.looks - 1) / self.looks)
            self.scatter += (1 - keep) * ((signal - self.last) ** 2 / 2 - self.scatter)
        self.last = signal
        self.looks += 1
        if grows_from and self.examples:
            self.grown = min(max(self.grown, self.examples / grows_from), _FASTEST * self.grown)

    @property
    def examples(self):
        """The noise scale, a batch; None while it is not known: the signal's estimates scatter, below 0 too."""
        if self.looks < 4 or self.noise <= 0:
            return None
        looks = min(self.looks, (1 + _KEEP) / (1 - _KEEP))  # as many single ones scatter like the smoothed one
        error = (self.scatter / looks) ** 0.5
        return self.noise / self.signal if self.signal > _SURE * error else None
