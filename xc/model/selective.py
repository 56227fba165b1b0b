"""Selective softmax: the right classes, and those whose rows an index finds near the features (Zhang et al. 2018)."""

import numpy as np
import torch
from safetensors import safe_open

from xc.model.sampled import SampledHead

_MOST_CELLS, _PROBES, _ROWS_PER_CELL = 1024, 4, 40


class SelectiveHead(SampledHead):
    """Classes near a step are found by FEATURE, in an approximate index over the rows of each shard.

    The authors' index is a forest of random projection trees, built anew every 100 steps; this one is an inverted file
    (faiss). Features must be there first, so classes are chosen in the step's first loss(), by the features of the
    first micro-batch; of every round, where a step has several.
    """

    flags = (*SampledHead.flags, "near_share", "graph_every")

    def __init__(self, *args, active_classes, **kwargs):
        super().__init__(*args, active_classes=active_classes, **kwargs)
        self.active_classes = active_classes
        self._index, self._labels, self._selection = None, [], 0

    @classmethod
    def settings(cls, cfg, num_classes):
        return super().settings(cfg, num_classes) | {"near_share": cfg.near_share}

    def refresh(self, step, due):
        if due and step >= self.warmup_full_steps:
            self._index = self._build(self._unit(self.weight))
        return {}

    def select(self, labels, step, num_rounds=1):
        self._labels, self._selection = [], 0
        super().select(labels, step, num_rounds)

    def select_rounds(self, labels):
        """Only notes the labels: see `loss`."""
        self._labels = labels

    def turn_to(self, selection):
        super().turn_to(selection)
        self._selection = selection

    def loss(self, features, labels, global_batch, last=True):
        if len(self._chosen) <= self._selection < len(self._labels):
            replicas = self.world.replicas
            of_copies = replicas.all_gather(features.detach(), self._counts(labels, replicas))
            of_round = self._labels[self._selection]
            self.choose(self._selection, of_round, *self._near(of_copies, of_round))
        return super().loss(features, labels, global_batch, last)

    def files(self):
        """The rows as they were indexed: the same index can be built of them again."""
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
        self._index = self._build(rows) if paths else None

    def _build(self, rows):
        """An index of unit rows (S, D); None where there are none, or none to search for in a run that diverged."""
        if not len(rows) or not rows.isfinite().all():
            return None
        import faiss  # after torch: each brings its own OpenMP

        faiss.omp_set_num_threads(torch.get_num_threads())
        rows = rows.float().cpu().numpy()
        cells = max(1, min(_MOST_CELLS, len(rows) // _ROWS_PER_CELL))
        quantizer = faiss.IndexFlatIP(self.feature_dim)
        index = faiss.IndexIVFFlat(quantizer, self.feature_dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.nprobe = self.seed % (2**31 - 1) + 1, min(_PROBES, cells)
        index.cp.min_points_per_centroid = 1  # faiss asks for 39, loudly; small shards have fewer
        index.train(rows[:: max(1, len(rows) // (_ROWS_PER_CELL * cells))])
        index.add(rows)
        return index

    def _near(self, features, labels):
        """Local ids (E,) and places (E,) of the rows nearest to the features (G, D)."""
        count = min(len(self.weight), self.active_classes // (len(features) * self.world.shards.size) + 1)
        if self._index is None:
            return self.candidates(labels)
        _, ids = self._index.search(np.ascontiguousarray(features.float().cpu()), count)  # (G, count), -1 where short
        places = np.broadcast_to(np.arange(count), ids.shape)
        found = ids >= 0
        device = features.device
        return torch.from_numpy(ids[found]).to(device), torch.from_numpy(places[found]).to(device)
