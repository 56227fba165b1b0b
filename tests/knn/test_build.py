"""The graph is what brute force finds, or nearly, whoever holds the rows."""

import pytest
import torch

from tests.support.graphs import GRIDS, brute, built, clustered, recall, rows_of, whole
from tests.support.worlds import run_ranks
from xc.comm.groups import Group
from xc.comm.shard import Shard
from xc.knn import build as build_module
from xc.knn import cell_search, exact_search, products
from xc.knn.cells import Cells
from xc.knn.products import top_products, unit


@pytest.mark.parametrize("ranks, width", [*GRIDS, (4, 4)])
@pytest.mark.parametrize("num_classes, num_neighbors", [(300, 7), (301, 1), (2, 1), (40, 39)])
def test_exact_is_brute_force_for_any_ranks(ranks, width, num_classes, num_neighbors):
    rows = rows_of(num_classes)
    graphs = built(rows, num_neighbors, ranks, width)
    assert torch.equal(whole([graph for graph, _ in graphs]), brute(rows, num_neighbors))
    stats = graphs[0][1]
    assert (stats["graph_recall"], stats["graph_probes"], stats["method"]) == (1, 0, "exact")


@pytest.mark.parametrize("ranks", [1, 3])
def test_many_rows_alike(ranks):
    """More equal rows than a hop has candidates: only the ids decide."""
    rows = torch.cat([torch.ones(90, 5), rows_of(60, 5), torch.zeros(10, 5)])[torch.randperm(
        160, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(whole([graph for graph, _ in built(rows, 4, ranks)]), brute(rows, 4))


@pytest.mark.parametrize("method", ["exact", "approx"])
def test_blocks_and_rounds_change_nothing(method, monkeypatch):
    rows = clustered(1500)
    found = [whole([graph for graph, _ in built(rows, 5, 3, method=method)])]
    monkeypatch.setattr(exact_search, "_BLOCK_BYTES", 4 * 16 * 33)
    monkeypatch.setattr(exact_search, "_CHUNK", 100)
    monkeypatch.setattr(cell_search, "_ROUND_NUMBERS", 500)
    monkeypatch.setattr(build_module, "_BLOCK_NUMBERS", 170)
    monkeypatch.setattr(build_module, "_EDGES", 64)
    found.append(whole([graph for graph, _ in built(rows, 5, 3, method=method)]))
    assert torch.equal(*found)


@pytest.mark.parametrize("num_rows, count", [(3, 1), (70, 9), (5000, 1), (5003, 9), (40_000, 300)])
def test_the_largest_products_are_those_of_topk(num_rows, count, monkeypatch):
    queries, rows = rows_of(150, 8), rows_of(num_rows, 8, seed=2)
    expected = (queries @ rows.T).topk(min(count, num_rows))
    for tile, many in (products._TILE, 1024), (2**14, 1024), (2**14, 100):
        monkeypatch.setattr(products, "_TILE", tile)
        monkeypatch.setattr(products, "_MANY", many)
        scores, found = top_products(queries, rows, min(count, num_rows))
        assert torch.allclose(scores, expected.values, atol=1e-5)
        assert torch.allclose((queries[:, None] * rows[found]).sum(2), scores, atol=1e-5)
        assert all(len(set(row)) == len(row) for row in found.tolist())


def test_rows_in_bfloat16_and_places_beyond_a_byte():
    rows = rows_of(400).bfloat16()
    graphs = [graph for graph, _ in built(rows, 300, 2)]
    assert torch.equal(whole(graphs), brute(rows.float(), 300))
    assert all(graph.places.dtype == torch.int16 for graph in graphs)


def test_an_approximate_graph_of_rows_in_bfloat16_is_that_of_their_values():
    rows = clustered(900).bfloat16()
    found = [whole([graph for graph, _ in built(some, 6, 3, method="approx")]) for some in (rows, rows.float())]
    assert torch.equal(*found)


@pytest.mark.parametrize("num_neighbors", [0, 10, 11])
def test_too_many_neighbours_are_refused(num_neighbors):
    with pytest.raises(ValueError, match=f"{num_neighbors} neighbours of 10 classes: take 1 to 9"):
        built(rows_of(10), num_neighbors, 2)


@pytest.mark.parametrize("ranks, width", GRIDS)
def test_approximate(ranks, width):
    rows = clustered(2000)
    results = built(rows, 8, ranks, width, method="approx")
    found, truth = whole([graph for graph, _ in results]), brute(rows, 8)
    assert recall(found, truth) > 0.9
    stats = results[0][1]
    assert stats["graph_recall"] == pytest.approx(recall(found, truth), abs=0.03) and stats["method"] == "approx"
    assert 0 < stats["graph_probes"] < 20
    assert torch.equal(whole([g for g, _ in built(rows, 8, 1, method="approx")]), found)


@pytest.mark.parametrize("num_classes, ranks", [(3, 4), (17, 3)])
def test_approximate_of_few_classes(num_classes, ranks):
    rows = rows_of(num_classes)
    assert recall(whole([g for g, _ in built(rows, 2, ranks, method="approx")]), brute(rows, 2)) > 0.9


def test_auto_takes_exact_where_that_is_quick(monkeypatch):
    rows = clustered(400)
    assert built(rows, 4, 2, method="auto")[0][1]["method"] == "exact"
    monkeypatch.setattr(build_module, "_AUTO_SECONDS", 0)
    assert built(rows, 4, 2, method="auto")[0][1]["method"] == "approx"


def cells_on(ranks, rows, find):
    """(Cells of all rows, nearest (N, 3)) that find(world, rows of the shard, shard) gives, on so many ranks."""
    def body(world):
        shard = Shard.of(len(rows), world.size, world.rank)
        cells = find(world, rows[shard.first : shard.last], shard)
        assert sorted(cells.sorted_rows()[0].tolist()) == list(range(len(shard)))
        return cells.centroids, cells.of_row, cells.nearest(3, world.shards)

    found = run_ranks(ranks, body)
    assert all(torch.equal(one[0], found[0][0]) and torch.equal(one[2], found[0][2]) for one in found)
    return Cells(found[0][0], torch.cat([of_row for _, of_row, _ in found])), found[0][2]


def test_cells_hold_the_rows_nearest_to_them_on_any_number_of_ranks():
    rows = clustered(3000)

    def find(world, rows, shard):
        return Cells.found(rows, shard, 3000, world.shards, 3)

    cells, near = cells_on(1, rows, find)
    assert torch.equal(cells.of_row.long(), (unit(rows) @ cells.centroids.T).argmax(1)) and len(cells) == 187
    assert torch.equal(near[:, 0], torch.arange(187).int()) and all(len(set(one)) == 3 for one in near.tolist())
    for ranks in 3, 4:
        again, its_near = cells_on(ranks, rows, find)
        assert torch.equal(again.centroids, cells.centroids) and torch.equal(again.of_row, cells.of_row)
        assert torch.equal(its_near, near)


def test_cells_follow_rows_that_moved_on_any_number_of_ranks():
    rows = clustered(3000)
    whole_cells = Cells.found(rows, Shard(0, 3000), 3000, Group(), 3)
    moved = rows + 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))

    def follow(world, rows, shard):
        old = Cells(whole_cells.centroids, whole_cells.of_row[shard.first : shard.last])
        return old.followed(rows, world.shards)

    cells, _ = cells_on(1, moved, follow)
    assert (cells.of_row != whole_cells.of_row).float().mean() > 0.03
    assert (cells.of_row.long() == (unit(moved) @ cells.centroids.T).argmax(1)).float().mean() > 0.97
    for ranks in 3, 4:
        again, _ = cells_on(ranks, moved, follow)
        assert torch.equal(again.centroids, cells.centroids) and torch.equal(again.of_row, cells.of_row)


def rebuilt(rows, steps, ranks=2):
    """Stats of approximate builds of rows that move, each with the cells of the one before; and the last graph."""
    graphs, all_stats = [None] * ranks, []
    for move in steps:
        rows = move(rows)

        def body(world, rows=rows, graphs=graphs):
            shard = Shard.of(len(rows), world.size, world.rank)
            old = graphs[world.rank]
            return build_module.build(rows[shard.first : shard.last], shard, len(rows), 8, world.shards, "approx",
                                      cells=old and old.cells)

        graphs, stats = zip(*run_ranks(ranks, body), strict=True)
        all_stats.append(stats[0])
    return all_stats, recall(whole(graphs), brute(rows, 8))


def test_builds_keep_their_cells_and_their_recall():
    """Some rows turn far between any two of eight builds."""
    def move(rows):
        generator = torch.Generator().manual_seed(int(rows[0, 0] * 1e6) % 1000)
        some = torch.rand(len(rows), 1, generator=generator) < 0.05
        return rows + some * 0.5 * torch.randn(rows.shape, generator=generator)

    stats, found = rebuilt(clustered(3000), [lambda rows: rows, *[move] * 7])
    assert [one["graph_cells_kept"] for one in stats[:3]] == [0, 1, 1]
    assert found == pytest.approx(stats[-1]["graph_recall"], abs=0.03) and found > 0.93


def test_cells_that_no_longer_serve_are_found_anew():
    """Those of untrained rows, which have no clusters; and those of rows that are all others now."""
    untrained = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    stats, found = rebuilt(untrained, [lambda rows: rows, lambda rows: clustered(2000)])
    assert [one["graph_cells_kept"] for one in stats] == [0, 0] and found > 0.93
    stats, found = rebuilt(clustered(2000), [lambda rows: rows, lambda rows: clustered(2000, seed=9)])
    assert stats[1]["graph_probes"] <= 2 * stats[0]["graph_probes"] and found > 0.93


def test_a_search_without_time_takes_few_cells_and_remembers_what_it_needed(monkeypatch):
    untrained = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    (free,), _ = rebuilt(untrained, [lambda rows: rows])
    monkeypatch.setattr(build_module, "_SEARCH_SECONDS", 1e-9)
    (short,), found = rebuilt(untrained, [lambda rows: rows])
    assert short["graph_probes"] == 4 < free["graph_probes"] and found < free["graph_recall"]
    # Rows with clusters need few cells anyway, and the next build keeps them.
    stats, found = rebuilt(clustered(2000), [lambda rows: rows] * 2)
    assert stats[1]["graph_cells_kept"] == 1 and found > 0.8


@pytest.mark.parametrize("num_ranks", [1, 4])
def test_equal_rows_have_neighbours_too(num_ranks):
    """All in one cell, beside cells that are empty. No class is its own neighbour, and none has a neighbour twice."""
    rows = torch.cat([torch.ones(700, 6), clustered(500, 6), torch.zeros(40, 6)])
    edges = []
    for graph, _ in built(rows, 7, num_ranks, method="approx"):
        classes, neighbors, places = graph.lookup(torch.arange(len(rows)))
        edges += zip(classes.tolist(), (neighbors + graph.shard.first).tolist(), places.tolist(), strict=True)
    assert len({(a, b) for a, b, _ in edges}) == len({(a, place) for a, _, place in edges}) == len(edges)
    assert all(a != b for a, b, _ in edges) and len(edges) > 0.95 * 7 * len(rows)


def test_rows_that_are_not_finite_do_not_take_the_others_with_them():
    rows = clustered(1500)
    rows[::150] = torch.nan
    cells = Cells.found(rows, Shard(0, 1500), 1500, Group(), 0)
    assert len(cells.of_row.unique()) > 50 and cells.centroids.isfinite().all()


def test_cells_side_by_side_are_near_each_other():
    """So that a rank that searches some of them needs few others."""
    centroids = Cells.found(clustered(4000), Shard(0, 4000), 4000, Group(), 0).centroids
    cosines = centroids @ centroids.T
    assert cosines.diagonal(1).mean() > cosines.mean() + 0.2
