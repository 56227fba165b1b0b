"""Build and refresh the graph of the K nearest classes of every class, by the cosine of their rows.

    search   the K nearest rows of all shards for blocks of this rank's rows (search.py)
    deliver  the edges of a block go to the ranks that own the neighbours and keep them by class (graph.py)

A build searches for all rows, a refresh for some of them. No rank ever holds the whole graph. Song et al. 2020, the
graph is built by a ring.
"""

import time

import torch
import torch.nn.functional as F

from xc.comm.shard import Shard
from xc.knn.graph import Indexed, KnnGraph, blocks, code_of, join, place_type
from xc.knn.search import EMPTY, RingSearch, cells_of, ids_of, unit
from xc.run import watchdog

_SAMPLE = 256  # rows whose exact neighbours are searched to measure recall
_RECALL = 0.965  # wanted on the sample that decides P
_SAMPLES_PER_CELL, _ROUNDS_OF_KMEANS = 32, 5
_AUTO_SECONDS = 30  # `auto` builds exactly where that is predicted to take less
_FLOPS_PER_SECOND = {"cpu": 4e10, "cuda": 4e13}  # of one rank: one core, or one GPU in 16 bits
_MOST_MOVED, _RECALL_LOSS = 1 / 3, 0.02  # a refresh becomes a build beyond either


def build(weight, shard, num_classes, num_neighbors, group, method="exact", seed=0):
    """Build the graph of all classes. Collective.

    weight   (S, D)  rows of this shard, of any length, float32 or bfloat16
    group    of the shards; rank r owns Shard.of(num_classes, group.size, r)
    method   exact | approx | auto (exact where that is predicted to take less than half a minute)
    returns  KnnGraph, {graph_seconds, graph_recall, graph_requeried, graph_bytes_per_class, method}
    """
    start = time.perf_counter()
    if not 0 < num_neighbors < num_classes:
        raise ValueError(f"{num_neighbors} neighbours of {num_classes} classes: take 1 to {num_classes - 1}")
    weight = weight.detach()
    if method == "auto":
        # A constant instead of a measurement, so that all copies and all runs of a recipe decide alike.
        flops = 2 * num_classes**2 * weight.shape[1] / group.size
        method = "exact" if flops < _AUTO_SECONDS * _FLOPS_PER_SECOND[weight.device.type] else "approx"
    indexed = Indexed.of(weight)
    if method == "approx":
        indexed.centroids = _kmeans(weight, shard, num_classes, group, seed)
        indexed.cells = torch.empty(len(shard), dtype=torch.int32, device=weight.device)
        for block in blocks(*weight.shape):
            indexed.cells[block] = cells_of(unit(weight[block]), indexed.centroids)
    local = RingSearch(weight, shard, indexed, num_neighbors, group)
    if method == "approx":
        indexed.probes = local.probes = _choose_probes(local, num_classes, seed)
    edges = _Edges(num_classes, local)
    for keys, classes in local.search(torch.arange(len(shard), device=weight.device)):
        edges.add(keys, classes)
    graph = KnnGraph(shard, num_neighbors, *join([edges.tensors()]), indexed)
    stats = _stats(graph, local, method, num_classes, start, seed)
    indexed.recall = stats["graph_recall"]
    return graph, stats


def refresh(graph, weight, shard, group, angle=0.1, seed=0):
    """A new graph from an old one. Collective.

    It searches again for the rows that moved, and for the rows whose neighbours these were or became.

    It becomes a build where more than a third of the rows moved, or where recall fell by more than 0.02 since the last
    build. Recall falls since rows leave their cells, and the number of cells to search was chosen for the rows of that
    build.

    angle    radians: a row has moved if it turned so far since it was indexed. The indexed rows have 8 bits, so below
             0.02 unmoved rows can count as moved
    returns  as build
    """
    start = time.perf_counter()
    weight, num_classes = weight.detach(), graph.num_classes
    assert graph.refreshable(weight)
    moved = graph.indexed.angles(weight) >= angle

    def rebuild():
        method = "approx" if graph.indexed.probes else "exact"
        built, stats = build(weight, shard, num_classes, graph.num_neighbors, group, method, seed)
        return built, stats | {"graph_seconds": time.perf_counter() - start}

    if group.all_reduce(moved.sum()).item() > _MOST_MOVED * num_classes:
        return rebuild()
    indexed = _indexed_again(graph.indexed, weight, moved)
    local = RingSearch(weight, shard, indexed, graph.num_neighbors, group, graph)
    # 2: moved; 1: a neighbour of it moved, or it is or became the neighbour of a moved row
    touched = torch.zeros(num_classes, dtype=torch.uint8, device=weight.device)
    hits = F.pad(moved[graph.neighbors].cumsum(0, dtype=torch.int32), (1, 0))
    touched[hits[graph.offsets[1:]] > hits[graph.offsets[:-1]]] = 1
    far, near = _Edges(num_classes, local), _Edges(num_classes, local)
    local.probes = -(-indexed.probes // 2)
    for keys, classes in local.search(moved.nonzero().squeeze(1)):
        far.add(keys, classes)
        touched[ids_of(keys[keys > EMPTY])] = 1
    touched[shard.first : shard.last][moved] = 2
    group.all_reduce(touched, "max")
    local.probes = -(-indexed.probes // 16)  # few, since their former neighbours are candidates as well
    for keys, classes in local.search((touched[shard.first : shard.last] == 1).nonzero().squeeze(1)):
        near.add(keys, classes)
    kept = touched == 0
    counts = graph.offsets.diff()
    mask = kept.repeat_interleave(counts)
    old = counts * kept, graph.neighbors[mask], graph.places[mask]
    new = KnnGraph(shard, graph.num_neighbors, *join([old, far.tensors(), near.tensors()]), indexed)
    stats = _stats(new, local, "refresh", num_classes, start, seed)
    if stats["graph_recall"] < indexed.recall - _RECALL_LOSS:
        return rebuild()
    return new, stats | {"graph_requeried": 1 - kept.float().mean().item()}


class _Edges:
    """Collects the edges that end in this shard. Every class comes once, the classes of a rank in ascending order."""

    def __init__(self, num_classes, local):
        self.group, self.shard = local.group, local.shard
        self.lasts = torch.tensor([Shard.of(num_classes, self.group.size, r).last for r in range(self.group.size)],
                                  device=local.rows.device)
        self.counts = torch.zeros(num_classes, dtype=torch.int32, device=local.rows.device)
        self.pieces = [[] for _ in range(self.group.size)]  # by source rank, so that classes ascend in the end
        self.place_type = place_type(local.num_neighbors)

    def add(self, keys, classes):
        """Send the edges of a block, keys (Q, K) of classes (Q,), to the ranks that own the neighbours. Collective."""
        query, place = (keys > EMPTY).nonzero(as_tuple=True)
        ids = ids_of(keys[query, place])
        owner = torch.searchsorted(self.lasts, ids, right=True)
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


def _indexed_again(indexed, weight, rows):
    """A copy of `indexed` in which the rows of this mask are indexed again."""
    codes, cells = indexed.codes.clone(), indexed.cells
    codes[rows] = code_of(weight[rows])
    if indexed.probes:
        cells = cells.clone()
        cells[rows] = cells_of(unit(weight[rows]), indexed.centroids)
    return Indexed(codes, cells, indexed.centroids, indexed.probes, indexed.recall)


def _stats(graph, local, method, num_classes, start, seed):
    """Metrics of a build. Recall compares the stored graph with the exact neighbours of sampled rows. Collective."""
    recall = 1.0
    if method != "exact":
        classes, truth = _sample(local, num_classes, seed + 1, exact=True)
        rows, neighbors, _ = graph.lookup(classes)
        right = (truth[rows] == (neighbors + graph.shard.first)[:, None]).sum()
        recall = local.group.all_reduce(right).item() / truth.numel()
    mine = torch.tensor([time.perf_counter() - start, graph.bytes_per_class], device=graph.offsets.device)
    seconds, size = local.group.all_reduce(mine, "max").tolist()
    return {"graph_seconds": seconds, "graph_recall": recall, "graph_requeried": 1.0, "graph_bytes_per_class": size,
            "method": method}


def _sample(local, num_classes, seed, exact):
    """Sampled classes (N,), ascending, and the ids (N, K) that a search finds for them; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(num_classes, (_SAMPLE,), generator=generator).unique().to(local.rows.device)
    mine = classes[local.shard.owns(classes)] - local.shard.first
    keys = torch.cat([keys for keys, _ in local.search(mine, exact)])
    counts = local.group.all_gather(torch.tensor([len(mine)], device=mine.device)).tolist()
    return classes, ids_of(local.group.all_gather(keys, counts))


def _choose_probes(local, num_classes, seed):
    """The least P that finds enough neighbours of sampled rows. Collective.

    P is at most one cell in sixteen, or the number of cells that hold 4 K rows. Rows without clusters, as before
    training, would need nearly all cells, which is no faster than an exact build. The logged recall shows the result.
    """
    num_cells = len(local.centroids)
    most = min(num_cells, max(8, num_cells // 16, 4 * local.num_neighbors * num_cells // num_classes))
    _, truth = _sample(local, num_classes, seed + 2, exact=True)
    for probes in (step * 2**e for e in range(31) for step in (2, 3)):
        local.probes = min(probes, most)
        _, found = _sample(local, num_classes, seed + 2, exact=False)
        right = sum((truth == column[:, None]).sum().item() for column in found.T)
        if right >= _RECALL * truth.numel() or local.probes == most:
            return local.probes


def _kmeans(weight, shard, num_classes, group, seed):
    """Centroids (N, D) of about 4 sqrt(C) cells, by k-means of sampled rows; the same on every rank. Collective."""
    generator = torch.Generator().manual_seed(seed)
    num_cells = max(1, min(int(4 * num_classes**0.5), num_classes // 16))
    sample = torch.randint(num_classes, (num_cells * _SAMPLES_PER_CELL,), generator=generator).to(weight.device)
    own = shard.owns(sample)
    rows = unit(weight.index_select(0, sample[own] - shard.first))
    sums = torch.zeros(num_cells, weight.shape[1], dtype=torch.float64, device=weight.device)
    seeds = own[:num_cells].nonzero().squeeze(1)
    sums[seeds] = rows[: len(seeds)].double()
    centroids = unit(group.all_reduce(sums))
    for _ in range(_ROUNDS_OF_KMEANS):
        watchdog.heartbeat("k-means of the rows")
        # The order of summation does not matter in float64, so the cells are the same for every W.
        sums.zero_().index_add_(0, cells_of(rows, centroids).long(), rows.double())
        group.all_reduce(sums)
        centroids = torch.where(sums.any(1, keepdim=True), unit(sums), centroids)
    return centroids
