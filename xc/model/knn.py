"""KNN softmax by labels: the target classes of a step, their neighbours in a graph of the class rows, random others."""

import math
from pathlib import Path

from xc.errors import UserError
from xc.knn.build import build
from xc.knn.graph_file import read_graph
from xc.model.sampled import SampledHead, budget

_MAX_NEIGHBORS = 50  # of the default: further ones are hardly nearer than a random class, and cost memory


class KnnHead(SampledHead):
    """Near classes are found by LABEL, in a graph of the K nearest other classes of each class, by cosine of the rows.

    Song et al. 2020, KNN softmax. A class far from the target class in angle cannot score high for a feature close to
    the target class, so its gradient is small. The graph finds the classes that matter without the features, at a cost
    that does not grow with the number of classes. Before the first build the other active classes are random.
    """

    builds = True
    flags = (*SampledHead.flags, "select", "neighbors", "near_share", "graph", "graph_from", "graph_every")

    def __init__(self, *args, num_neighbors, graph="auto", **kwargs):
        """num_neighbors: K; graph: exact, approx or auto."""
        super().__init__(*args, **kwargs)
        self.num_neighbors, self.method = num_neighbors, graph
        self.graph = None

    @classmethod
    def settings(cls, cfg, num_classes):
        return super().settings(cfg, num_classes) | {
            "near_share": cfg.near_share, "num_neighbors": num_neighbors(cfg, num_classes), "graph": cfg.graph}

    @property
    def has_built(self):
        return self.graph is not None

    def refresh(self, step, due):
        if not due:
            return {}
        cells, self.graph = self.graph and self.graph.cells, None  # there may be no memory for two graphs
        self.graph, stats = build(self.weight, self.shard, self.num_classes, self.num_neighbors, self.world.shards,
                                  self.method, self.seed, cells)
        return {name: value for name, value in stats.items() if name != "method"} | {
            "graph_exact": float(stats["method"] == "exact")}

    def candidates(self, labels):
        if self.graph is None:
            return super().candidates(labels)
        _, near, neighbor_ranks = self.graph.lookup(labels)
        return near, neighbor_ranks

    def files(self):
        return {} if self.graph is None else {self.graph.file_name: self.graph.tables()}

    def load(self, folder):
        paths = sorted(Path(folder).glob("neighbors-*.safetensors"))
        # A graph with another K serves until the next build.
        self.graph = read_graph(paths, self.shard, self.num_classes, self.world.device) if paths else None
        cells = self.graph and self.graph.cells
        if cells and cells.centroids.shape[1] != self.feature_dim:
            raise ValueError(f"the cells of {paths[0].name} are of rows of width {cells.centroids.shape[1]}, not "
                             f"{self.feature_dim}: build the graph again")


def num_neighbors(cfg, num_classes, near_parts=1, least=1):
    """K of a Config; UserError where there are too few classes for it.

    near_parts  parts of a batch that have near classes of their own
    least       of a K that the user has not given
    """
    if num_classes < 2:
        raise UserError("--head knn needs neighbours, but the data have one class only: take --head full")
    if cfg.neighbors >= num_classes:
        raise UserError(f"--neighbors {cfg.neighbors} is not allowed: a class of {num_classes} has "
                        f"{num_classes - 1} others, take at most {num_classes - 1}")
    if cfg.neighbors:
        return cfg.neighbors
    batch = min(cfg.global_batch, num_classes)
    near = cfg.near_share * (budget(cfg, num_classes) - batch)
    return max(1, min(num_classes - 1, _MAX_NEIGHBORS, max(least, math.ceil(1.5 * near * near_parts / batch))))
