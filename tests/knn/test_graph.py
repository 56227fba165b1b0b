"""A graph's storage: what it holds of a shard, and files that any ranks read."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.graphs import brute, built, rows_of, whole
from xc.comm.shard import Shard
from xc.knn.graph_file import read_graph


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
        assert graph.shift in (3, 4)  # for shards of 67 and 66 rows
        assert graph.bytes_per_class == (4 * (-(-200 // 2**graph.shift) + 1) + 6 * len(graph.neighbors)) / 200
        assert graph.bytes_per_class <= stats["graph_bytes_per_class"] + 1e-5


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
            read = [read_graph(paths, shard, num_classes) for shard in shards]
            assert torch.equal(whole(read), whole(graphs))
            # Bit for bit what so many ranks would have written.
            for a, b in zip([graph for graph, _ in built(rows, 2, readers, method=method)], read, strict=True):
                assert a.tables().keys() == b.tables().keys()
                assert all(torch.equal(table, b.tables()[name]) for name, table in a.tables().items())


def test_files_that_cannot_be_used_are_named(tmp_path):
    paths = write([graph for graph, _ in built(rows_of(50), 3, 2)], tmp_path)
    shard = Shard(0, 50)
    with pytest.raises(ValueError, match="50 classes, 3 neighbours.*build the graph of these 51 classes again"):
        read_graph(paths, Shard(0, 51), 51)
    for some in paths[:1], []:
        with pytest.raises(ValueError, match=f"the {len(some)} files of neighbours do not hold all 50 classes"):
            read_graph(some, shard, 50)
    with pytest.raises(ValueError, match="its classes begin with 25"):
        read_graph(paths[1:], shard, 50)
    with safe_open(paths[0], "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    data = paths[0].read_bytes()
    for broken in data[: len(data) // 2], data[:20], b"":
        paths[0].write_bytes(broken)
        with pytest.raises(ValueError, match=f"{paths[0].name} cannot be used"):
            read_graph(paths, shard, 50)
    for name, value in [("neighbors", 25), ("neighbors", -1), ("places", 3), ("offsets", 7), ("lows", 99)]:
        wrong = tensors | {name: tensors[name].clone()}
        wrong[name][-1] = value
        save_file(wrong, paths[0])
        with pytest.raises(ValueError, match="its edges do not fit its shape"):
            read_graph(paths, shard, 50)
    for name in "offsets", "shape", "places":
        save_file({n: tensor for n, tensor in tensors.items() if n != name}, paths[0])
        with pytest.raises(ValueError, match=f"cannot be used.*{name}"):
            read_graph(paths, shard, 50)


def test_files_of_older_versions_are_read(tmp_path):
    """With an offset for every class, and what a refresh needed."""
    rows, (graph, _) = rows_of(50), built(rows_of(50), 3, 1)[0]
    classes, neighbors, places = graph.lookup(torch.arange(50))
    offsets = torch.nn.functional.pad(classes.bincount(minlength=50).cumsum(0), (1, 0)).int()
    path = tmp_path / graph.file_name
    save_file({"shape": torch.tensor([0, 50, 50, 3, 0]), "recall": torch.ones(1, dtype=torch.float64),
               "offsets": offsets, "neighbors": neighbors.int(), "places": places.to(torch.uint8),
               "codes": torch.zeros(50, 12, dtype=torch.int8)}, path)
    found = [read_graph([path], Shard.of(50, 4, rank), 50) for rank in range(4)]
    assert torch.equal(whole(found), brute(rows, 3))


def test_all_tables_together_do_not_grow_with_the_ranks():
    rows = rows_of(3000)
    sizes = {ranks: sum(graph.bytes_per_class for graph, _ in built(rows, 6, ranks)) for ranks in (1, 3, 16, 40)}
    assert max(sizes.values()) < 1.3 * min(sizes.values()) < 1.3 * 6 * 7, sizes


@pytest.mark.parametrize("name, table", [
    ("cells", torch.full((50,), 10**6, dtype=torch.int32)), ("cells", torch.zeros(3, dtype=torch.int32)),
    ("cells", torch.full((50,), -1, dtype=torch.int32)), ("centroids", torch.zeros(3)), ("probes", torch.zeros(2))])
def test_cells_that_cannot_be_used_are_named(name, table, tmp_path):
    (graph, _), = built(rows_of(50), 3, 1, method="approx")
    path = tmp_path / graph.file_name
    save_file(graph.tables() | {name: table}, path)
    with pytest.raises(ValueError, match=f"{path.name} cannot be used"):
        read_graph([path], Shard(0, 50), 50)


@pytest.mark.parametrize("change", [
    {"shape": torch.tensor([0, 25, 50, 3, 4])},  # of the classes of another file
    {"shape": torch.tensor([25.0, 50, 50, 3, 4])}, {"shape": torch.tensor([25, 50, 50, 2**60, 4])},
    {"offsets": torch.tensor([0, 2**31 - 1, -(2**31), 75, 75], dtype=torch.int32)},  # differences that wrap
    {"offsets": torch.tensor([0.0, 1, 2, 3, torch.inf])},
    {"lows": torch.arange(100).flip(0).to(torch.uint8)}, {"places": torch.zeros(100, dtype=torch.uint8)},
    {"neighbors": torch.zeros(100)}, {"cells": torch.full((25,), torch.nan)}])
def test_a_hostile_file_is_named(change, tmp_path):
    paths = write([graph for graph, _ in built(rows_of(50), 3, 2, method="approx")], tmp_path)
    with safe_open(paths[1], "pt") as file:
        tables = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    name, = change
    if name in ("lows", "places", "neighbors"):  # as long as they were
        change[name] = change[name][: len(tables[name])]
    assert name != "lows" or (tables["lows"][1:] > tables["lows"][:-1]).any()
    save_file(tables | change, paths[1])
    with pytest.raises(ValueError, match="build the graph"):
        read_graph(paths, Shard(0, 50), 50)
