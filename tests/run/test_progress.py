"""Long work tells the watchdog of its progress in every block, so that it may take any time."""

import pytest
import torch
from safetensors.torch import save_file

from xc.checkpoint import state as checkpoint
from xc.comm.world import World
from xc.knn import build as build_module
from xc.knn import cell_search, cells, exact_search, graph_file
from xc.model import initial_rows
from xc.model.knn import KnnHead
from xc.run import watchdog


@pytest.mark.parametrize("work", ["evaluation", "selection quality", "exact graph", "approximate graph", "next graph",
                                  "graph file", "finite", "class rows"])
def test_every_block_shows_progress(work, monkeypatch, tmp_path):
    for module, name, value in [(exact_search, "_BLOCK_BYTES", 4 * 8 * 100), (exact_search, "_NUMBERS", 800),
                                (cells, "_NUMBERS", 800), (cell_search, "_ROUND_NUMBERS", 800),
                                (build_module, "_EDGES", 300), (graph_file, "_EDGES", 256 * 3),
                                (checkpoint, "_BLOCK", 800), (initial_rows, "_INIT_BLOCK", 100)]:
        monkeypatch.setattr(module, name, value)
    head = KnnHead(1000, 8, World(), active_classes=100, num_neighbors=3, graph="exact", logits_mb=1e-3)
    features, labels = torch.randn(4, 8), torch.arange(4)

    def graph(method, old=None):
        old_cells = old and old.cells
        return build_module.build(head.weight, head.shard, 1000, 3, head.world.shards, method, cells=old_cells)[0]

    head.select(labels, 0)
    head(features.requires_grad_(), labels, 4)
    old = graph("approx")
    save_file(old.tables(), tmp_path / old.file_name)
    beats = []
    monkeypatch.setattr(watchdog, "heartbeat", lambda what, waits=False: beats.append(what))
    {"evaluation": lambda: head.num_scores_above_target(features, labels),
     "selection quality": lambda: head.selection_quality(features, labels),
     "exact graph": lambda: graph("exact"), "approximate graph": lambda: graph("approx"),
     "next graph": lambda: graph("approx", old),
     "graph file": lambda: graph_file.read_graph([tmp_path / old.file_name], head.shard, 1000),
     "finite": lambda: checkpoint._is_finite(head.weight),
     "class rows": lambda: initial_rows.initial_rows(head.shard, 8, 0)}[work]()
    assert len(beats) >= (4 if work == "graph file" else 10)
