"""Build the graph of the K nearest classes of every class, by the cosine of their rows.

    1. The ranks find the K nearest rows of all rows: exactly (exact_search.py), or nearly, by cells (cell_search.py).
    2. Each edge goes to the rank that owns the neighbour. That rank stores it by class (graph.py).

No rank ever holds the whole graph nor, for an approximate one, more rows of others than a round has.
"""

import time
from collections import deque

import torch

from xc.comm.shard import Shard
from xc.knn.cell_search import search_cells
from xc.knn.cells import MOST_CELLS, Cells, number_of_cells
from xc.knn.exact_search import ExactSearch, neighbors_of_few
from xc.knn.graph import EdgeTable
from xc.run import watchdog

_SAMPLE = 256  # rows whose exact neighbours are searched: so many to choose P, and as many to measure recall
_MIN_RECALL = 0.965  # of the sample that decides P
_MOST_PROBES, _MOST_SEARCHED = 128, 16  # that may be needed; that are searched: more make no better classifier
_MOST_GROWTH = 2  # of the P that is needed, since cells were found anew
_SEARCH_SECONDS, _FEW_PROBES = 300, 4  # a search of more than a few cells is predicted to take no longer
_AUTO_SECONDS = 30  # `auto` builds an exact graph if that is predicted to take less
_FLOPS_PER_SECOND = {"cpu": 4e10, "cuda": 4e13}  # of one rank: one core, or one GPU in 16 bits
_BLOCK_NUMBERS, _EDGES = 2**23, 2**20  # ids in a block of found neighbours: 32 MiB; edges that are sent at a time


def build(weight, shard, num_classes, num_neighbors, group, method="exact", seed=0, cells=None):
    """Build the graph of all classes. Collective.

    weight   (S, D)  rows of this shard, of any length, float32 or bfloat16
    group    of the shards; rank r owns Shard.of(num_classes, group.size, r)
    method   exact | approx | auto (exact if that is predicted to take less than half a minute)
    cells    of an earlier graph of these classes, which follow the rows; None: they are found anew, as they are where
             the old ones serve the rows no longer
    returns  KnnGraph, {graph_seconds, graph_recall, graph_bytes_per_class, graph_probes, graph_cells_kept, method}
    raises   ValueError if there are not that many other classes
    """
    start = time.perf_counter()
    if not 0 < num_neighbors < num_classes:
        raise ValueError(f"{num_neighbors} neighbours of {num_classes} classes: take 1 to {num_classes - 1}")
    weight, where, device = weight.detach(), (shard, num_classes), weight.device
    method = method_of(method, num_classes, weight.shape[1], group.size, device.type)
    recall, probes, kept = 1.0, 0, False
    if method == "exact":
        cells, found = None, ExactSearch(weight, shard, num_neighbors, group).search()
    else:
        classes = torch.randint(num_classes, (2 * _SAMPLE,), generator=torch.Generator().manual_seed(seed + 1))
        classes = classes.to(device)
        truth = neighbors_of_few(weight, shard, classes, num_neighbors, group)
        to_choose = *where, classes[:_SAMPLE], truth[:_SAMPLE], group
        most = cells and _most_probes(len(cells), num_classes, num_neighbors)
        kept = cells is not None and cells.probes < most
        if kept:
            first_probes, cells = cells.probes, cells.followed(weight, group)
            probes = _choose_probes(cells, *to_choose)
            kept = probes <= _MOST_GROWTH * first_probes and probes < most
        if not kept:
            cells = Cells.found(weight, *where, group, seed)
            probes = cells.probes = _choose_probes(cells, *to_choose)
        probes = min(probes, affordable_probes(num_classes, num_neighbors, weight.shape[1], group.size, device.type))
        found = search_cells(weight, *where, cells, probes, num_neighbors, group)
    graph = _distribute(_in_blocks(found, len(weight), num_neighbors, device), *where, num_neighbors, group, device)
    graph.cells = cells
    if method == "approx":
        recall = _recall(graph, classes[_SAMPLE:], truth[_SAMPLE:], group)
    mine = torch.tensor([time.perf_counter() - start, graph.bytes_per_class], device=device)
    seconds, size = group.all_reduce(mine, "max").tolist()
    return graph, {"graph_seconds": seconds, "graph_recall": recall, "graph_bytes_per_class": size,
                   "graph_probes": probes, "graph_cells_kept": float(kept), "method": method}


def method_of(method, num_classes, feature_dim, num_shards, device_type):
    """exact or approx, also where the method is auto. By constants instead of a measurement, so that all copies and all
    runs of a recipe decide alike."""
    seconds = _seconds(num_classes**2, feature_dim, num_shards, device_type)
    return ("exact" if seconds < _AUTO_SECONDS else "approx") if method == "auto" else method


def _seconds(num_products, feature_dim, num_ranks, device_type):
    """Predicted time of so many products of two rows, by all ranks together."""
    return 2 * num_products * feature_dim / num_ranks / _FLOPS_PER_SECOND[device_type]


def _choose_probes(cells, shard, num_classes, classes, truth, group):
    """P of 2, 3, 4, 6, 8, 12, …, the smallest that reaches enough neighbours of sampled classes. Collective.

    classes, truth  (N,), (N, K)  and their exact neighbours, global ids
    """
    wanted = torch.cat([classes[:, None], truth], 1)
    own = shard.owns(wanted)
    cell = torch.zeros_like(wanted)
    cell[own] = cells.of_row[wanted[own] - shard.first].long()
    cell = group.all_reduce(cell)
    # How many cells are nearer to the cell of a class than that of its neighbour is.
    products = cells.centroids[cell[:, 0]] @ cells.centroids.T  # (N, number of cells)
    nearer = torch.stack([(products > products.gather(1, of_place[:, None])).sum(1) for of_place in cell.T[1:]], 1)
    nearer[cell[:, 1:] == cell[:, :1]] = 0
    most = _most_probes(len(cells), num_classes, truth.shape[1])
    candidates = sorted(factor * 2**e for e in range(31) for factor in (2, 3))
    found = next(min(probes, most) for probes in candidates
                 if probes >= most or (nearer < probes).double().mean() >= _MIN_RECALL)
    # Ranks with other hardware may round otherwise, and must not part.
    return group.all_reduce(torch.tensor([found], device=classes.device), "max").item()


def _most_probes(num_cells, num_classes, num_neighbors):
    """The largest P: 128, a sixteenth of the cells, 8, or the number of cells that hold 4 K rows, all of them at most.

    Before training, rows have no clusters, so they would need nearly all cells. The logged recall shows the result.
    """
    return min(num_cells, max(8, min(_MOST_PROBES, num_cells // 16), 4 * num_neighbors * num_cells // num_classes))


def affordable_probes(num_classes, num_neighbors, feature_dim, num_shards, device_type):
    """The largest P that is worth its time. Young rows have no clusters and would need nearly all cells: the classifier
    is as good with few, though recall is lower. And 10^8 rows would be searched for hours. They hold 4 K rows."""
    num_cells = number_of_cells(num_classes)
    of_one = _seconds(num_classes**2 / num_cells, feature_dim, num_shards, device_type)
    most = min(_MOST_SEARCHED, int(_SEARCH_SECONDS / of_one))
    few = _FEW_PROBES if num_cells < MOST_CELLS else _FEW_PROBES // 2  # with more classes cells are larger
    return max(few, most, 4 * num_neighbors * num_cells // num_classes)


def _in_blocks(found, num_rows, num_neighbors, device):
    """A deque of blocks (n, K) int32 of the neighbours of all rows, in the order of rows.

    A block is so large that its memory goes back to the system as soon as it is dropped.

    found  yields (local ids (n,), global ids of neighbours (n, K)), each row once
    """
    size = max(1, _BLOCK_NUMBERS // num_neighbors)
    firsts = torch.arange(0, num_rows + size, size, device=device)
    blocks = deque(torch.empty(min(size, num_rows - first), num_neighbors, dtype=torch.int32, device=device)
                   for first in range(0, num_rows, size))
    for rows, neighbors in found:
        rows, order = rows.sort()
        bounds = torch.searchsorted(rows, firsts).tolist()
        for i, block in enumerate(blocks):
            part = slice(*bounds[i : i + 2])
            if part.start < part.stop:
                block[rows[part] - i * size] = neighbors[order[part]].int()
    return blocks


def _distribute(blocks, shard, num_classes, num_neighbors, group, device):
    """The KnnGraph of this shard. Collective. blocks: from `_in_blocks`; it is empty at the end."""
    ends = torch.tensor([Shard.of(num_classes, group.size, rank).last for rank in range(group.size)], device=device)
    step = max(1, _EDGES // num_neighbors)  # rows
    counts = torch.zeros(group.size, dtype=torch.int64, device=device)
    for block in blocks:
        for rows in block.split(step):
            owner = torch.searchsorted(ends, rows.flatten(), right=True)
            counts += owner[rows.flatten() >= 0].bincount(minlength=group.size)
    received = torch.cat(group.all_to_all(counts, [1] * group.size)).tolist()
    table = EdgeTable(shard, num_classes, num_neighbors, received, device)
    first, parts = shard.first, _popped(blocks, step)
    num_rounds = torch.tensor([sum(-(-len(block) // step) for block in blocks)], device=device)
    num_rounds = group.all_reduce(num_rounds, "max").item()
    for i in range(num_rounds):
        watchdog.progress("distribution of the graph", i / num_rounds)
        rows = next(parts, torch.empty(0, num_neighbors, dtype=torch.int32, device=device))
        row, place = (rows >= 0).nonzero(as_tuple=True)
        neighbors = rows[row, place]
        owner = torch.searchsorted(ends, neighbors, right=True)
        edges = torch.stack([row + first, neighbors, place], 1).int()[owner.argsort(stable=True)]
        for source, piece in enumerate(group.all_to_all(edges, owner.bincount(minlength=group.size).tolist())):
            table.add(source, piece[:, 0], piece[:, 1] - shard.first, piece[:, 2])
        first += len(rows)
    return table.graph()


def _popped(blocks, step):
    """Yield rows of the blocks, `step` at a time, and drop each block after its last ones."""
    while blocks:
        yield from blocks.popleft().split(step)


def _recall(graph, classes, truth, group):
    """The share of the exact neighbours (N, K) of some classes (N,) that the graph has. Collective."""
    rows, neighbors, _ = graph.lookup(classes)
    num_found = (truth[rows] == (neighbors + graph.shard.first)[:, None]).sum()
    return group.all_reduce(num_found).item() / truth.numel()
