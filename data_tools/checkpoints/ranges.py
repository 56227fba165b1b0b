"""The files of a checkpoint that hold a range of class rows each: rows, their momentum, an index, the KNN graph.

A table of rows, (S, …) in the file of S classes, can be read for any range of classes. An edge of the graph is in the
file of the class in which it ends, whatever the class in which it begins (xc/knn/graph.py), so other ranges of classes
distribute the edges anew. All ranges are half-open: [first, last).
"""

import re

import numpy as np

from xc.checkpoint.tensor_file import TensorFile

_RANGED = re.compile(r"([a-z]+)-(\d{12})-(\d{12})\.safetensors")
_EDGES = 2**20  # in memory at a time
_INT32 = 2**31


def kinds_among(names):
    """{kind: [(first, last), …] ascending} of the file names that are of a range of rows; kind: rows, neighbors, …"""
    kinds = {}
    for match in filter(None, map(_RANGED.fullmatch, names)):
        kinds.setdefault(match[1], []).append((int(match[2]), int(match[3])))
    return {kind: sorted(ranges) for kind, ranges in kinds.items()}


def name_of(kind, first, last):
    return f"{kind}-{first:012d}-{last:012d}.safetensors"


def near_equal(num_rows, num_files):
    """[(first, last)] of near-equal parts of range(num_rows), as train.py gives to its ranks (xc/comm/shard.py)."""
    size, remainder = divmod(num_rows, num_files)
    firsts = [part * size + min(part, remainder) for part in range(num_files + 1)]
    return list(zip(firsts, firsts[1:], strict=False))


def _inside(rows, ids):
    return (ids >= rows.start) & (ids < rows.stop)


class RangedTables:
    """The tables in all files of one kind. ValueError where they are broken or do not cover range(num_rows) once."""

    def __init__(self, folder, kind, ranges, num_rows):
        if [first for first, _ in ranges] + [num_rows] != [0, *(last for _, last in ranges)]:
            raise ValueError(f"checkpoint {folder}: its files of {kind} do not cover the class rows 0 to {num_rows} "
                             "once: take another checkpoint")
        self.files = [(range(*of_file), TensorFile(folder / name_of(kind, *of_file))) for of_file in ranges]
        self.first_file = self.files[0][1]
        for _, file in self.files:
            if set(file) != set(self.first_file):
                other = min(set(file) ^ set(self.first_file))
                raise ValueError(f"checkpoint file {file.path} cannot be used: it or the first one of its kind lacks "
                                 f"{other[:80]!r}")

    def table(self, name):
        """(dtype, shape of a row) of a table of rows, the same in all files."""
        dtype, (_, *row) = self.first_file.dtype(name), self.first_file.shape(name) or (0,)
        for rows, file in self.files:
            if (file.dtype(name), file.shape(name)) != (dtype, (len(rows), *row)):
                raise ValueError(f"checkpoint file {file.path} cannot be used: {name[:80]!r} is {file.dtype(name)} "
                                 f"{file.shape(name)}, not {dtype} {(len(rows), *row)}")
        return dtype, row

    def rows(self, name, first, last):
        """Rows first … last - 1 of a table, whichever files they lie in, as pieces of bytes."""
        for rows, file in self.files:
            start, stop = max(first, rows.start), min(last, rows.stop)
            if start < stop:
                yield from file.rows(name, start - rows.start, stop - rows.start)

    def tensor(self, name, first, last):
        """(dtype, shape, pieces) of these rows, as `tensor_file.write` takes it."""
        dtype, row = self.table(name)
        return dtype, (last - first, *row), self.rows(name, first, last)

    def tensors(self, first, last):
        """All tables for the file of another range."""
        return {name: self.tensor(name, first, last) for name in self.first_file}


class GraphTables(RangedTables):
    """The files of a KNN graph."""

    def __init__(self, folder, kind, ranges, num_rows):
        super().__init__(folder, kind, ranges, num_rows)
        self._num_rows = num_rows
        *_, self._num_neighbors, self._probes = self.first_file.array("shape", 0, 5).tolist()
        if not 0 < self._num_neighbors < num_rows:
            raise self._misfit(self.first_file)
        for rows, file in self.files:
            shape = [rows.start, rows.stop, num_rows, self._num_neighbors, self._probes]
            edges, places = file.shape("neighbors"), (file.dtype("places"), file.shape("places"))
            if not (file.array("shape", 0, 5).tolist() == shape and file.shape("offsets") == (num_rows + 1,)
                    and len(edges) == 1 and places == (self.first_file.dtype("places"), edges)):
                raise self._misfit(file)

    @staticmethod
    def _misfit(file):
        return ValueError(f"checkpoint file {file.path} cannot be used: its edges do not fit its shape")

    def tensors(self, first, last):
        rows, file = range(first, last), self.first_file
        total = sum(len(places) for *_, places in self._blocks(rows))
        shape = np.array([first, last, self._num_rows, self._num_neighbors, self._probes], "<i8")
        kind, width = ("I32", "<i4") if total < _INT32 else ("I64", "<i8")
        same = {name: file.tensor(name) for name in ("recall", "centroids") if name in file}
        by_row = {name: self.tensor(name, first, last) for name in ("codes", "cells") if name in file}
        return {**same, **by_row, "shape": ("I64", (5,), [shape.tobytes()]),
                "offsets": (kind, (self._num_rows + 1,), self._offsets(rows, width)),
                "neighbors": ("I32", (total,), (found.astype("<i4").tobytes() for _, found, _ in self._blocks(rows))),
                "places": (file.dtype("places"), (total,), (found.tobytes() for *_, found in self._blocks(rows)))}

    def _offsets(self, rows, width):
        end = np.zeros(1, np.int64)
        yield end.astype(width).tobytes()
        for counts, _, _ in self._blocks(rows):
            ends = end[-1] + counts.cumsum()
            yield ends.astype(width).tobytes()
            end = ends

    def _blocks(self, rows):
        """Yields, block by block of classes, the edges that end in a range of rows: the number of edges of each class,
        the local ids of their ends, and their places among the neighbours of the class."""
        size = max(1, _EDGES // self._num_neighbors)
        for first in range(0, self._num_rows, size):
            yield self._edges(rows, first, min(first + size, self._num_rows))

    def _edges(self, rows, first, last):
        classes, neighbors, places = [], [], []
        for of_file, file in self.files:
            if of_file.stop <= rows.start or of_file.start >= rows.stop:
                continue
            offsets = file.array("offsets", first, last + 1).astype(np.int64)
            counts = np.diff(offsets)
            if counts.min() < 0 or counts.max() > self._num_neighbors:
                raise self._misfit(file)
            ends = file.array("neighbors", offsets[0], offsets[-1]).astype(np.int64) + of_file.start
            of_edges = file.array("places", offsets[0], offsets[-1])
            if not _inside(of_file, ends).all() or not ((0 <= of_edges) & (of_edges < self._num_neighbors)).all():
                raise self._misfit(file)
            here = _inside(rows, ends)
            classes.append(np.repeat(np.arange(last - first), counts)[here])
            neighbors.append(ends[here] - rows.start)
            places.append(of_edges[here])
        classes, neighbors, places = map(np.concatenate, (classes, neighbors, places))
        order = np.argsort(classes * self._num_neighbors + places)  # the nearest of each class first
        return np.bincount(classes, minlength=last - first), neighbors[order], places[order]
