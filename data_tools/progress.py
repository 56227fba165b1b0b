"""What a command says on stderr while it works."""

import sys
import time

from tqdm import tqdm

from xc.message import one_line


class Progress:
    """A bar where stderr is a terminal, otherwise a line every few seconds. total, in `unit`, may be unknown."""

    line_seconds = 5

    def __init__(self, what, total=None, unit="images"):
        self.what, self.total, self.unit, self.done, self._shown = what, total, unit, 0, time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True) if sys.stderr.isatty() else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._bar is not None:
            self._bar.close()

    def add(self, count):
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._shown >= self.line_seconds:
            self._shown = time.monotonic()
            note(f"{self.what}: {self.done:.0f}{f' of {self.total:.0f}' if self.total else ''} {self.unit}")


def note(text):
    print(one_line(text), file=sys.stderr, flush=True)  # names of files may hold anything
