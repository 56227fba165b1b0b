"""Build and refresh the graph of the K nearest classes of every class, by the cosine of their rows.

    1. Each rank finds the K nearest rows in all shards for its own rows, block by block (search.py).
    2. Each edge of a block goes to the rank that owns the neighbour. That rank stores it by class (graph.py).

A build searches for all rows, a refresh for some. No rank ever holds the whole graph. The ring that builds the graph is
from Song et al. 2020.
"""

import time

import torch
import torch.nn.functional as F

from xc.comm.shard import Shard
from xc.knn.graph import Indexed, KnnGraph, blocks, code_of, join, place_type
from xc.knn.search import EMPTY, RingSearch, cells_of, ids_of, unit
from xc.run import watchdog

_SAMPLE = 256  # rows whose exact neighbours are searched to measure recall
_MIN_RECALL = 0.965  # of the sample that decides P
_SAMPLES_PER_CELL, _KMEANS_ITERATIONS = 32, 5
_AUTO_SECONDS = 30  # `auto` builds an exact graph if that is predicted to take less
_FLOPS_PER_SECOND = {"cpu": 4e10, "cuda": 4e13}  # of one rank: one core, or one GPU in 16 bits
_MAX_MOVED, _MAX_RECALL_LOSS = 1 / 3, 0.02  # beyond either, a refresh becomes a build


def build(weight, shard, num_classes, num_neighbors, group, method="exact", seed=0):
    """Build the graph of all classes. Collective.

    weight   (S, D)  rows of this shard, of any length, float32 or bfloat16
    group    of the shards; rank r owns Shard.of(num_classes, group.size, r)
    method   exact | approx | auto (exact if that is predicted to take less than half a minute)
    returns  KnnGraph, {graph_seconds, graph_recall, graph_requeried, graph_bytes_per_class, method}
    raises   ValueError if there are not that many other classes
    """
    start = time.perf_counter()
    if not 0 < num_neighbors < num_classes:
        raise ValueError(f"{num_neighbors} neighbours of {num_classes} classes: take 1 to {num_classes - 1}")
    weight = weight.detach()
    if method == "auto":
        # Constants instead of a measurement, so that all copies and all runs of a recipe decide alike.
        flops = 2 * num_classes**2 * weight.shape[1] / group.size
        method = "exact" if flops < _AUTO_SECONDS * _FLOPS_PER_SECOND[weight.device.type] else "approx"
    indexed = Indexed.of(weight)
    if method == "approx":
        indexed.centroids = _kmeans(weight, shard, num_classes, group, seed)
        indexed.cells = torch.empty(len(shard), dtype=torch.int32, device=weight.device)
        for block in blocks(*weight.shape):
            indexed.cells[block] = cells_of(unit(weight[block]), indexed.centroids)
    search = RingSearch(weight, shard, indexed, num_neighbors, group)
    if method == "approx":
        indexed.probes = search.probes = _choose_probes(search, num_classes, seed)
    edges = _Edges(num_classes, search)
    for keys, classes in search.search(torch.arange(len(shard), device=weight.device)):
        edges.add(keys, classes)
    graph = KnnGraph(shard, num_neighbors, *join([edges.tensors()]), indexed)
    stats = _stats(graph, search, method, num_classes, start, seed)
    indexed.recall = stats["graph_recall"]
    return graph, stats


def refresh(graph, weight, shard, group, angle=0.1, seed=0):
    """Make a new graph from an old one. Collective.

    It searches again for the rows that moved, and for the rows that had or now have a moved row as a neighbour.

    A build replaces it if more than a third of the rows moved, or if recall fell by more than 0.02 since the last
    build. Recall falls because rows leave their cells, and the number of cells to search was chosen for the rows of
    that build.

    angle    radians: a row has moved if it turned this far since it was indexed. Indexed rows have 8 bits. So below
             0.02, rows that did not move may count as moved
    returns  as `build`
    """
    start = time.perf_counter()
    weight, num_classes = weight.detach(), graph.num_classes
    assert graph.refreshable(weight)
    moved = graph.indexed.angles(weight) >= angle

    def rebuild():
        method = "approx" if graph.indexed.probes else "exact"
        built, stats = build(weight, shard, num_classes, graph.num_neighbors, group, method, seed)
        return built, stats | {"graph_seconds": time.perf_counter() - start}

    if group.all_reduce(moved.sum()).item() > _MAX_MOVED * num_classes:
        return rebuild()
    indexed = _index_again(graph.indexed, weight, moved)
    search = RingSearch(weight, shard, indexed, graph.num_neighbors, group, graph)
    search.probes = -(-indexed.probes // 2)
    affected = _has_neighbor_in(graph, moved)  # (C,) 2: moved; 1: had or has a moved neighbour, or is one's neighbour
    edges_of_moved, edges_of_affected = _Edges(num_classes, search), _Edges(num_classes, search)
    for keys, classes in search.search(moved.nonzero().squeeze(1)):
        edges_of_moved.add(keys, classes)
        affected[ids_of(keys[keys > EMPTY])] = 1
    affected[shard.first : shard.last][moved] = 2
    group.all_reduce(affected, "max")
    search.probes = -(-indexed.probes // 16)  # few, since their former neighbours are candidates, too
    for keys, classes in search.search((affected[shard.first : shard.last] == 1).nonzero().squeeze(1)):
        edges_of_affected.add(keys, classes)
    unaffected = affected == 0
    counts = graph.offsets.diff()
    mask = unaffected.repeat_interleave(counts)
    old_edges = counts * unaffected, graph.neighbors[mask], graph.places[mask]
    joined = join([old_edges, edges_of_moved.tensors(), edges_of_affected.tensors()])
    new = KnnGraph(shard, graph.num_neighbors, *joined, indexed)
    stats = _stats(new, search, "refresh", num_classes, start, seed)
    if stats["graph_recall"] < indexed.recall - _MAX_RECALL_LOSS:
        return rebuild()
    return new, stats | {"graph_requeried": 1 - unaffected.float().mean().item()}


def _has_neighbor_in(graph, rows):
    """(C,) uint8: 1 for the classes with a neighbour among these rows of the shard, a mask (S,)."""
    hits = F.pad(rows[graph.neighbors].cumsum(0, dtype=torch.int32), (1, 0))
    return (hits[graph.offsets[1:]] > hits[graph.offsets[:-1]]).to(torch.uint8)


class _Edges:
    """Collects the edges that end in this shard. Each rank adds each class once, in ascending order."""

    def __init__(self, num_classes, search):
        self.group, self.shard = search.group, search.shard
        self.shard_ends = torch.tensor([Shard.of(num_classes, self.group.size, r).last for r in range(self.group.size)],
                                       device=search.rows.device)
        self.counts = torch.zeros(num_classes, dtype=torch.int32, device=search.rows.device)
        self.pieces = [[] for _ in range(self.group.size)]  # by source rank, so that classes ascend in `tensors`
        self.place_type = place_type(search.num_neighbors)

    def add(self, keys, classes):
        """Send each edge of a block to the rank that owns the neighbour: keys (Q, K) of classes (Q,). Collective."""
        query, place = (keys > EMPTY).nonzero(as_tuple=True)
        ids = ids_of(keys[query, place])
        owner = torch.searchsorted(self.shard_ends, ids, right=True)
        order = owner.argsort(stable=True)
        edges = torch.stack([classes[query], ids, place], 1).int()[order]
        counts = owner.bincount(minlength=self.group.size).tolist()
        for source, piece in enumerate(self.group.all_to_all(edges, counts)):
            if len(piece):
                first = piece[0, 0].item()
                counted = (piece[:, 0] - first).bincount()
                self.counts[first : first + len(counted)] += counted
                self.pieces[source].append((piece[:, 1] - self.shard.first, piece[:, 2].to(self.place_type)))

    def tensors(self):
        """Number of edges of every class (C,), neighbors (E,), places (E,)."""
        pieces = [piece for source in self.pieces for piece in source]
        empty = self.counts.new_empty(0), self.counts.new_empty(0, dtype=self.place_type)
        return self.counts, *(torch.cat(column) for column in zip(empty, *pieces, strict=True))


def _index_again(indexed, weight, rows):
    """A copy of `indexed` in which the rows of a mask (S,) are indexed as they are now."""
    codes, cells = indexed.codes.clone(), indexed.cells
    codes[rows] = code_of(weight[rows])
    if indexed.probes:
        cells = cells.clone()
        cells[rows] = cells_of(unit(weight[rows]), indexed.centroids)
    return Indexed(codes, cells, indexed.centroids, indexed.probes, indexed.recall)


def _stats(graph, search, method, num_classes, start, seed):
    """Metrics of a build. Recall compares the stored graph with the exact neighbours of sampled rows. Collective."""
    recall = 1.0
    if method != "exact":
        classes, truth = _sample(search, num_classes, seed + 1, exact=True)
        rows, neighbors, _ = graph.lookup(classes)
        num_found = (truth[rows] == (neighbors + graph.shard.first)[:, None]).sum()
        recall = search.group.all_reduce(num_found).item() / truth.numel()
    mine = torch.tensor([time.perf_counter() - start, graph.bytes_per_class], device=graph.offsets.device)
    seconds, size = search.group.all_reduce(mine, "max").tolist()
    return {"graph_seconds": seconds, "graph_recall": recall, "graph_requeried": 1.0, "graph_bytes_per_class": size,
            "method": method}


def _sample(search, num_classes, seed, exact):
    """Sampled classes (N,), ascending, and the ids (N, K) that a search finds for them. The same on every rank.

    Collective.
    """
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(num_classes, (_SAMPLE,), generator=generator).unique().to(search.rows.device)
    mine = classes[search.shard.owns(classes)] - search.shard.first
    keys = torch.cat([keys for keys, _ in search.search(mine, exact)])
    counts = search.group.all_gather(torch.tensor([len(mine)], device=mine.device)).tolist()
    return classes, ids_of(search.group.all_gather(keys, counts))


def _choose_probes(search, num_classes, seed):
    """The smallest P of 2, 3, 4, 6, 8, 12, … that finds enough neighbours of sampled rows. Collective.

    P is limited to a sixteenth of the cells, to 8, or to the number of cells that hold 4 K rows, whichever is most.
    Before training, rows have no clusters, so they would need nearly all cells. That is no faster than an exact build.
    The logged recall shows the result.
    """
    num_cells = len(search.centroids)
    most = min(num_cells, max(8, num_cells // 16, 4 * search.num_neighbors * num_cells // num_classes))
    _, truth = _sample(search, num_classes, seed + 2, exact=True)
    for probes in (factor * 2**e for e in range(31) for factor in (2, 3)):
        search.probes = min(probes, most)
        _, found = _sample(search, num_classes, seed + 2, exact=False)
        num_found = sum((truth == column[:, None]).sum().item() for column in found.T)
        if num_found >= _MIN_RECALL * truth.numel() or search.probes == most:
            return search.probes


def _kmeans(weight, shard, num_classes, group, seed):
    """Centroids (N, D) of about 4 sqrt(C) cells, by k-means of sampled rows. The same on every rank. Collective."""
    generator = torch.Generator().manual_seed(seed)
    num_cells = max(1, min(int(4 * num_classes**0.5), num_classes // 16))
    sample = torch.randint(num_classes, (num_cells * _SAMPLES_PER_CELL,), generator=generator).to(weight.device)
    own = shard.owns(sample)
    rows = unit(weight.index_select(0, sample[own] - shard.first))
    sums = torch.zeros(num_cells, weight.shape[1], dtype=torch.float64, device=weight.device)
    seeds = own[:num_cells].nonzero().squeeze(1)
    sums[seeds] = rows[: len(seeds)].double()
    centroids = unit(group.all_reduce(sums))
    for _ in range(_KMEANS_ITERATIONS):
        watchdog.heartbeat("k-means of the rows")
        # Sums in float64 give the same float32 centroids in any order, so cells do not depend on W.
        sums.zero_().index_add_(0, cells_of(rows, centroids).long(), rows.double())
        group.all_reduce(sums)
        centroids = torch.where(sums.any(1, keepdim=True), unit(sums), centroids)
    return centroids
