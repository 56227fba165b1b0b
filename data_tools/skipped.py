"""The report of images that are left out of a pack."""

import math
from collections import Counter

from xc.pack import PackError

NAMED = 5  # how many of a long list a message names
_ESCAPES = {ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"}


def row(*cells):
    """A line of a TSV file, with \\t, \\n, \\r and \\\\ in place of what would end a cell."""
    return "\t".join(str(cell).translate(_ESCAPES) for cell in cells) + "\n"


class Skipped:
    """Writes the images that are left out to a file, and ends the packing where they are too many.

    allowed  "100", or "1%" of the total, which is known when all are listed
    ignored  Counter of what is no image: {what: number}
    """

    def __init__(self, file, allowed):
        self.count, self.of_split, self.ignored = 0, Counter(), Counter()
        self._file, self._allowed, self._total, self._first = file, allowed, None, []
        self._most = math.inf if allowed.endswith("%") else int(allowed)
        file.write(row("path", "reason"))

    def add(self, split, path, reason):
        self._file.write(row(path, reason))
        self.count += 1
        self.of_split[split] += 1
        if self.count <= NAMED:
            self._first.append(f"{path} ({reason})")
        self._check()

    def set_total(self, total):
        self._total = total
        if self._allowed.endswith("%"):
            self._most = int(float(self._allowed[:-1]) / 100 * total)
        self._check()

    def _check(self):
        if self.count > self._most:
            of = "" if self._total is None else f" of {self._total}"
            raise PackError(f"{self.count}{of} images cannot be used, but --max-skipped {self._allowed} "
                            f"allows {self._most}: {self}; mend or remove them, or allow more")

    def __str__(self):
        return ", ".join(self._first) + (", …" if self.count > NAMED else "")
