"""The memory that a run will need, by part. Nothing is allocated to find it.

Class rows, their momentum and the graph are exact. Other parts are computed from the sizes that the code keeps. The
temporaries of a backward pass, and of building a graph or an index, were fitted to measurements.

The most at one time is an upper bound, since not all other parts reach their largest size together either. The
constants were fitted to runs on CPUs; docs/scale.md has what was planned and what was measured. It was not compared
with a run on a GPU.
"""

import math
from dataclasses import dataclass

import torch

from xc.checkpoint.snapshot import MOST_KEPT_BYTES
from xc.config import FLAGS_OF_EXCHANGES
from xc.data.augment import PIECE
from xc.data.loader import PREFETCH
from xc.gradients.powersgd import numbers_sent
from xc.knn.cells import SAMPLES_PER_CELL, number_of_cells
from xc.knn.graph import shift_of
from xc.plan.sent import low_rank_shapes
from xc.plan.workload import Workload

MAX_LOAD = 0.9  # share of the memory; above it, fragments and other processes may make the run fail
_ON_HOST = ("batches", "checkpoint copy", "checkpoint rows", "libraries")  # parts in host memory if the run uses a GPU
_BUILDING, _BESIDE_STEPS = ("building graph or index",), ("checkpoint rows", "evaluation")  # never at the same time
_LIBRARIES = 160 * 2**20  # what torch imports for its optimizers (80 MiB), and what the allocators of threads hold
_SEARCH_BYTES = 2**27  # query rows of a block in the exact search for neighbours
_EDGE_BYTES = 112  # temporaries for each edge of such a block
_ROUND_BYTES = 2**28  # temporaries of a round of the approximate search
_PAIR_BYTES = 220  # temporaries for each pair of an example and a candidate in the choice by scores, with its tables


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of the rank that needs most, and the size of a checkpoint.

    parts    {name: bytes} on rank 0, beyond what a process holds after its imports
    on_disk  bytes of a checkpoint, written by all ranks together
    """

    parts: dict
    on_disk: int

    @property
    def total(self):
        """The most bytes of all parts at one time."""
        return _at_one_time(self.parts)

    @property
    def on_gpu(self):
        """The same of the parts that lie on the GPU of a rank that uses one."""
        return _at_one_time({name: size for name, size in self.parts.items() if name not in _ON_HOST})

    @property
    def on_host(self):
        """The same of the parts in host memory of a rank that uses a GPU."""
        return _at_one_time({name: size for name, size in self.parts.items() if name in _ON_HOST})

    @classmethod
    def of(cls, work, backbone, *, order_bytes=0, max_accumulation_steps=1):
        """The plan of a run.

        work                    its Workload
        backbone                its BackboneSize
        order_bytes             bytes of the order of examples
        max_accumulation_steps  of a step
        """
        cfg, num_ranks, num_examples, head = work.cfg, work.num_ranks, work.examples, _HeadSize(work)
        num_parts = cfg.micro_batches * max_accumulation_steps
        batch = num_examples * backbone.example
        sparse = backbone.matrices if "density" in FLAGS_OF_EXCHANGES[cfg.exchange] else 0
        low_rank = low_rank_shapes(cfg, backbone)  # an error for each number, and Q
        residuals = 2 * sparse + 4 * sum(math.prod(shape) + numbers_sent(shape, cfg.powersgd_rank)[1]
                                         for shape in low_rank)
        weights = backbone.parameters + backbone.buffers
        momentum = backbone.trained - sparse if cfg.momentum else 0
        if cfg.optimizer == "adamw":
            momentum = 2 * backbone.trained  # beside a step count, which is 4 bytes for each tensor
        in_flight = min(3, num_parts)  # micro-batches in the forward pass, the softmax and the backward pass
        parts = {
            "backbone": weights, "backbone gradients": backbone.trained, "backbone momentum": momentum,
            "residuals": residuals, "activations": (2 * in_flight + 1) * num_examples * backbone.activations // 2,
            "class rows": head.table, "row momentum": head.momentum,
            "row gradients": head.gradients(max_accumulation_steps),
            "logits and active rows": head.logits(), "candidates": _PAIR_BYTES * work.num_pairs,
            "graph": head.graph, "index": head.index,
            "building graph or index": head.building, "features": 6 * in_flight * work.group * cfg.feature_dim * 4,
            "batches": (num_parts + max(num_parts, PREFETCH) + 4 * cfg.loader_threads) * batch + order_bytes,
            "inputs": 0 if work.on_cpu else num_parts * batch + 6 * min(batch, 4 * PIECE["cuda"]),
            "class frequencies": work.num_rows, "evaluation": 8 * work.num_rows,  # examples and hits of each class
            "checkpoint copy": residuals + weights + momentum, "checkpoint rows": head.copied,  # the copy stays
            "libraries": _LIBRARIES,
        }
        on_disk = work.num_shards * head.saved + num_ranks * residuals + weights + momentum
        return cls({name: size for name, size in parts.items() if size}, on_disk)


def _at_one_time(parts):
    """No graph or index is built while a checkpoint is written or an evaluation runs."""
    building, beside_steps = (sum(parts.get(name, 0) for name in names) for names in (_BUILDING, _BESIDE_STEPS))
    return sum(parts.values()) - min(building, beside_steps)


@dataclass(frozen=True)
class _HeadSize:
    """Bytes of the classifier on the first rank of a shard group, which has most rows."""

    work: Workload

    @property
    def table(self):
        return self.work.num_rows * self._row * getattr(torch, self.work.cfg.row_dtype).itemsize // 4

    @property
    def momentum(self):
        return self.table if self.work.cfg.head_momentum else 0

    @property
    def _row(self):
        """A row in float32."""
        return 4 * self.work.cfg.feature_dim

    def gradients(self, max_accumulation_steps):
        """In float32. With several accumulation steps or parts, the sum over them of all their rows is kept, too. By
        scores its rows are not known before: the sum of the first selection, the last one and the one before."""
        work = self.work
        num_active = work.quota * work.num_parts
        max_accumulation_steps *= work.cfg.micro_batches if work.by_scores else 1
        several = max_accumulation_steps > 1 or work.num_parts > 1
        accumulated = min(work.num_rows, max_accumulation_steps * num_active) if several else 0
        if work.by_scores and max_accumulation_steps > 1:
            accumulated = min(work.num_rows, num_active) + 2 * accumulated
        return self._row * (num_active + accumulated)

    def logits(self):
        """Logits and rows that the softmax keeps within its memory limit, at least one block; and one block more."""
        work = self.work
        blocks = min(work.quota * work.num_parts, 2 * work.block)
        return work.bytes_kept * work.num_kept + (4 * work.group + self._row) * blocks

    @property
    def graph(self):
        """Edges, their offsets and, of an approximate graph, the cells."""
        work, num_neighbors = self.work, self.work.num_neighbors
        if not num_neighbors:
            return 0
        edges = -(-work.num_classes * num_neighbors // work.num_shards)
        shift = shift_of(work.num_rows, work.num_classes, num_neighbors)
        offsets = (4 if edges < 2**31 else 8) * (-(-work.num_classes // 2**shift) + 1)
        cells = 4 * work.num_rows + self._row * number_of_cells(work.num_classes) if work.approximate else 0
        return offsets + edges * ((5 if num_neighbors <= 256 else 6) + (shift > 0)) + cells

    @property
    def index(self):
        """The index of `selective`. The lists of faiss grow by doubling."""
        return 3 * self.work.num_rows * (self._row + 8) // 2 if self.work.cfg.head == "selective" else 0

    @property
    def building(self):
        """Beyond rows and graph, of which the neighbours that were found have no more bytes: what a search needs."""
        work, rows = self.work, self.work.num_rows * self._row
        if self.index:
            return rows + self.index
        if not self.graph:
            return 0
        if work.approximate:
            num_cells = number_of_cells(work.num_classes)
            sample = SAMPLES_PER_CELL * num_cells // work.num_shards
            cells = num_cells * (6 * self._row + 8 * 192)
            return 2**25 + 16 * work.num_rows + 3 * sample * self._row + cells + min(12 * rows, _ROUND_BYTES)
        block = min(work.num_rows, _SEARCH_BYTES // self._row)
        return 2**25 + rows + block * work.num_neighbors * _EDGE_BYTES + 2 * min(rows, _SEARCH_BYTES)

    @property
    def copied(self):
        """What a checkpoint that is written holds beyond the state: rows that change before they are written, at most;
        and the rows of an index. A graph is never built while a save holds the last one."""
        return min(self.table + self.momentum, MOST_KEPT_BYTES) + self.work.num_rows + self._indexed

    @property
    def saved(self):
        """What a checkpoint has of this rank's shard."""
        return self.table + self.momentum + self.graph + self._indexed

    @property
    def _indexed(self):
        """The rows of an index, as they were when it was built."""
        return self.work.num_rows * self._row if self.index else 0

