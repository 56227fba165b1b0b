"""The part of the KNN graph that a rank keeps.

Further dimension letters: E edges.
"""

import torch
import torch.nn.functional as F

_BLOCK_EDGES = 32  # of this shard, on average, in the classes that share an offset
MOST_SHIFT = 8  # such classes are numbered in a byte


class KnnGraph:
    """This rank's part of the graph: for each of all C classes, those of its K neighbours that lie in this shard.

    Where there are more than K / 4 shards, 2^shift classes share an offset, as many as have about 32 edges here, 256 at
    most. So the tables of all shards together grow with C alone, up to 8 K shards.

    offsets    (⌈C / 2^shift⌉ + 1,)  int32, or int64 from 2^31 edges: block b of classes has the edges offsets[b] …
               offsets[b + 1] - 1
    lows       (E,)  uint8: the class of an edge less the first class of its block; empty where shift is 0
    neighbors  (E,)  int32 local ids; the nearest of a class comes first
    places     (E,)  uint8, or int16 for K > 256: 0 for the nearest of the class's K neighbours, K - 1 for the last
    cells            those of an approximate graph, which the next build begins with; None where there are none

    All shards together hold K edges of every class, or fewer if an approximate search found fewer.
    """

    def __init__(self, shard, num_classes, num_neighbors, shift, offsets, lows, neighbors, places):
        self.shard, self.num_classes, self.num_neighbors, self.shift = shard, num_classes, num_neighbors, shift
        self.offsets, self.lows, self.neighbors, self.places = offsets, lows, neighbors, places
        self.cells = None

    def lookup(self, labels):
        """Look up the neighbours of a batch that lie in this shard. Not collective.

        labels   (B,)  int64, global class ids
        returns  rows (E,) into labels, ascending; neighbors (E,) local ids; places (E,); all int64
        """
        block = labels >> self.shift
        start = self.offsets[block].long()
        count = self.offsets[block + 1] - start
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(count)
        edges = torch.arange(len(rows), device=labels.device) + (start - count.cumsum(0) + count)[rows]
        if self.shift:
            of_class = self.lows[edges] == (labels - (block << self.shift)).to(torch.uint8)[rows]
            rows, edges = rows[of_class], edges[of_class]
        return rows, self.neighbors[edges].long(), self.places[edges].long()

    @property
    def bytes_per_class(self):
        """Bytes of this rank's edges, divided by C."""
        return sum(t.nbytes for t in (self.offsets, self.lows, self.neighbors, self.places)) / self.num_classes

    @property
    def file_name(self):
        """Name of its file in a checkpoint."""
        return f"neighbors-{self.shard.first:012d}-{self.shard.last:012d}.safetensors"

    def tables(self):
        """{name: tensor} of its file. A shard without classes needs no file."""
        shape = [self.shard.first, self.shard.last, self.num_classes, self.num_neighbors, self.shift]
        tables = {"shape": torch.tensor(shape), "offsets": self.offsets, "lows": self.lows,
                  "neighbors": self.neighbors, "places": self.places}
        if self.cells:
            tables |= {"centroids": self.cells.centroids, "cells": self.cells.of_row,
                       "probes": torch.tensor([self.cells.probes])}
        return tables


class EdgeTable:
    """Collects the edges that end in a shard, class by class, in tables of their final size.

    num_edges  of each source; a source adds its edges in the order of classes, those of a class by place, and all of
               its classes are before those of the next source
    """

    def __init__(self, shard, num_classes, num_neighbors, num_edges, device):
        total = sum(num_edges)
        self._shard, self._num_classes, self._num_neighbors = shard, num_classes, num_neighbors
        self._shift = shift_of(len(shard), num_classes, num_neighbors)
        self._ends = F.pad(torch.tensor(num_edges).cumsum(0), (1, 0)).tolist()[:-1]  # where each source goes on
        # int32 until the end, where they are summed: a block has 2^8 times K edges at most.
        self._counts = torch.zeros(-(-num_classes // 2**self._shift), dtype=torch.int32, device=device)
        self._neighbors = torch.empty(total, dtype=torch.int32, device=device)
        self._places = torch.empty(total, dtype=place_type(num_neighbors), device=device)
        self._lows = torch.empty(total if self._shift else 0, dtype=torch.uint8, device=device)

    def add(self, source, classes, neighbors, places):
        """Add edges of a source: global class ids (n,), ascending; local ids (n,); places (n,)."""
        if not len(classes):
            return
        blocks = classes.long() >> self._shift
        target = slice(self._ends[source], self._ends[source] + len(classes))
        self._ends[source] = target.stop
        self._neighbors[target], self._places[target] = neighbors.int(), places.to(self._places.dtype)
        if self._shift:
            self._lows[target] = (classes - (blocks << self._shift)).to(torch.uint8)
        first = int(blocks[0])
        counted = (blocks - first).bincount()
        self._counts[first : first + len(counted)] += counted

    def graph(self):
        """The KnnGraph of all edges."""
        kind = torch.int32 if len(self._neighbors) < 2**31 else torch.int64
        offsets = torch.zeros(len(self._counts) + 1, dtype=kind, device=self._counts.device)
        torch.cumsum(self._counts, 0, dtype=kind, out=offsets[1:])
        return KnnGraph(self._shard, self._num_classes, self._num_neighbors, self._shift, offsets, self._lows,
                        self._neighbors, self._places)


def shift_of(num_rows, num_classes, num_neighbors):
    """The shift of the graph of a shard with so many rows: a block of classes has about 32 edges there. None is shared
    where `lows` would have more bytes than the offsets that they save."""
    if num_neighbors * num_rows >= 4 * num_classes:
        return 0
    num_classes_of_block = _BLOCK_EDGES * num_classes // max(1, num_neighbors * num_rows)
    return min(MOST_SHIFT, max(0, num_classes_of_block.bit_length() - 1))


def place_type(num_neighbors):
    """The integer type of `places` for K = num_neighbors."""
    return torch.uint8 if num_neighbors <= 256 else torch.int16
