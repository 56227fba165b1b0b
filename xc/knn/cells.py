"""Cells of class rows, and which cells are near each other: where an approximate search looks.

A cell is the rows that are nearest to its centroid. `found` finds cells anew, by k-means of sampled rows. `followed`
lets cells follow rows that moved: centroids become the means of their rows, and a row looks for a nearer one among the
cells near its own. That takes a small part of the time, since no row is compared with all centroids.

Further dimension letters: N cells, P cells searched for a row.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xc.comm.shard import Shard
from xc.knn.products import directions, top_products
from xc.knn.similar_parts import similar_parts
from xc.run import watchdog

SAMPLES_PER_CELL, _ITERATIONS = 32, 5
MOST_CELLS = 20_000  # with 40,000, two cores took 76 minutes to find those of 10^8 rows, beside other work
_CELLS_OF_PART = 4  # cells with numbers side by side, which are near each other
_NEAR = 64  # cells among which a row looks for a nearer one
_NUMBERS = 2**21  # in the rows whose cells are found at a time


@dataclass
class Cells:
    """The cells of all rows, as a rank knows them. Cells with numbers side by side are mostly near each other.

    centroids  (N, D)  of length 1, the same on every rank
    of_row     (S,)    int32: the cell of each row of this shard
    probes     P that a search needed when they were found anew; 0: not known yet
    """

    centroids: torch.Tensor
    of_row: torch.Tensor
    probes: int = 0

    def __len__(self):
        return len(self.centroids)

    @classmethod
    def found(cls, weight, shard, num_classes, group, seed):
        """The cells of the rows (S, D) of all shards, found anew. Collective."""
        num_cells = number_of_cells(num_classes)
        sample = torch.randint(num_classes, (num_cells * SAMPLES_PER_CELL,),
                               generator=torch.Generator().manual_seed(seed)).to(weight.device)
        own = shard.owns(sample)
        rows = directions(weight.index_select(0, sample[own] - shard.first))
        sums = torch.zeros(num_cells, weight.shape[1], dtype=torch.float64, device=weight.device)
        first = own[:num_cells].nonzero().squeeze(1)
        sums[first] = rows[: len(first)].double()
        centroids = directions(group.all_reduce(sums))
        for i in range(_ITERATIONS):
            watchdog.progress("k-means of the rows", i / _ITERATIONS)
            # Sums in float64 give the same float32 centroids in any order, so cells do not depend on W.
            sums.zero_().index_add_(0, _nearest(rows, centroids), rows.double())
            group.all_reduce(sums)
            centroids = torch.where(sums.any(1, keepdim=True), directions(sums), centroids)
        parts = 2 ** max(0, (num_cells // _CELLS_OF_PART).bit_length() - 1)
        centroids = centroids[similar_parts(centroids, parts).argsort(stable=True)]
        of_row = torch.empty(len(weight), dtype=torch.int32, device=weight.device)
        for block in _blocks(*weight.shape):
            of_row[block] = _nearest(directions(weight[block]), centroids).int()
        return cls(centroids, of_row)

    def followed(self, weight, group):
        """These cells for rows (S, D) that moved since. Collective."""
        sums = torch.zeros_like(self.centroids, dtype=torch.float64)
        for block in _blocks(*weight.shape):
            sums.index_add_(0, self.of_row[block], directions(weight[block]).double())
        group.all_reduce(sums)
        centroids = torch.where(sums.any(1, keepdim=True), directions(sums), self.centroids)
        moved = Cells(centroids, torch.empty_like(self.of_row), self.probes)
        near = moved.nearest(min(_NEAR, len(self)), group)
        order, bounds = self.sorted_rows()
        for cell, rows in enumerate(order.split(bounds.diff().tolist())):
            if cell % 1024 == 0:
                watchdog.progress("finding the cells of the rows", cell / len(self))
            if len(rows):
                products = directions(weight.index_select(0, rows)) @ moved.centroids.index_select(0, near[cell]).T
                moved.of_row[rows] = near[cell].index_select(0, products.argmax(1))
        return moved

    def sorted_rows(self):
        """The rows of this shard by cell: their local ids (S,) int32, those of a cell ascending; and where each cell
        begins (N + 1,) int64."""
        bounds = F.pad(self.of_row.bincount(minlength=len(self)).cumsum(0), (1, 0))
        return self.of_row.argsort(stable=True).int(), bounds

    def nearest(self, probes, group):
        """The P cells nearest to every cell (N, P) int32; the first one is the cell itself. Collective."""
        shards = [Shard.of(len(self), group.size, rank) for rank in range(group.size)]
        mine = torch.arange(shards[group.rank].first, shards[group.rank].last, device=self.centroids.device)
        found = [mine.new_empty(0, probes)]
        for part in mine.split(2**12):
            watchdog.heartbeat("finding cells near each other")
            found.append(top_products(self.centroids[part], self.centroids, probes)[1])
        found = torch.cat(found)
        # Two centroids can be equal: the cell itself must be among its nearest, and first.
        place = (found == mine[:, None]).int().argmax(1, keepdim=True)
        found.scatter_(1, place, found[:, :1].clone())
        found[:, 0] = mine
        return group.all_gather(found.int(), [len(one) for one in shards])


def number_of_cells(num_classes):
    """N, so that a row is compared with as many centroids as with rows of the cells that are searched: 16 of them, and
    a few where there are so many classes that no more can be afforded."""
    return max(1, min(int(4 * num_classes**0.5), MOST_CELLS, num_classes // 16))


def _nearest(rows, centroids):
    """The centroid (B,) nearest to each row (B, D)."""
    return top_products(rows, centroids, 1)[1][:, 0]


def _blocks(num_rows, width):
    """Slices of range(num_rows), for rows of so many numbers."""
    size = max(1, _NUMBERS // width)
    for first in range(0, num_rows, size):
        watchdog.progress("finding the cells of the rows", first / num_rows)
        yield slice(first, min(first + size, num_rows))
