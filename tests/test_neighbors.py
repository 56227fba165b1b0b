"""The graph is what brute force finds, whoever holds the rows; a refresh keeps it so."""

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.launch import mpirun
from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.knn import build as neighbors
from xc.knn import graph as knn_graph
from xc.knn import search as ring_search
from xc.knn.build import build, refresh
from xc.knn.graph import KnnGraph

GRIDS = [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2)]


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


def refreshed(graphs, rows, ranks, **options):
    def body(world):
        graph = graphs[world.shards.rank]
        return refresh(graph, rows[graph.shard.first : graph.shard.last], graph.shard, world.shards, **options)

    return run_ranks(ranks, body)


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


@pytest.mark.parametrize("ranks, width", GRIDS)
@pytest.mark.parametrize("num_classes, num_neighbors", [(300, 7), (301, 1), (3, 2), (2, 1), (40, 39)])
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
    monkeypatch.setattr(ring_search, "_ROUND_BYTES", 4 * 12 * 33)
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


def test_lookup_and_storage():
    rows = rows_of(200)
    truth = brute(rows, 6)
    for graph, stats in built(rows, 6, 3):
        assert (graph.offsets.dtype, graph.neighbors.dtype, graph.places.dtype) == (
            torch.int32, torch.int32, torch.uint8)
        labels = torch.tensor([5, 199, 5, 0, 77])
        expected = [(row, truth[label, place].item() - graph.shard.first, place)
                    for row, label in enumerate(labels.tolist()) for place in range(6)
                    if graph.shard.owns(truth[label, place])]
        assert [tuple(edge) for edge in torch.stack(graph.lookup(labels), 1).tolist()] == expected
        assert [len(part) for part in graph.lookup(labels[:0])] == [0, 0, 0]
        assert graph.bytes_per_class == (4 * 201 + 5 * len(graph.neighbors)) / 200
        assert graph.bytes_per_class <= stats["graph_bytes_per_class"] + 1e-5


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


def write(graphs, folder):
    paths = [folder / graph.file_name for graph in graphs if len(graph.shard)]
    for graph, path in zip([graph for graph in graphs if len(graph.shard)], paths, strict=True):
        save_file({name: tensor.contiguous() for name, tensor in graph.tables().items()}, path)
    return paths


@pytest.mark.parametrize("method", ["exact", "approx"])
@pytest.mark.parametrize("num_classes", [100, 3])
def test_any_ranks_read_any_ranks_files(method, num_classes, tmp_path):
    rows = rows_of(num_classes)
    for writers in 1, 2, 4:
        folder = tmp_path / str(writers)
        folder.mkdir()
        graphs = [graph for graph, _ in built(rows, 2, writers, method=method)]
        paths = write(graphs, folder)
        for readers in 1, 3, 4:
            shards = [Shard.of(num_classes, readers, rank) for rank in range(readers)]
            read = [KnnGraph.read(paths, shard, num_classes) for shard in shards]
            assert torch.equal(whole(read), whole(graphs))
            assert (torch.cat([graph.indexed.codes for graph in read]).equal(
                torch.cat([graph.indexed.codes for graph in graphs])))
            assert refreshed(read, rows, readers, angle=0.05)[0][1]["graph_requeried"] == 0
            if readers == writers:
                for a, b in zip(graphs, read, strict=True):
                    for name in "offsets", "neighbors", "places":
                        assert torch.equal(getattr(a, name), getattr(b, name))


def test_files_that_cannot_be_used_are_named(tmp_path):
    paths = write([graph for graph, _ in built(rows_of(50), 3, 2)], tmp_path)
    shard = Shard(0, 50)
    with pytest.raises(ValueError, match="50 classes, 3 neighbours.*build the graph of these 51 classes anew"):
        KnnGraph.read(paths, Shard(0, 51), 51)
    with pytest.raises(ValueError, match="hold 25 of the 50 classes"):
        KnnGraph.read(paths[:1], shard, 50)
    with pytest.raises(ValueError, match="hold 0 of the 50 classes"):
        KnnGraph.read([], shard, 50)
    with safe_open(paths[0], "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    data = paths[0].read_bytes()
    for broken in data[: len(data) // 2], data[:20], b"":
        paths[0].write_bytes(broken)
        with pytest.raises(ValueError, match=f"{paths[0].name} cannot be used"):
            KnnGraph.read(paths, shard, 50)
    for name, value in [("neighbors", 25), ("neighbors", -1), ("places", 3), ("offsets", 7)]:
        wrong = tensors | {name: tensors[name].clone()}
        wrong[name][-1] = value
        save_file(wrong, paths[0])
        with pytest.raises(ValueError, match="its edges do not fit its shape"):
            KnnGraph.read(paths, shard, 50)
    for name in "codes", "shape", "places":
        save_file({n: tensor for n, tensor in tensors.items() if n != name}, paths[0])
        with pytest.raises(ValueError, match=f"cannot be used.*{name}"):
            KnnGraph.read(paths, shard, 50)


@pytest.mark.mpi
@pytest.mark.parametrize("collectives", ["mpi", "horovod"])
def test_real_ranks_build_the_same_graph(collectives, tmp_path):
    mpirun(3, "-m", "tests.mpi_neighbors", collectives, tmp_path)
    for method in "exact", "approx":
        paths = list((tmp_path / method).glob("neighbors-*.safetensors"))
        found = whole([KnnGraph.read(paths, Shard(0, 2000), 2000)])
        assert len(paths) == 3
        assert torch.equal(found, whole([g for g, _ in built(clustered(2000), 8, 1, method=method)]))
