"""Selective softmax: the target classes, and those whose rows an index finds near the features (Zhang et al. 2018)."""

import numpy as np
import torch
from safetensors import safe_open

from xc.model.group_labels import counts_of
from xc.model.sampled import SampledHead

_MAX_CELLS, _PROBES, _ROWS_PER_CELL = 1024, 4, 40


class SelectiveHead(SampledHead):
    """Near classes are found by FEATURE, in an approximate index over the rows of each shard.

    The authors' index is a forest of random projection trees, rebuilt every 100 steps; this one is an inverted file
    (faiss). The choice needs features, so the first loss() of a selection makes it, from its first micro-batch.
    """

    builds = True
    flags = (*SampledHead.flags, "near_share", "graph_from", "graph_every")

    def __init__(self, *args, active_classes, **kwargs):
        super().__init__(*args, active_classes=active_classes, **kwargs)
        self.active_classes = active_classes
        self._index, self._labels = None, []

    @classmethod
    def settings(cls, cfg, num_classes):
        return super().settings(cfg, num_classes) | {"near_share": cfg.near_share}

    def refresh(self, step, due):
        if due:
            self._index, self.has_built = self._build(self._unit(self.weight)), True
        return {}

    def _select(self, labels):
        """No Selection yet: `loss` chooses them from the features. Keeps the labels for it."""
        self._labels = labels
        return [None] * len(labels)

    def loss(self, features, labels, global_batch, last=True):
        if self.selection is None:
            self.selection = self.selections[self._current] = self._choose_by_feature(features, labels)
        return super().loss(features, labels, global_batch, last)

    def _choose_by_feature(self, features, labels):
        """The current Selection, by the features (G, D) of a micro-batch with these labels (G,). Collective."""
        replicas = self.world.replicas
        all_features = replicas.all_gather(features.detach(), counts_of(labels, replicas))
        of_selection = self._labels[self._current]
        return self.choose(of_selection, self.step + self._current, *self._search(all_features, of_selection))

    def files(self):
        """The rows as they were indexed: `load` builds the same index from them."""
        if self._index is None:
            return {}
        self._index.make_direct_map()
        rows = torch.from_numpy(self._index.reconstruct_n(0, len(self.weight)))
        return {f"index-{self.shard.first:012d}-{self.shard.last:012d}.safetensors": {"rows": rows}}

    def load(self, folder):
        paths = sorted(folder.glob("index-*-*.safetensors"))
        rows, covered = torch.empty(self.weight.shape), 0
        for path in paths:
            first, last = (int(number) for number in path.stem.split("-")[1:])
            start, stop = max(first, self.shard.first), min(last, self.shard.last)
            if start < stop:
                with safe_open(path, "pt") as file:
                    rows[start - self.shard.first : stop - self.shard.first] = \
                        file.get_slice("rows")[start - first : stop - first]
                covered += stop - start
        if paths and covered != len(rows):
            raise ValueError(f"its index holds {covered} of the {len(rows)} classes of this shard")
        self._index, self.has_built = self._build(rows) if paths else None, bool(paths)

    def _build(self, rows):
        """An index of unit rows (S, D); None where there are no rows, or a diverged run has non-finite ones."""
        if not len(rows) or not rows.isfinite().all():
            return None
        import faiss  # after torch: each brings its own OpenMP

        faiss.omp_set_num_threads(torch.get_num_threads())
        rows = rows.float().cpu().numpy()
        cells = max(1, min(_MAX_CELLS, len(rows) // _ROWS_PER_CELL))
        quantizer = faiss.IndexFlatIP(self.feature_dim)
        index = faiss.IndexIVFFlat(quantizer, self.feature_dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.nprobe = self.seed % (2**31 - 1) + 1, min(_PROBES, cells)
        index.cp.min_points_per_centroid = 1  # faiss warns below 39; small shards have fewer
        index.train(rows[:: max(1, len(rows) // (_ROWS_PER_CELL * cells))])
        index.add(rows)
        return index

    def _search(self, features, labels):
        """Local ids (E,) and neighbour ranks (E,) of the rows nearest to the features (G, D)."""
        count = min(len(self.weight), self.active_classes // (len(features) * self.world.shards.size) + 1)
        if self._index is None:
            return self.candidates(labels)
        _, ids = self._index.search(np.ascontiguousarray(features.float().cpu()), count)  # (G, count), -1: none
        ranks = np.broadcast_to(np.arange(count), ids.shape)
        found = ids >= 0
        device = features.device
        return torch.from_numpy(ids[found]).to(device), torch.from_numpy(ranks[found]).to(device)
