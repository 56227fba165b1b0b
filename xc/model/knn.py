"""KNN softmax: the right classes of a step, their neighbours in a graph of the class rows, and random others."""

import math
from pathlib import Path

from xc.errors import UserError
from xc.knn import build as neighbors
from xc.knn.graph import KnnGraph
from xc.model.sampled import SampledHead, budget

_MOST_NEIGHBORS = 50  # of the default: further ones are hardly nearer than a random class, and cost memory


class KnnHead(SampledHead):
    """Classes near a right class are found by LABEL, in a graph of each class's K nearest others by cosine of the rows.

    Song et al. 2020, KNN softmax. A class far from the right one in angle cannot score high for a feature that is
    close to the right one, so its gradient is small: the graph finds the classes that matter without looking at any
    feature, and at a cost that does not grow with their number. Until the first build all but the right classes are
    random.
    """

    flags = (*SampledHead.flags, "neighbors", "near_share", "graph", "graph_every", "graph_angle")

    def __init__(self, *args, num_neighbors, graph="auto", graph_angle=0.0, **kwargs):
        """num_neighbors K; graph exact | approx | auto; graph_angle in degrees, see `neighbors.refresh`."""
        super().__init__(*args, **kwargs)
        self.num_neighbors, self.method, self.angle = num_neighbors, graph, math.radians(graph_angle)
        self.graph = None

    @classmethod
    def settings(cls, cfg, num_classes):
        return super().settings(cfg, num_classes) | {
            "near_share": cfg.near_share, "num_neighbors": num_neighbors(cfg, num_classes), "graph": cfg.graph,
            "graph_angle": cfg.graph_angle}

    def refresh(self, step, due):
        if not due or step < self.warmup_full_steps:
            return {}
        where = self.shard, self.world.shards
        if self.angle and self._can_refresh():
            self.graph, stats = neighbors.refresh(self.graph, self.weight, *where, self.angle, self.seed)
        else:
            self.graph, stats = neighbors.build(self.weight, self.shard, self.num_classes, self.num_neighbors,
                                                self.world.shards, self.method, self.seed)
            if not self.angle:
                self.graph.forget_rows()
        return {name: value for name, value in stats.items() if name != "method"} | {
            "graph_exact": float(stats["method"] == "exact")}

    def _can_refresh(self):
        """Whether there is a graph as this run wants it (after a resume it may be another) that can be refreshed."""
        if self.graph is None or not self.graph.refreshable(self.weight):
            return False
        method = "approx" if self.graph.indexed.probes else "exact"
        return self.graph.num_neighbors == self.num_neighbors and self.method in ("auto", method)

    def candidates(self, labels):
        if self.graph is None:
            return super().candidates(labels)
        _, near, places = self.graph.lookup(labels)
        return near, places

    def files(self):
        return {} if self.graph is None else {self.graph.file_name: self.graph.tables()}

    def load(self, folder):
        paths = sorted(Path(folder).glob("neighbors-*.safetensors"))
        # Of another K it serves until the next build.
        self.graph = KnnGraph.read(paths, self.shard, self.num_classes, self.world.device) if paths else None


def num_neighbors(cfg, num_classes):
    """K of a Config; UserError if it cannot be."""
    if num_classes < 2:
        raise UserError("--head knn needs neighbours, but the data have one class only: take --head full")
    if cfg.neighbors >= num_classes:
        raise UserError(f"--neighbors {cfg.neighbors} is not allowed: a class of {num_classes} has "
                        f"{num_classes - 1} others, take at most {num_classes - 1}")
    if cfg.neighbors:
        return cfg.neighbors
    batch = min(cfg.global_batch, num_classes)
    near = cfg.near_share * (budget(cfg, num_classes) - batch)
    return max(1, min(num_classes - 1, _MOST_NEIGHBORS, math.ceil(1.5 * near / batch)))
