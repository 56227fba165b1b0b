"""The report of images that are left out of a pack."""

import math
import os
from collections import Counter

from xc.pack import PackError

NAMED = 5  # how many of a long list a message names
_ESCAPES = {ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"}


def row(*cells):
    """A line of a TSV file, with \\t, \\n, \\r and \\\\ in place of what would end a cell."""
    return "\t".join(str(cell).translate(_ESCAPES) for cell in cells) + "\n"


HEADER = row("path", "reason")


class Tally:
    """How many images were left out, of_split Counter {split: number}, and the first of them, with why."""

    def __init__(self, of_split=(), first=()):
        self.of_split, self.first = Counter(of_split), list(first)

    @property
    def count(self):
        return self.of_split.total()

    def add(self, split, path, reason):
        self.of_split[split] += 1
        if len(self.first) < NAMED:
            self.first.append(f"{path} ({reason})")

    def __add__(self, other):
        return Tally(self.of_split + other.of_split, (self.first + other.first)[:NAMED])

    def __str__(self):
        return ", ".join(self.first) + (", …" if self.count > NAMED else "")

    def as_json(self):
        return {"of_split": self.of_split, "first": self.first}

    def check(self, allowed, total=None):
        """PackError where they are too many.

        allowed  "100", or "1%" of the total, which is not known (None) before all are listed
        """
        if allowed.endswith("%"):
            most = math.inf if total is None else int(float(allowed[:-1]) / 100 * total)
        else:
            most = int(allowed)
        if self.count > most:
            raise PackError(f"{self.count}{'' if total is None else f' of {total}'} images cannot be used, but "
                            f"--max-skipped {allowed} allows {most}: {self}; mend or remove them, or allow more")


class Skipped:
    """Writes the images that are left out to a file, and ends the packing where they are too many.

    path           of the file, without a header
    allowed,total  as for Tally.check
    before         Tally of those that other files have
    resumed        what `state` gave to an earlier process: the file is cut back to it

    tally    of this file; ignored  Counter of what is no image: {what: number}
    """

    def __init__(self, path, allowed, total=None, before=None, resumed=None):
        self.tally, self.ignored = Tally(**resumed["tally"]) if resumed else Tally(), Counter()
        self._allowed, self._total, self._before = allowed, total, before or Tally()
        self._file = open(path, "a", encoding="utf-8", errors="surrogateescape", newline="\n")  # noqa: SIM115
        self._file.truncate(resumed["length"] if resumed else 0)
        self.check()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def add(self, split, path, reason):
        self._file.write(row(path, reason))
        self.tally.add(split, path, reason)
        self.check()

    def all(self):
        """Tally of these and of those before."""
        return self._before + self.tally

    def check(self):
        self.all().check(self._allowed, self._total)

    def state(self):
        """For JSON; what it counts is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"length": os.fstat(self._file.fileno()).st_size, "tally": self.tally.as_json()}
