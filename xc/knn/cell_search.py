"""Approximate search for the K nearest rows in all shards: those of the P cells nearest to a row's own cell.

The ranks share the cells. A round gives each rank some cells that are near each other. It gets their rows and those of
the cells near them from all ranks, searches, and sends what it found to the ranks that own the rows. So a row is sent
to wherever it is near: a few times where rows have clusters, and as often as P lets it before they have. What is found
depends neither on the number of ranks nor on the rounds.

Further dimension letters: Q rows of a round whose neighbours are searched, N cells, P cells searched for a row.
"""

import torch
import torch.nn.functional as F

from xc.comm.shard import Shard
from xc.knn.keys import ids_of, keys_of
from xc.knn.products import directions, top_products
from xc.run import watchdog

_ROUND_NUMBERS = 2**24  # numbers in the rows that a rank gets in a round, if it searches more than one cell


def search_cells(weight, shard, num_classes, cells, probes, num_neighbors, group):
    """Yield (local ids (n,), global ids (n, K) of their neighbours, nearest first, -1: none found), until every row of
    this shard was there once. Collective.

    weight  (S, D)
    cells   of these rows; probes: P
    """
    device = weight.device
    nearest = cells.nearest(probes, group)
    order, bounds = cells.sorted_rows()
    sizes = group.all_reduce(bounds.diff())
    parts = _parts(sizes, nearest, weight.shape[1], group.size)
    ends = torch.tensor([Shard.of(num_classes, group.size, rank).last for rank in range(group.size)], device=device)
    for first in range(0, len(parts), group.size):
        watchdog.progress("search of neighbours", first / len(parts))
        wanted = [nearest[part.start : part.stop].unique().long() for part in parts[first : first + group.size]]
        places, of_cell, counts = _places(wanted, bounds)
        places = order[places].long()
        tags = torch.stack([places + shard.first, of_cell], 1).int()
        rows = list(group.all_to_all(weight.index_select(0, places), counts))  # _search empties it
        tags = torch.cat(group.all_to_all(tags, counts))
        part = parts[first + group.rank]
        found = _search(rows, tags, part, nearest, num_neighbors)  # (Q, 1 + K)
        owner = torch.searchsorted(ends, found[:, 0].contiguous(), right=True)
        counts = owner.bincount(minlength=group.size).tolist()
        found = torch.cat(group.all_to_all(found[owner.argsort(stable=True)].int(), counts))
        yield found[:, 0].long() - shard.first, found[:, 1:]


def _parts(sizes, nearest, width, num_ranks):
    """Slices of the cells, a multiple of the number of ranks: few, but so short that the rows of their cells and of
    those near them have _ROUND_NUMBERS numbers at most, unless a slice is one cell.

    sizes  (N,)  rows of each cell
    """
    count = num_ranks
    while True:
        parts = _near_equal(sizes, count)
        most = max(sizes[nearest[part].unique().long()].sum().item() for part in parts)
        if most * width <= _ROUND_NUMBERS or max(part.stop - part.start for part in parts) <= 1:
            return parts
        count *= 2


def _near_equal(sizes, count):
    """So many slices of the cells with near-equal numbers of rows. sizes: (N,)."""
    ends = sizes.cumsum(0)
    limits = torch.arange(1, count, device=sizes.device) * ends[-1] // count
    cuts = [0, *torch.searchsorted(ends, limits).add_(1).clamp_(max=len(sizes)).tolist(), len(sizes)]
    return [slice(start, max(start, stop)) for start, stop in zip(cuts, cuts[1:], strict=False)]


def _places(wanted, bounds):
    """Where the rows of the wanted cells stand in the rows by cell (n,), their cells (n,), and how many for each of
    `wanted`, a list of cells (N',) ascending."""
    cells = torch.cat(wanted)
    starts, lengths = bounds[cells], bounds.diff()[cells]
    of_cell = cells.repeat_interleave(lengths)
    first = F.pad(lengths.cumsum(0), (1, 0))
    places = torch.arange(len(of_cell), device=cells.device) + (starts - first[:-1]).repeat_interleave(lengths)
    edges = torch.tensor([len(one) for one in wanted], device=cells.device).cumsum(0)
    return places, of_cell, F.pad(first[edges], (1, 0)).diff().tolist()


def _search(rows, tags, part, nearest, num_neighbors):
    """For every row of the cells of a slice: its global id and those of its neighbours (Q, 1 + K) int64, -1: none.

    rows  [(n', D), …]  rows of these cells and of those near them, from every rank; it is emptied
    tags  (n, 2)        their global ids and cells
    """
    # Rows came in the order of ranks, so those of a cell ascend: the same whoever holds them.
    cells, by_cell = tags[:, 1].long().sort(stable=True)
    ids, joined = tags[by_cell, 0].long(), torch.cat(list(rows))
    rows.clear()
    rows = directions(joined.index_select(0, by_cell))
    del joined
    bounds = torch.searchsorted(cells, torch.arange(len(nearest) + 1, device=cells.device)).tolist()
    own = slice(bounds[part.start], bounds[part.stop])
    scores = rows.new_full((own.stop - own.start, num_neighbors + 1), -torch.inf)
    found = torch.zeros_like(scores, dtype=torch.int64)
    for cell, near in zip(range(part.start, part.stop), nearest[part].tolist(), strict=True):
        first, last = bounds[cell], bounds[cell + 1]
        if first < last:
            spans = [slice(bounds[one], bounds[one + 1]) for one in near]
            count = min(num_neighbors + 1, sum(span.stop - span.start for span in spans))
            top, places = top_products(rows[first:last], torch.cat([rows[span] for span in spans]), count)
            target = slice(first - own.start, last - own.start), slice(0, count)
            scores[target], found[target] = top, torch.cat([ids[span] for span in spans])[places]
    mine = ids[own]
    scores[found == mine[:, None]] = -torch.inf
    keys = keys_of(scores, torch.where(scores > -torch.inf, found, 2**32 - 1))
    return torch.cat([mine[:, None], ids_of(keys.topk(num_neighbors).values)], 1)
