"""Progress and notes of a command, on stderr."""

import sys
import time

from tqdm import tqdm

from xc.message import one_line


class Progress:
    """A bar if stderr is a terminal, otherwise a line every few seconds; both with rate and time left.

    total  in `unit`; None: unknown
    done   how much was done before
    """

    line_seconds = 5

    def __init__(self, what, total=None, unit="images", done=0):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._before, self._started = done, time.monotonic()
        self._shown = self._started
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=what, unit=f" {unit}", unit_scale=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._bar is not None:
            self._bar.close()

    def add(self, count):
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (now := time.monotonic()) - self._shown >= self.line_seconds:
            self._shown = now
            rate = (self.done - self._before) / max(now - self._started, 1e-9)
            of = f" of {self.total:,.0f}" if self.total else ""
            left = f", {_duration((self.total - self.done) / rate)} left" if self.total and rate else ""
            note(f"{self.what}: {self.done:,.0f}{of} {self.unit}, {rate:,.{0 if rate >= 10 else 1}f}/s{left}")


def _duration(seconds):
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def note(text):
    print(one_line(text), file=sys.stderr, flush=True)  # names of files may have any characters
