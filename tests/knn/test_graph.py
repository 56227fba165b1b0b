"""A graph's storage: what it holds of a shard, and files that any ranks read."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.support.graphs import brute, built, refreshed, rows_of, whole
from xc.comm.shard import Shard
from xc.knn.graph import KnnGraph


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
    with pytest.raises(ValueError, match="50 classes, 3 neighbours.*build the graph of these 51 classes again"):
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
