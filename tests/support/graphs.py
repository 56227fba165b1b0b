"""Class graphs: rows to build them of, on ranks that are threads, and brute force to compare them to."""

import torch
import torch.nn.functional as F

from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.knn.build import build

GRIDS = [(1, 1), (3, 3), (4, 2)]


def rows_of(num_classes, dim=12, seed=0):
    """Random rows of all lengths, some alike and some opposite."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_classes, dim, generator=generator)
    rows *= torch.rand(num_classes, 1, generator=generator) + 0.1
    rows[1::7] = rows[1].clone()
    if num_classes > 2:
        rows[2::11] = -2 * rows[2]
    return rows


def clustered(num_classes, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_classes // 20, dim, generator=generator)
    cluster = torch.randint(len(centres), (num_classes,), generator=generator)
    return centres[cluster] + 0.5 * torch.randn(num_classes, dim, generator=generator)


def brute(rows, num_neighbors):
    """Ids (C, K): nearest first, of equal ones the lower class first."""
    unit = F.normalize(rows.double())
    scores = (unit.float().double() @ unit.float().double().T).float()
    scores.fill_diagonal_(-torch.inf)
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :num_neighbors]


def built(rows, num_neighbors, ranks, width=None, **options):
    """(graph, stats) of every rank of the first copy."""
    def body(world):
        shard = Shard.of(len(rows), world.shards.size, world.shards.rank)
        return build(rows[shard.first : shard.last], shard, len(rows), num_neighbors, world.shards, **options)

    return run_ranks(ranks, body, width or 0)[: width or ranks]


def whole(graphs):
    """Ids (C, K) that the shards hold together, every place taken once."""
    num_classes, num_neighbors = graphs[0].num_classes, graphs[0].num_neighbors
    ids = torch.full((num_classes, num_neighbors), -1)
    for graph in graphs:
        rows, local, places = graph.lookup(torch.arange(num_classes))
        assert (ids[rows, places] == -1).all() and (local < len(graph.shard)).all()
        ids[rows, places] = local + graph.shard.first
    assert (ids >= 0).all()
    return ids


def recall(found, truth):
    return (found[:, :, None] == truth[:, None]).any(2).float().mean().item()
