"""Sorting more byte strings than memory holds: sorted runs on disk, merged."""

import heapq
import os
import struct

MAX_RUNS = 64  # merged at once; every run is an open file
ITEM_BYTES = 72  # that Python needs for a byte string besides its bytes, with its entry in a list or set
LENGTH = struct.Struct("<I")


class Sorter:
    """Takes byte strings of up to 2**32 − 1 bytes, and yields them sorted, once.

    folder        for the runs; it is made for the first run, and not at all if memory holds all strings
    memory_bytes  that the strings may take; the buffers of a merge take at most as much, but 64 KiB for each run
    unique        equal strings are yielded once
    """

    def __init__(self, folder, memory_bytes, unique=False):
        self._folder, self._memory_bytes, self._unique = folder, memory_bytes, unique
        self._levels, self._num_runs = [[]], 0  # files of runs, by how often their items were merged
        self._clear()

    def add(self, item):
        if self._unique:
            if item in self._items:
                return
            self._items.add(item)
        else:
            self._items.append(item)
        self._bytes += len(item) + ITEM_BYTES
        if self._bytes >= self._memory_bytes:
            self._spill()

    def __iter__(self):
        """Nothing can be added then. Memory does not hold what was yielded."""
        if not self._num_runs:
            items = sorted(self._items, reverse=True)
            self._clear()
            while items:
                yield items.pop()
            return
        self._spill()
        for level in range(len(self._levels)):  # the deepest keeps at most MAX_RUNS runs
            if level + 1 < len(self._levels) and self._levels[level]:
                self._join(level)
        yield from self._merged(self._levels[-1])

    def runs(self):
        """Paths of the runs, for `merged`; all strings are in these files. Nothing can be added then."""
        if self._items:
            self._spill()
        return [path for runs in self._levels for path in runs]

    def _clear(self):
        self._items, self._bytes = set() if self._unique else [], 0

    def _spill(self):
        items = sorted(self._items)
        self._clear()
        self._levels[0].append(self._write(items))
        for level, runs in enumerate(self._levels):  # grows while it is walked
            if len(runs) < MAX_RUNS:
                break
            if level + 1 == len(self._levels):
                self._levels.append([])
            self._join(level)

    def _join(self, level):
        """Merges all runs of a level into one run of the next."""
        self._levels[level + 1].append(self._write(self._merged(self._levels[level])))
        self._levels[level] = []

    def _write(self, items):
        os.makedirs(self._folder, exist_ok=True)
        path = os.path.join(self._folder, f"run-{self._num_runs}")
        self._num_runs += 1
        with open(path, "wb", buffering=2**20) as file:
            for item in items:
                file.write(LENGTH.pack(len(item)))
                file.write(item)
        return path

    def _merged(self, runs):
        last = None
        for item in merged(runs, self._memory_bytes):
            if not (self._unique and item == last):
                yield item
            last = item
        for path in runs:
            os.unlink(path)


def merged(runs, memory_bytes, start=b""):
    """Yields the strings of sorted runs in order, from the first that is not less than start.

    The buffers take at most memory_bytes, but 64 KiB for each run.
    """
    buffer_bytes = max(2**16, min(2**22, memory_bytes // max(1, len(runs))))
    return heapq.merge(*(_read(path, buffer_bytes, start) for path in runs))


def _read(path, buffer_bytes, start):
    with open(path, "rb", buffering=buffer_bytes) as file:
        while length := file.read(LENGTH.size):
            (length,) = LENGTH.unpack(length)
            head = file.read(min(length, len(start)))
            if head < start:
                file.seek(length - len(head), os.SEEK_CUR)
            else:
                yield head + file.read(length - len(head))
                start = b""  # none that follows is less
