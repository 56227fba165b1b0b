"""Reads the files of a KNN graph: any number of ranks wrote them, any number reads them."""

from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open

from xc.comm.shard import Shard
from xc.knn.cells import Cells
from xc.knn.graph import MOST_SHIFT, EdgeTable
from xc.run import watchdog

_EDGES = 2**20  # that are read at a time, about


def read_graph(paths, shard, num_classes, device="cpu"):
    """The KnnGraph of a shard, from the files of all shards (`KnnGraph.tables`). Not collective.

    ValueError if a file is damaged, is missing, or has another number of classes.
    """
    all_files = []
    for path in sorted(paths, key=str):
        with _naming(path, num_classes):
            all_files.append(file := _GraphFile(path))
            if (file.num_classes, file.num_neighbors) != (num_classes, all_files[0].num_neighbors):
                raise ValueError(f"{file.num_classes} classes, {file.num_neighbors} neighbours")
            if file.first != (all_files[-2].last if len(all_files) > 1 else 0):
                raise ValueError(f"its classes begin with {file.first}")
    if not all_files or all_files[-1].last != num_classes:
        raise ValueError(f"the {len(paths)} files of neighbours do not hold all {num_classes} classes: build the graph "
                         "again")
    files = [file for file in all_files if file.first < shard.last and shard.first < file.last]
    for file in files:
        with _naming(file.path, num_classes):
            file.open()
    num_neighbors = all_files[0].num_neighbors
    # Counted first: a second copy of the edges may not fit.
    num_edges = 0
    for file in files:
        with _naming(file.path, num_classes):
            num_edges += file.num_edges_in(shard)
    table = EdgeTable(shard, num_classes, num_neighbors, [num_edges], device)
    for edges in _edges_of(files, shard, num_classes, num_neighbors):
        table.add(0, *(column.to(device) for column in edges))
    graph = table.graph()
    graph.cells = _cells_of(all_files, shard, num_classes, device)
    return graph


def _edges_of(files, shard, num_classes, num_neighbors):
    """Yield classes, local neighbours and places (n,) of the edges that end in a shard, by class, then by place."""
    step = max(1, _EDGES // num_neighbors >> MOST_SHIFT) << MOST_SHIFT  # blocks of all files begin there
    for first in range(0, num_classes if files else 0, step):
        watchdog.heartbeat("reading the graph")
        parts = []
        for file in files:
            with _naming(file.path, num_classes):
                parts.append(file.edges(first, min(first + step, num_classes), shard))
        classes, neighbors, places = (torch.cat(column) for column in zip(*parts, strict=True))
        if len(files) > 1:
            order = (classes * num_neighbors + places).argsort()
            classes, neighbors, places = classes[order], neighbors[order], places[order]
        yield classes, neighbors, places


def _cells_of(files, shard, num_classes, device):
    """The Cells of a shard, of the files of all shards: None on all ranks where the graph is exact, or of an older
    version."""
    if not all(file.has_cells for file in files):
        return None
    with _naming(files[0].path, num_classes):
        centroids, probes = files[0].centroids()
    cells = Cells(centroids.to(device), torch.empty(len(shard), dtype=torch.int32, device=device), probes)
    for file in files:
        start, stop = max(file.first, shard.first), min(file.last, shard.last)
        if start < stop:
            with _naming(file.path, num_classes):
                found = file.cells_of_rows(start, stop, len(centroids))
                cells.of_row[start - shard.first : stop - shard.first] = found
    return cells


class _GraphFile:
    """The file of a shard of any number of ranks. Files of older versions have an offset for every class."""

    def __init__(self, path):
        self.path = path
        with safe_open(path, "pt") as file:
            names, shape = set(file.keys()), file.get_tensor("shape")
        if shape.shape != (5,) or shape.dtype != torch.int64:
            raise ValueError("its shape is not known")
        self.first, self.last, self.num_classes, self.num_neighbors, shift = shape.tolist()
        self._shift = shift if "lows" in names else 0
        if not (0 <= self._shift <= MOST_SHIFT and 0 <= self.first <= self.last <= self.num_classes
                and 0 < self.num_neighbors < self.num_classes):
            raise ValueError("its shape is not known")
        self.has_cells = {"lows", "cells"} <= names
        self._columns = {"neighbors": (torch.int32,), "places": (torch.uint8, torch.int16)}
        self._columns |= {"lows": (torch.uint8,)} if self._shift else {}

    def open(self):
        """Read the offsets, and check that the columns of edges are as long as they say."""
        with safe_open(self.path, "pt") as file:
            offsets = file.get_tensor("offsets").clone()  # a copy: the mapped file may be deleted
            shapes = [file.get_slice(name).get_shape() for name in self._columns]
            types = [file.get_slice(name)[:0].dtype in allowed for name, allowed in self._columns.items()]
        num_blocks = -(-self.num_classes // 2**self._shift)
        if (offsets.shape != (num_blocks + 1,) or offsets.dtype not in (torch.int32, torch.int64) or offsets[0] != 0
                or (offsets[1:] < offsets[:-1]).any() or any(shape != [int(offsets[-1])] for shape in shapes)
                or not all(types)):
            raise ValueError("its edges do not fit its shape")
        self._offsets = offsets

    def centroids(self):
        """Centroids (N, D) and probes of the cells."""
        with safe_open(self.path, "pt") as file:
            centroids, probes = (file.get_tensor(name).clone() for name in ("centroids", "probes"))
        if (centroids.dim() != 2 or centroids.dtype != torch.float32 or not centroids.isfinite().all()
                or probes.shape != (1,) or probes.dtype != torch.int64 or not 0 <= probes.item() <= len(centroids)):
            raise ValueError("its cells are not known")
        return centroids, probes.item()

    def cells_of_rows(self, first, last, num_cells):
        """The cells of rows first … last - 1, int32."""
        with safe_open(self.path, "pt") as file:
            whole = file.get_slice("cells")
            if whole.get_shape() != [self.last - self.first]:
                raise ValueError("its cells do not fit its shape")
            found = whole[first - self.first : last - self.first]
        if found.dtype != torch.int32 or found.min() < 0 or found.max() >= num_cells:
            raise ValueError("its rows lie in cells that do not exist")
        return found

    def num_edges_in(self, shard):
        """Edges that end in a shard."""
        total = int(self._offsets[-1])
        if shard.first <= self.first and self.last <= shard.last:
            return total
        count, inside = 0, Shard(shard.first - self.first, shard.last - self.first)
        with safe_open(self.path, "pt") as file:
            neighbors = file.get_slice("neighbors")
            for first in range(0, total, _EDGES):
                watchdog.heartbeat("reading the graph")
                count += int(inside.owns(neighbors[first : first + _EDGES]).sum())
        return count

    def edges(self, first, last, shard):
        """classes, local neighbours, places (n,) of the edges of classes first … last - 1 that end in a shard.

        By class, then by place.
        """
        blocks = slice(first >> self._shift, -(-last // 2**self._shift))
        start, stop = int(self._offsets[blocks.start]), int(self._offsets[blocks.stop])
        if stop - start > (last - first) * self.num_neighbors:
            raise ValueError("its edges do not fit its shape")
        counts = self._offsets[blocks.start : blocks.stop + 1].long().diff()
        classes = torch.arange(blocks.start, blocks.stop).repeat_interleave(counts) << self._shift
        with safe_open(self.path, "pt") as file:
            columns = {name: file.get_slice(name)[start:stop].long() for name in self._columns}
        neighbors, places, lows = columns["neighbors"], columns["places"], columns.get("lows", torch.zeros(1).long())
        classes = classes + lows
        if len(places) and (places.max() >= self.num_neighbors or places.min() < 0 or neighbors.min() < 0
                            or neighbors.max() >= self.last - self.first or classes.max() >= self.num_classes
                            or lows.max() >= 2**self._shift
                            or ((classes * self.num_neighbors + places).diff() <= 0).any()):
            raise ValueError("its edges do not fit its shape")
        own = shard.owns(neighbors + self.first)
        return classes[own], neighbors[own] + (self.first - shard.first), places[own]


@contextmanager
def _naming(path, num_classes):
    """Turn an error of the block into a ValueError that names the file."""
    try:
        yield
    except (OSError, ArithmeticError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as e:
        raise ValueError(f"file of neighbours {path} cannot be used ({' '.join(str(e).split())}): build the graph of "
                         f"these {num_classes} classes again") from e
