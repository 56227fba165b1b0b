"""The memory that a run will need, by part. Nothing is allocated to find it.

Class rows, their momentum and the graph are exact. Other parts are computed from the sizes that the code keeps. The
temporaries of a backward pass, and of building a graph or an index, were fitted to measurements.

The sum of the parts is an upper bound, since they do not all exist at the same time. The constants were fitted to eight
short runs on CPUs (400 to 1,460 MiB; all heads, a ResNet-18 with and without micro-batches and DGC). There the sum was
2 to 10 % above the peak, 20 to 25 % for selective, 36 % for knn with an approximate graph. In two other runs it was 5 %
(full, 500,000 x 96, with momentum) and 27 % (a ResNet-34) above. Saves and approximate graphs take less since then:
these parts are computed from the code. It was not compared with a run on a GPU.
"""

import math
from dataclasses import dataclass

import torch

from xc.checkpoint.snapshot import MOST_KEPT_BYTES
from xc.comm.shard import Shard
from xc.comm.world import World
from xc.config import FLAGS_OF_EXCHANGES
from xc.data.augment import PIECE
from xc.data.loader import PREFETCH
from xc.knn.build import method_of
from xc.knn.cells import SAMPLES_PER_CELL, number_of_cells
from xc.knn.graph import shift_of
from xc.model import backbone as backbones
from xc.model import head_table as heads
from xc.model.scored import NUM_FURTHER

ON_HOST = ("batches", "checkpoint copy", "libraries")  # parts in host memory if the run uses a GPU
_LIBRARIES = 160 * 2**20  # what torch imports for its optimizers (80 MiB), and what the allocators of threads hold
_SEARCH_BYTES = 2**27  # query rows of a block in the exact search for neighbours
_EDGE_BYTES = 112  # temporaries for each edge of such a block
_ROUND_BYTES = 2**28  # temporaries of a round of the approximate search
_PAIR_BYTES = 220  # temporaries for each pair of an example and a candidate in the choice by scores, with its tables


@dataclass(frozen=True)
class BackboneSize:
    """Bytes of a backbone.

    matrices     parameters with two or more dimensions that are trained
    parameters   all parameters
    buffers      all buffers
    activations  what the forward pass of one example keeps for the backward pass
    example      one example
    trained      parameters that are trained
    """

    matrices: int
    parameters: int
    buffers: int
    activations: int
    example: int
    trained: int

    @classmethod
    def of(cls, cfg, input_shape, num_ranks=1):
        """Build the backbone and measure it. UserError if its name is unknown or it does not take such examples."""
        examples_of_rank = cfg.global_batch // cfg.micro_batches // num_ranks
        backbone = backbones.build(cfg.backbone, input_shape, cfg.feature_dim, cfg.seed, World(), cfg.amp,
                                   examples_of_rank, cfg.freeze)
        own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        saved = {}  # {address: bytes}

        def save(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            features = backbone(torch.zeros(2, *input_shape))  # two, since a batch norm needs more than one
        activations = sum(saved.values()) // 2
        del features  # only now, since freed memory could be used twice and would be counted once
        parameters = list(backbone.parameters())
        trained = [p for p in parameters if p.requires_grad]
        return cls(_nbytes(p for p in trained if p.dim() > 1), _nbytes(parameters), _nbytes(backbone.buffers()),
                   activations, 4 * math.prod(input_shape), _nbytes(trained))


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
        """Bytes of all parts."""
        return sum(self.parts.values())

    @classmethod
    def of(cls, cfg, num_classes, num_ranks, backbone, *, order_bytes=0, max_accumulation_steps=1, on_cpu=True):
        """The plan of a run. UserError if the head's settings do not fit the number of classes.

        backbone                its BackboneSize
        order_bytes             bytes of the order of examples
        max_accumulation_steps  of a step
        """
        head = _HeadSize.of(cfg, num_classes, cfg.model_parallel_size or num_ranks, "cpu" if on_cpu else "cuda")
        micro_batch, num_parts = cfg.global_batch // cfg.micro_batches, cfg.micro_batches * max_accumulation_steps
        num_examples = len(Shard.of(micro_batch, num_ranks, 0))  # of this rank in a micro-batch
        batch = num_examples * backbone.example
        group = sum(len(Shard.of(micro_batch, num_ranks, rank)) for rank in range(head.num_shards))
        sparse = backbone.matrices if "density" in FLAGS_OF_EXCHANGES[cfg.exchange] else 0
        weights = backbone.parameters + backbone.buffers
        momentum = backbone.trained - sparse if cfg.momentum else 0
        if cfg.optimizer == "adamw":
            momentum = 2 * backbone.trained  # beside a step count, which is 4 bytes for each tensor
        in_flight = min(3, num_parts)  # micro-batches in the forward pass, the softmax and the backward pass
        parts = {
            "backbone": weights, "backbone gradients": backbone.trained, "backbone momentum": momentum,
            "residuals": 2 * sparse, "activations": (2 * in_flight + 1) * num_examples * backbone.activations // 2,
            "class rows": head.table, "row momentum": head.momentum,
            "row gradients": head.gradients(max_accumulation_steps),
            "logits and active rows": head.logits(group, on_cpu), "candidates": head.candidates(micro_batch),
            "graph": head.graph, "index": head.index,
            "building graph or index": head.building, "features": 6 * in_flight * group * cfg.feature_dim * 4,
            "batches": (num_parts + max(num_parts, PREFETCH) + 4 * cfg.loader_threads) * batch + order_bytes,
            "inputs": 0 if on_cpu else num_parts * batch + 6 * min(batch, 4 * PIECE["cuda"]),
            "scores by class": 9 * head.num_rows,  # examples, hits and frequency of each class
            "checkpoint copy": head.copied + 2 * sparse + weights + momentum, "libraries": _LIBRARIES,
        }
        on_disk = head.num_shards * head.saved + 2 * num_ranks * sparse + weights + momentum
        return cls({name: size for name, size in parts.items() if size}, on_disk)


@dataclass(frozen=True)
class _HeadSize:
    """Bytes of the classifier on the first rank of a shard group, which has most rows."""

    cfg: object
    num_shards: int
    num_rows: int  # S
    num_active: int  # A, rows of several parts as often
    num_parts: int  # of a batch, with active rows of their own
    num_classes: int
    num_neighbors: int
    approximate: bool  # the graph

    @classmethod
    def of(cls, cfg, num_classes, num_shards, device_type):
        settings = heads.head_class(cfg).settings(cfg, num_classes)
        num_rows = len(Shard.of(num_classes, num_shards, 0))
        quota = len(Shard.of(settings.get("active_classes", num_classes), num_shards, 0))
        parts = settings.get("near_parts", 1)
        return cls(cfg, num_shards, num_rows, quota * parts, parts, num_classes, settings.get("num_neighbors", 0),
                   method_of(cfg.graph, num_classes, cfg.feature_dim, num_shards, device_type) == "approx")

    @property
    def table(self):
        return self.num_rows * self.cfg.feature_dim * getattr(torch, self.cfg.row_dtype).itemsize

    @property
    def momentum(self):
        return self.table if self.cfg.head_momentum else 0

    @property
    def _by_scores(self):
        """Whether each micro-batch has a selection of its own."""
        return self.cfg.head == "knn" and self.cfg.select == "scores"

    def gradients(self, max_accumulation_steps):
        """In float32. With several accumulation steps or parts, the sum over them of all their rows is kept, too. By
        scores its rows are not known before: the sum of the first selection, the last one and the one before."""
        max_accumulation_steps *= self.cfg.micro_batches if self._by_scores else 1
        several = max_accumulation_steps > 1 or self.num_parts > 1
        accumulated = min(self.num_rows, max_accumulation_steps * self.num_active) if several else 0
        if self._by_scores and max_accumulation_steps > 1:
            accumulated = min(self.num_rows, self.num_active) + 2 * accumulated
        return 4 * self.cfg.feature_dim * (self.num_active + accumulated)

    def candidates(self, batch):
        """The choice by scores: pairs of an example and a candidate of this shard, and tables of them by part."""
        if not self._by_scores:
            return 0
        return _PAIR_BYTES * -(-batch * (self.num_neighbors + NUM_FURTHER + 1) // self.num_shards)

    def logits(self, group, on_cpu):
        """Logits and rows that the softmax keeps within its memory limit, at least one block; and one block more."""
        memory = (64 if on_cpu else 256) * 2**20
        block = max(1, int((min(memory, 2**20) if on_cpu else memory) / (4 * group)))
        per_class = 4 * (group + self.cfg.feature_dim)
        num_kept = min(self.num_active, max(block, int(memory / per_class)))
        return per_class * num_kept + per_class * min(self.num_active, 2 * block)

    @property
    def graph(self):
        """Edges, their offsets and, of an approximate graph, the cells."""
        if not self.num_neighbors:
            return 0
        edges = -(-self.num_classes * self.num_neighbors // self.num_shards)
        shift = shift_of(self.num_rows, self.num_classes, self.num_neighbors)
        offsets = (4 if edges < 2**31 else 8) * (-(-self.num_classes // 2**shift) + 1)
        cells = 4 * self.num_rows + 4 * self._num_cells * self.cfg.feature_dim if self.approximate else 0
        return offsets + edges * ((5 if self.num_neighbors <= 256 else 6) + (shift > 0)) + cells

    @property
    def _num_cells(self):
        return number_of_cells(self.num_classes)

    @property
    def index(self):
        """The index of `selective`. The lists of faiss grow by doubling."""
        return 3 * self.num_rows * (4 * self.cfg.feature_dim + 8) // 2 if self.cfg.head == "selective" else 0

    @property
    def building(self):
        """Beyond rows and graph, of which the neighbours that were found have no more bytes: what a search needs."""
        rows = 4 * self.num_rows * self.cfg.feature_dim
        if self.index:
            return rows + self.index
        if not self.graph:
            return 0
        if self.approximate:
            sample = SAMPLES_PER_CELL * self._num_cells // self.num_shards
            cells = self._num_cells * (24 * self.cfg.feature_dim + 8 * 192)
            return (2**25 + 16 * self.num_rows + 12 * sample * self.cfg.feature_dim + cells
                    + min(12 * rows, _ROUND_BYTES))
        block = min(self.num_rows, _SEARCH_BYTES // (4 * self.cfg.feature_dim))
        return 2**25 + rows + block * self.num_neighbors * _EDGE_BYTES + 2 * min(rows, _SEARCH_BYTES)

    @property
    def copied(self):
        """What a checkpoint that is written holds: rows that change before they are written, at most; and the graph or
        index of then."""
        rows = self.table + self.momentum
        return min(rows, MOST_KEPT_BYTES) + self.num_rows + self.saved - rows

    @property
    def saved(self):
        """What a checkpoint has of this rank's shard."""
        index = 4 * self.num_rows * self.cfg.feature_dim if self.index else 0
        return self.table + self.momentum + self.graph + index


def _nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)
