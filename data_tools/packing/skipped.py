"""Images that are not packed: those that cannot be, up to a limit, and those that are left out on purpose."""

import math
import os
from collections import Counter

from xc.data.pack import PackError

NAMED = 5  # most items of a list that a message names
_ESCAPES = {ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"}


def row(*cells):
    """A line of a TSV file, in which \\t, \\n, \\r and \\\\ stand for tabs, ends of lines and backslashes in cells."""
    return "\t".join(str(cell).translate(_ESCAPES) for cell in cells) + "\n"


HEADER = row("path", "reason")


class Tally:
    """Counts of images that cannot be packed: of_split {split: number}, and the paths and reasons of the first."""

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
        """PackError where there are too many.

        allowed  "100", or "1%" of the total
        total    number of all images; None: not known yet
        """
        if allowed.endswith("%"):
            most = math.inf if total is None else int(float(allowed[:-1]) / 100 * total)
        else:
            most = int(allowed)
        if self.count > most:
            raise PackError(f"{self.count}{'' if total is None else f' of {total}'} images cannot be used, but "
                            f"--max-skipped {allowed} allows {most}: {self}; repair or remove them, or allow more")


class Skipped:
    """Writes the images that cannot be packed to a file; PackError where there are too many.

    path            of the file, which has no header
    allowed, total  as for Tally.check
    before          Tally of the images in other files
    resumed         `state` of an earlier process: the file is truncated to it

    tally  Tally of this file
    """

    def __init__(self, path, allowed, total=None, before=None, resumed=None):
        self.tally = Tally(**resumed["tally"]) if resumed else Tally()
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
        """Tally of this file and of those before."""
        return self._before + self.tally

    def check(self):
        self.all().check(self._allowed, self._total)

    def state(self):
        """dict for JSON, from which a process can resume; what it counts is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"length": os.fstat(self._file.fileno()).st_size, "tally": self.tally.as_json()}


class LeftOut:
    """Adds the images that are left out on purpose to a file without a header: the path and reason of each.

    path    of the file, which is made for the first image if there is none
    counts  Counter {reason: images}
    """

    def __init__(self, path):
        self._path, self._file, self.counts = path, None, Counter()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._file is not None:
            self._file.close()

    def add(self, path, reason):
        if self._file is None:
            self._file = open(self._path, "a", encoding="utf-8", errors="surrogateescape", newline="\n")  # noqa: SIM115
        self._file.write(row(path, reason))
        self.counts[reason] += 1
