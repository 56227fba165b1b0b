"""Tables of rows as they were at one step, written while later steps change them: no second copy of the tables.

A thread reads the tables block by block. A row that is about to change before its block was read is copied first. There
is room for some such rows. Where it is full, the update waits until the thread has read on.
"""

import threading

import torch

from xc.checkpoint.tensor_file import DTYPES
from xc.run import watchdog

MOST_KEPT_BYTES = 2**28  # of rows that were copied, on a rank
_BLOCK_BYTES = 2**20  # that the thread copies at a time
_BLOCKS_OF_SECTION = 64  # rows that were copied are looked for section by section
_POLL_SECONDS = 0.2  # between two looks at how far the thread is


class Snapshot:
    """Tables (S, …) of the same rows, as they are when this is made.

    `pieces` gives the bytes of a table to the thread that writes. `before_update` must be called before rows change,
    and `close` when nothing is read any more.
    """

    def __init__(self, tables, most_bytes=MOST_KEPT_BYTES, on_wait=lambda: None):
        """tables: {name: tensor}; most_bytes: for rows that were copied; on_wait: called when an update must wait"""
        self._on_wait = on_wait
        self._tables, self._most_bytes = dict(tables), most_bytes
        self._num_rows = len(next(iter(self._tables.values()), ()))
        row_bytes = max((table[:1].nbytes for table in self._tables.values()), default=0)
        self._size = max(1, _BLOCK_BYTES // max(1, row_bytes))  # rows of a block
        self._read = dict.fromkeys(self._tables, 0)  # rows of each table that were read
        self._kept = {name: {} for name in self._tables}  # {section: [(row numbers, rows), …]} of rows that changed
        self._is_kept = torch.zeros(self._num_rows, dtype=torch.bool)
        self._kept_bytes, self._moved, self._closed = 0, 0, False
        self._lock = threading.Condition()

    def tensors(self):
        """{name: (dtype, shape, pieces)} of the tables, as `tensor_file.write` takes it."""
        return {name: (DTYPES[table.dtype], tuple(table.shape), self.pieces(name))
                for name, table in self._tables.items()}

    def pieces(self, name):
        """Yield the rows of a table as bytes, in blocks. Each table is read once."""
        table = self._tables[name]
        for first in range(0, self._num_rows, self._size):
            last = min(first + self._size, self._num_rows)
            # Without the lock, which updates would wait for: a row that changes meanwhile is put aside, and set below.
            rows = table[first:last].to("cpu", copy=True)
            with self._lock:
                section = first // (self._size * _BLOCKS_OF_SECTION)
                for numbers, kept in self._kept[name].get(section, ()):
                    inside = slice(*torch.searchsorted(numbers, torch.tensor([first, last])).tolist())
                    rows[numbers[inside] - first] = kept[inside]
                self._read[name], self._moved = last, self._moved + 1
                if last == self._num_rows or last % (self._size * _BLOCKS_OF_SECTION) == 0:
                    self._kept_bytes -= sum(kept.nbytes for _, kept in self._kept[name].pop(section, ()))
                self._lock.notify_all()
            yield rows.view(-1).view(torch.uint8).numpy()

    def before_update(self, rows):
        """Copy the rows that are about to change, a slice or local ids (A,), where they were not read."""
        with self._lock:
            left = min(self._read.values(), default=self._num_rows)  # all tables have read the rows before this one
            if self._closed or left == self._num_rows:
                return
            numbers = torch.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.cpu()
            numbers = numbers[numbers >= left]
            numbers = numbers[~self._is_kept[numbers]]
            if (numbers[1:] <= numbers[:-1]).any():
                numbers = numbers.unique()
            while len(numbers) and not self._closed:
                fits = self._room()
                self._keep(numbers[:fits])
                numbers = numbers[fits:]
                if len(numbers):
                    self._wait()
                    numbers = numbers[numbers >= min(self._read.values())]

    def close(self):
        """Keep nothing any more: what was not read will not be."""
        with self._lock:
            self._closed = True
            self._kept.clear()
            self._lock.notify_all()

    def _room(self):
        """How many rows there is room for; at least one where nothing is kept."""
        row_bytes = sum(table[:1].nbytes for table in self._tables.values())
        return max((self._most_bytes - self._kept_bytes) // row_bytes, int(not self._kept_bytes))

    def _keep(self, numbers):
        self._is_kept[numbers] = True
        edges = torch.arange(0, self._num_rows, self._size * _BLOCKS_OF_SECTION)[1:]
        bounds = [0, *torch.searchsorted(numbers, edges).tolist(), len(numbers)]
        for name, table in self._tables.items():
            first = int(torch.searchsorted(numbers, self._read[name]))
            for section, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
                some = numbers[max(start, first) : stop]
                if len(some):
                    kept = table.index_select(0, some.to(table.device)).cpu()
                    self._kept[name].setdefault(section, []).append((some, kept))
                    self._kept_bytes += kept.nbytes

    def _wait(self):
        """Wait until the thread has read on."""
        watchdog.heartbeat("writing a checkpoint")
        self._on_wait()
        seen = self._moved
        while self._moved == seen and not self._closed:
            self._lock.wait(_POLL_SECONDS)
