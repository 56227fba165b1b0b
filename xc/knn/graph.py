"""The part of the KNN graph that a rank keeps, and its files.

Further dimension letters: E edges, N cells.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

CHUNK = 2**18  # most elements of a temporary, so that it stays in the cache


class KnnGraph:
    """This rank's part of the graph: for each of all C classes, those of its K neighbours that lie in this shard.

    offsets    (C + 1,)  int32, or int64 from 2^31 edges: class c has the edges offsets[c] … offsets[c + 1] - 1
    neighbors  (E,)      int32 local ids; the nearest of a class comes first
    places     (E,)      uint8, or int16 for K > 256: 0 for the nearest of the class's K neighbours, K - 1 for the last
    indexed    the rows as they were indexed, for `refresh`

    All shards together hold K edges of every class, or fewer if an approximate search found fewer.
    """

    def __init__(self, shard, num_neighbors, offsets, neighbors, places, indexed):
        self.shard, self.num_classes, self.num_neighbors = shard, len(offsets) - 1, num_neighbors
        self.offsets, self.neighbors, self.places, self.indexed = offsets, neighbors, places, indexed

    def lookup(self, labels):
        """Look up the neighbours of a batch that lie in this shard. Not collective.

        labels   (B,)  int64, global class ids
        returns  rows (E,) into labels, ascending; neighbors (E,) local ids; places (E,); all int64
        """
        start = self.offsets[labels].long()
        count = self.offsets[labels + 1] - start
        rows = torch.arange(len(labels), device=labels.device).repeat_interleave(count)
        edges = torch.arange(len(rows), device=labels.device) + (start - count.cumsum(0) + count)[rows]
        return rows, self.neighbors[edges].long(), self.places[edges].long()

    def forget_rows(self):
        """Free the memory that only `refresh` needs."""
        self.indexed = Indexed(self.indexed.codes.new_empty(len(self.shard), 0))

    def refreshable(self, weight):
        """Whether `refresh` can use this graph for these rows (S, D): not after `forget_rows`, not with another D."""
        return self.indexed.codes.shape == weight.shape

    @property
    def bytes_per_class(self):
        """Bytes of this rank's edges, divided by C."""
        return sum(t.nbytes for t in (self.offsets, self.neighbors, self.places)) / self.num_classes

    @property
    def file_name(self):
        """Name of its file in a checkpoint."""
        return f"neighbors-{self.shard.first:012d}-{self.shard.last:012d}.safetensors"

    def tables(self):
        """{name: tensor} of its file. A shard without classes needs no file."""
        shape = [self.shard.first, self.shard.last, self.num_classes, self.num_neighbors, self.indexed.probes]
        recall = torch.tensor([self.indexed.recall], dtype=torch.float64)
        return {"shape": torch.tensor(shape), "recall": recall, "offsets": self.offsets, "neighbors": self.neighbors,
                "places": self.places, **self.indexed.tensors()}

    @classmethod
    def read(cls, paths, shard, num_classes, device="cpu"):
        """Read the graph of `shard` from the files of all shards, of any number of ranks. Not collective.

        ValueError if a file is damaged, is missing, or has another number of classes.
        """
        parts, own_file, indexed, num_covered, num_neighbors = [], None, None, 0, None
        for path in sorted(paths, key=str):
            try:
                with safe_open(path, "pt", device=str(device)) as file:
                    first, last, *found, probes = file.get_tensor("shape").tolist()
                    if found != [num_classes, num_neighbors or found[-1]]:
                        raise ValueError("{} classes, {} neighbours".format(*found))
                    num_neighbors = found[-1]
                    start, stop = max(first, shard.first), min(last, shard.last)
                    if indexed is None:
                        indexed = Indexed.empty(file, probes, len(shard), device)
                    if start < stop:
                        indexed.fill(file, slice(start - first, stop - first),
                                     slice(start - shard.first, stop - shard.first))
                        tables = _checked_tables(file, last - first, *found)
                        num_covered += stop - start
                        if (first, last) == (shard.first, shard.last):
                            own_file = [table.clone() for table in tables]  # a copy: the mapped file may be deleted
                        else:
                            parts.append(_edges_within(*tables, first, shard))
            except (OSError, ValueError, TypeError, IndexError, RuntimeError, SafetensorError) as e:
                raise ValueError(f"file of neighbours {path} cannot be used ({' '.join(str(e).split())}): build "
                                 f"the graph of these {num_classes} classes again") from e
        if indexed is None or num_covered != len(shard):
            raise ValueError(f"the {len(paths)} files of neighbours hold {num_covered} of the {len(shard)} classes "
                             f"{shard.first} to {shard.last - 1}: build the graph again")
        if own_file and not parts:  # the same number of ranks wrote it
            return cls(shard, num_neighbors, *own_file[:2], own_file[2].to(place_type(num_neighbors)), indexed)
        none = torch.empty(0, dtype=torch.int64, device=device)
        classes, neighbors, places = (torch.cat(c) for c in zip((none, none.int(), none.int()), *parts, strict=True))
        order = (classes * num_neighbors + places).argsort()
        offsets, places = offsets_of(classes.bincount(minlength=num_classes)), places[order]
        return cls(shard, num_neighbors, offsets, neighbors[order], places.to(place_type(num_neighbors)), indexed)


@dataclass
class Indexed:
    """The rows of a shard as they were last indexed.

    codes      (S, D)  int8; the length of a row is not kept
    cells      (S,)    int32: the cell of each row; approximate graphs only
    centroids  (N, D)  unit rows, the same on every rank; approximate graphs only
    probes     P, cells searched for a row; 0 means that the graph is exact
    recall     of the last build, from 0 to 1
    """

    codes: torch.Tensor
    cells: torch.Tensor | None = None
    centroids: torch.Tensor | None = None
    probes: int = 0
    recall: float = 1.0

    @classmethod
    def of(cls, weight):
        """Index rows (S, D) for an exact graph."""
        indexed = cls(torch.empty_like(weight, dtype=torch.int8))
        for block in blocks(*weight.shape):
            indexed.codes[block] = code_of(weight[block])
        return indexed

    def angles(self, weight):
        """Angle (S,) in radians between every row and its indexed version; about 0.007 if the row did not move."""
        angles = weight.new_empty(len(weight), dtype=torch.float32)
        for block in blocks(*weight.shape):
            angles[block] = F.cosine_similarity(weight[block].float(), self.codes[block].float()).clamp_(-1, 1).acos()
        return angles

    def tensors(self):
        """{name: tensor} for a file."""
        return {n: t for n, t in vars(self).items() if isinstance(t, torch.Tensor)}

    @classmethod
    def empty(cls, file, probes, num_rows, device):
        """An Indexed for `fill`: num_rows rows of zeros, with the centroids, probes and recall of a file."""
        width, recall = file.get_slice("codes").get_shape()[1], file.get_tensor("recall").item()
        codes = torch.zeros(num_rows, width, dtype=torch.int8, device=device)
        if not probes:
            return cls(codes, recall=recall)
        cells = torch.zeros(num_rows, dtype=torch.int32, device=device)
        centroids = file.get_tensor("centroids").float().clone()  # a copy: the mapped file may be deleted
        if centroids.shape[1] != width or not 1 <= probes <= len(centroids):
            raise ValueError("its centroids do not fit")
        return cls(codes, cells, centroids, probes, recall)

    def fill(self, file, source, target):
        """Copy rows from a file. source, target: slices of the file's rows and of these rows."""
        for name in ("codes", "cells") if self.probes else ("codes",):
            getattr(self, name)[target] = file.get_slice(name)[source]
        if self.probes and not ((0 <= self.cells) & (self.cells < len(self.centroids))).all():
            raise ValueError("its rows lie in cells that do not exist")


def join(parts):
    """Join parts (counts (C,), neighbors, places) to offsets, neighbors, places.

    Only one part may have edges of any class. Every part is sorted by class.
    """
    counts = sum(count for count, *_ in parts)
    offsets = offsets_of(counts)
    if len(parts) == 1:
        return offsets, *parts[0][1:]
    neighbors, places = (torch.cat([part[i] for part in parts]) for i in (1, 2))
    for count, *columns in parts:
        shift = offsets[:-1] - (count.cumsum(0) - count)
        edges = shift.repeat_interleave(count).long() + torch.arange(len(columns[0]), device=offsets.device)
        neighbors[edges], places[edges] = columns
    return offsets, neighbors, places


def _checked_tables(file, num_rows, num_classes, num_neighbors):
    """offsets, neighbors, places of a file with num_rows rows. ValueError if they do not fit its shape."""
    offsets, neighbors, places = (file.get_tensor(name) for name in ("offsets", "neighbors", "places"))
    if (offsets.shape != (num_classes + 1,) or len(neighbors) != len(places) or offsets[0] != 0
            or offsets[-1] != len(neighbors) or (offsets.diff() < 0).any() or len(places) and (
                places.max() >= num_neighbors or neighbors.min() < 0 or neighbors.max() >= num_rows)):
        raise ValueError("its edges do not fit its shape")
    return offsets, neighbors, places


def _edges_within(offsets, neighbors, places, first, shard):
    """classes, neighbors, places (E,) of the edges that end in `shard`. first: global id of the file's first row."""
    local = neighbors + (first - shard.first)
    in_shard = (local >= 0) & (local < len(shard))
    classes = torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
    return classes[in_shard], local[in_shard], places[in_shard].int()


def code_of(rows):
    """Rows (B, D) as int8, (B, D). Their lengths are lost."""
    rows = rows.float()
    return (rows * (127 / rows.abs().amax(1, keepdim=True).clamp_(min=1e-30))).round_().to(torch.int8)


def offsets_of(counts):
    """Offsets (C + 1,) from the number of edges of every class (C,)."""
    offsets = F.pad(counts.long().cumsum(0), (1, 0))
    return offsets.int() if offsets[-1] < 2**31 else offsets


def blocks(num_rows, width):
    """Slices of range(num_rows), so small that `width` numbers for each row stay in the cache."""
    size = max(1, CHUNK // width)
    return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]


def place_type(num_neighbors):
    """The integer type of `places` for K = num_neighbors."""
    return torch.uint8 if num_neighbors <= 256 else torch.int16
