"""The graph is what brute force finds, whoever holds the rows; a refresh keeps it so."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.graphs import GRIDS, brute, built, clustered, recall, refreshed, rows_of, whole
from xc.knn import build as neighbors
from xc.knn import graph as knn_graph
from xc.knn import search as ring_search


@pytest.mark.parametrize("ranks, width", [*GRIDS, (4, 4)])
@pytest.mark.parametrize("num_classes, num_neighbors", [(300, 7), (301, 1), (2, 1), (40, 39)])
def test_exact_is_brute_force_for_any_ranks(ranks, width, num_classes, num_neighbors):
    rows = rows_of(num_classes)
    graphs = built(rows, num_neighbors, ranks, width)
    assert torch.equal(whole([graph for graph, _ in graphs]), brute(rows, num_neighbors))
    stats = graphs[0][1]
    assert stats["graph_recall"] == 1 and stats["graph_requeried"] == 1 and stats["method"] == "exact"


@pytest.mark.parametrize("ranks", [1, 3])
def test_many_rows_alike(ranks):
    """More equal rows than a hop has candidates: only the ids decide."""
    rows = torch.cat([torch.ones(90, 5), rows_of(60, 5), torch.zeros(10, 5)])[torch.randperm(
        160, generator=torch.Generator().manual_seed(0))]
    assert torch.equal(whole([graph for graph, _ in built(rows, 4, ranks)]), brute(rows, 4))


def test_blocks_and_rounds_change_nothing(monkeypatch):
    rows = rows_of(500)
    monkeypatch.setattr(ring_search, "_BLOCK_BYTES", 4 * 12 * 33)
    monkeypatch.setattr(ring_search, "CHUNK", 100)
    monkeypatch.setattr(knn_graph, "CHUNK", 100)
    graphs = [graph for graph, _ in built(rows, 5, 3)]
    assert torch.equal(whole(graphs), brute(rows, 5))


def test_many_queries_take_the_other_library():
    rows = rows_of(2500, 24)
    assert torch.equal(whole([graph for graph, _ in built(rows, 6, 2)]), brute(rows, 6))


def test_rows_in_bfloat16_and_places_beyond_a_byte():
    rows = rows_of(400).bfloat16()
    graphs = [graph for graph, _ in built(rows, 300, 2)]
    assert torch.equal(whole(graphs), brute(rows.float(), 300))
    assert all(graph.places.dtype == torch.int16 for graph in graphs)


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
    assert 0 < results[0][0].indexed.probes < len(results[0][0].indexed.centroids) / 2
    assert torch.equal(whole([g for g, _ in built(rows, 8, ranks, width, method="approx")]), found)


@pytest.mark.parametrize("num_classes, ranks", [(3, 4), (17, 3)])
def test_approximate_of_few_classes(num_classes, ranks):
    rows = rows_of(num_classes)
    assert recall(whole([g for g, _ in built(rows, 2, ranks, method="approx")]), brute(rows, 2)) > 0.9


def test_auto_takes_exact_where_that_is_quick(monkeypatch):
    rows = clustered(400)
    assert built(rows, 4, 2, method="auto")[0][1]["method"] == "exact"
    monkeypatch.setattr(neighbors, "_AUTO_SECONDS", 0)
    assert built(rows, 4, 2, method="auto")[0][1]["method"] == "approx"


@pytest.mark.parametrize("method", ["exact", "approx"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_refresh_without_moves_changes_nothing(method, ranks):
    rows = clustered(600)
    graphs = [graph for graph, _ in built(rows, 5, ranks, method=method)]
    for old, (new, stats) in zip(graphs, refreshed(graphs, 3 * rows, ranks, angle=0.05), strict=True):
        assert stats["graph_requeried"] == 0 and stats["method"] == "refresh"
        for name in "offsets", "neighbors", "places":
            assert torch.equal(getattr(old, name), getattr(new, name))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_refresh_of_all_rows_is_a_build(ranks):
    graphs = [graph for graph, _ in built(rows_of(300), 5, ranks)]
    rows = rows_of(300, seed=1)
    new = refreshed(graphs, rows, ranks, angle=0.0)
    assert new[0][1]["graph_requeried"] == 1 and new[0][1]["graph_recall"] == 1
    assert torch.equal(whole([graph for graph, _ in new]), brute(rows, 5))


@pytest.mark.parametrize("method", ["exact", "approx"])
def test_refresh_after_some_rows_moved(method):
    rows = clustered(2000)
    old = [graph for graph, _ in built(rows, 8, 2, method=method)]
    rows = rows.clone()
    rows[::40] = rows[7::40].roll(3, 0)[: len(rows[::40])] * 1.1 + 0.2 * rows[::40]
    new = refreshed(old, rows, 2, angle=0.1)
    truth, found = brute(rows, 8), whole([graph for graph, _ in new])
    stats = new[0][1]
    assert 0.025 < stats["graph_requeried"] < 0.6
    assert recall(found, truth) > 0.95 > recall(whole(old), truth) + 0.01
    assert stats["graph_recall"] == pytest.approx(recall(found, truth), abs=0.03)
    again = refreshed([graph for graph, _ in new], rows, 2, angle=0.1)
    assert again[0][1]["graph_requeried"] == 0
    assert torch.equal(whole([graph for graph, _ in again]), found)


def test_a_refresh_becomes_a_build_where_that_is_better():
    """Graphs of untrained rows, then rows as training makes them: the cells of the first are of no use any more."""
    rows = clustered(2000)
    untrained = torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    for method in "exact", "approx":
        old = [graph for graph, _ in built(untrained, 8, 2, method=method)]
        stats = refreshed(old, rows, 2, angle=0.1)[0][1]
        assert stats["graph_requeried"] == 1 and stats["method"] == method and stats["graph_recall"] > 0.9


def test_recall_lasts_over_many_refreshes():
    rows = clustered(2000)
    graphs = [graph for graph, _ in built(rows, 8, 2, method="approx")]
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        moved = torch.rand(len(rows), generator=generator) < 0.1
        rows[moved] += 0.6 * torch.randn(rows.shape, generator=generator)[moved]
        results = refreshed(graphs, rows, 2, angle=0.1)
        graphs = [graph for graph, _ in results]
    fresh = built(rows, 8, 2, method="approx")[0][1]["graph_recall"]
    assert results[0][1]["graph_recall"] > fresh - 0.06


def test_slow_turns_add_up():
    """A row that turns by less than the angle each time is found anew once it has turned by more."""
    rows = torch.randn(100, 12, generator=torch.Generator().manual_seed(3))
    graphs, requeried = [graph for graph, _ in built(rows, 3, 1)], []
    step = 0.08 * F.normalize(torch.randn(1, 12, generator=torch.Generator().manual_seed(1)))
    for _ in range(3):
        rows[:1] = F.normalize(rows[:1]) + step
        ((graph, stats),) = refreshed(graphs, rows, 1, angle=0.15)
        graphs = [graph]
        requeried.append(stats["graph_requeried"] > 0)
    assert requeried[0] is False and any(requeried)
