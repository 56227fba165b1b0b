"""The files of a checkpoint that hold a range of class rows each: rows, their momentum, an index, the KNN graph.

A table of rows, (S, …) in the file of S classes, can be read for any range of classes. An edge of the graph is in the
file of the class in which it ends, whatever the class in which it begins, so xc/knn/graph_file.py reads those.

All ranges are half-open: [first, last).
"""

import re

from xc.checkpoint.tensor_file import TensorFile

_RANGED = re.compile(r"([a-z]+)-(\d{12})-(\d{12})\.safetensors")


def kinds_among(names):
    """{kind: [(first, last), …] ascending} of the file names that are of a range of rows; kind: rows, neighbors, …"""
    kinds = {}
    for match in filter(None, map(_RANGED.fullmatch, names)):
        kinds.setdefault(match[1], []).append((int(match[2]), int(match[3])))
    return {kind: sorted(ranges) for kind, ranges in kinds.items()}


def name_of(kind, first, last):
    return f"{kind}-{first:012d}-{last:012d}.safetensors"


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
