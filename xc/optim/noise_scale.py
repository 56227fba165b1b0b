"""The gradient noise scale: the batch size beyond which more examples per step bring little."""

from dataclasses import dataclass

EVERY = 4  # steps between two measurements; one costs two passes over the gradients
_KEEP = 0.98  # weight of the old estimate in the smoothing
_SURE = 2.0  # the signal must be this many standard errors above 0, or the noise scale is not known
_FASTEST = 1.1  # largest growth of the batch from one measurement to the next


@dataclass
class NoiseScale:
    """Estimates the noise scale B = tr(covariance of an example's gradient) / |gradient|².

    McCandlish et al. 2018, appendix A: a batch of b examples has E|g|² = |gradient|² + tr / b, so batches of two sizes
    give both terms. Each term is smoothed on its own, since their quotient has no finite mean.

    signal     |gradient|², smoothed over about 50 measurements
    noise      tr, smoothed likewise
    last       |gradient|² of the last measurement
    scatter    its variance: half the squared difference of two measurements, smoothed; a trend adds little
    looks      number of measurements
    grown      factor on the batch of FCCS: rises up to the noise scale, where a step is worth half of one that uses the
               exact gradient; never falls
    """

    signal: float = 0.0
    noise: float = 0.0
    last: float = 0.0
    scatter: float = 0.0
    looks: int = 0
    grown: float = 1.0

    def measure(self, small, per_small, big, per_big, grows_from=0):
        """Take in |g|² of a small and of a big batch; per_small and per_big are 1 / (examples of the batch).

        grows_from: examples of the batch that `grown` multiplies; 0 while `grown` must not change
        """
        noise = (small - big) / (per_small - per_big)
        signal = big - noise * per_big
        keep = min(_KEEP, self.looks / (self.looks + 1))  # the first measurements have equal weights
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
        """The noise scale in examples; None while it is not known: estimates of the signal can be below 0."""
        if self.looks < 4 or self.noise <= 0:
            return None
        looks = min(self.looks, (1 + _KEEP) / (1 - _KEEP))  # independent measurements with the same standard error
        error = (self.scatter / looks) ** 0.5
        return self.noise / self.signal if self.signal > _SURE * error else None
