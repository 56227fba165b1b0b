"""What a run will take in memory, by part, known before any of it is allocated.

Class rows, their momentum and the graph are exact; the other parts follow what the code keeps, and the temporaries of
building a graph or an index, and of a backward pass, what measurements showed. The parts need not all be there at
one moment, so their sum is a bound rather than an estimate: in the eight short runs on CPUs to which its constants
were fitted (400 to 1,460 MiB; all heads, a ResNet-18 whole and in micro-batches with DGC) it was 2 to 10 % above the
peak, 20 to 25 % for selective, 36 % for knn with an approximate graph; in two that were not among them 5 %
(full, 500,000 x 96, with momentum) and 27 % (a ResNet-34). On a GPU it was not compared.
"""

import math
from dataclasses import dataclass

import torch

from xc.comm.shard import Shard
from xc.comm.world import World
from xc.data.augment import PIECE
from xc.data.loader import PREFETCH
from xc.model import backbone as backbones
from xc.model import head_table as heads

ON_HOST = ("batches", "checkpoint copy", "libraries")  # parts that lie in host memory where the others are on a GPU
_LIBRARIES = 160 * 2**20  # what torch imports for its optimizers (80 MiB), and what allocators of threads hold
_SEARCH_BYTES = 2**27  # of the rows of a block that a graph is searched for
_EDGE_BYTES = 112  # of temporaries for each edge of such a block


@dataclass(frozen=True)
class Network:
    """Bytes of a backbone: parameters of two and more dimensions, all parameters, buffers; what one example's forward
    pass keeps for the backward pass; one example."""

    matrices: int
    parameters: int
    buffers: int
    activations: int
    example: int

    @classmethod
    def of(cls, cfg, input_shape):
        """Build it, and look. UserError where there is none of that name, or it does not take such examples."""
        backbone = backbones.build(cfg.backbone, input_shape, cfg.feature_dim, cfg.seed, World(), cfg.amp)
        own = {p.untyped_storage().data_ptr() for p in backbone.parameters()}
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            features = backbone(torch.zeros(2, *input_shape))  # two: a batch norm has no deviation of one
        activations = sum(kept.values()) // 2
        del features  # until here what was kept lay in places of its own
        parameters = list(backbone.parameters())
        return cls(_nbytes(p for p in parameters if p.dim() > 1), _nbytes(parameters), _nbytes(backbone.buffers()),
                   activations, 4 * math.prod(input_shape))


@dataclass(frozen=True)
class Plan:
    """parts  {name: bytes} of rank 0, which takes most, beyond what a process holds when it has imported all
    on_disk  bytes of a checkpoint, of all ranks
    """

    parts: dict
    on_disk: int

    @property
    def total(self):
        return sum(self.parts.values())

    @classmethod
    def of(cls, cfg, num_classes, num_ranks, network, *, order_bytes=0, max_accumulation_steps=1, on_cpu=True):
        """UserError where the head's settings do not fit the number of classes.

        order_bytes  of the order of examples
        max_accumulation_steps  of --global-batch examples, in a step
        """
        head = _Head.of(cfg, num_classes, cfg.model_parallel_size or num_ranks)
        micro_batch, taken = cfg.global_batch // cfg.micro_batches, cfg.micro_batches * max_accumulation_steps
        mine = len(Shard.of(micro_batch, num_ranks, 0))
        batch = mine * network.example
        group = sum(len(Shard.of(micro_batch, num_ranks, rank)) for rank in range(head.num_shards))
        sparse = network.matrices if cfg.exchange != "dense" else 0
        backbone = network.parameters + network.buffers
        momentum = network.parameters - sparse if cfg.momentum else 0
        under_way = min(3, taken)  # forward pass, softmax, backward pass
        parts = {
            "backbone": backbone, "its gradients": network.parameters, "its momentum": momentum,
            "residuals": 2 * sparse, "activations": (2 * under_way + 1) * mine * network.activations // 2,
            "class rows": head.table, "their momentum": head.momentum,
            "their gradients": head.gradients(max_accumulation_steps),
            "logits and active rows": head.logits(group, on_cpu), "graph": head.graph, "index": head.index,
            "building it": head.building, "features": 6 * under_way * group * cfg.feature_dim * 4,
            "batches": (taken + max(taken, PREFETCH) + 4 * cfg.loader_threads) * batch + order_bytes,
            "inputs": 0 if on_cpu else taken * batch + 6 * min(batch, 4 * PIECE["cuda"]),
            "checkpoint copy": head.saved + 2 * sparse + backbone + momentum, "libraries": _LIBRARIES,
        }
        on_disk = head.num_shards * head.saved + 2 * num_ranks * sparse + backbone + momentum
        return cls({name: size for name, size in parts.items() if size}, on_disk)


@dataclass(frozen=True)
class _Head:
    """Bytes of the classifier on the first rank of a shard group, which has the most rows."""

    cfg: object
    num_shards: int
    num_rows: int  # S
    num_active: int  # A
    num_classes: int
    num_neighbors: int

    @classmethod
    def of(cls, cfg, num_classes, num_shards):
        settings = heads.HEADS[cfg.head].settings(cfg, num_classes)
        num_rows = len(Shard.of(num_classes, num_shards, 0))
        quota = len(Shard.of(settings.get("active_classes", num_classes), num_shards, 0))
        return cls(cfg, num_shards, num_rows,
                   min(num_rows, quota), num_classes,
                   settings.get("num_neighbors", 0))

    @property
    def table(self):
        return self.num_rows * self.cfg.feature_dim * getattr(torch, self.cfg.row_dtype).itemsize

    @property
    def momentum(self):
        return self.table if self.cfg.head_momentum else 0

    def gradients(self, max_accumulation_steps):
        """float32; those of a step's accumulation steps are added up over all their classes."""
        whole = min(self.num_rows, max_accumulation_steps * self.num_active) if max_accumulation_steps > 1 else 0
        return 4 * self.cfg.feature_dim * (self.num_active + whole)

    def logits(self, group, on_cpu):
        """As `ActiveRows` keeps them: what fits the memory for them, but one block at least; and one not kept."""
        memory = (64 if on_cpu else 256) * 2**20
        block = max(1, int((min(memory, 2**20) if on_cpu else memory) / (4 * group)))
        one = 4 * (group + self.cfg.feature_dim)
        kept = min(self.num_active, max(block, int(memory / one)))
        return one * kept + one * min(self.num_active, 2 * block)

    @property
    def graph(self):
        """What is kept between two builds; --graph-refresh-angle keeps codes of the rows as well."""
        edges = -(-self.num_classes * self.num_neighbors // self.num_shards)
        if not edges:
            return 0
        offsets = (4 if edges < 2**31 else 8) * (self.num_classes + 1)
        codes = self._codes if self.cfg.graph_refresh_angle else 0
        return offsets + edges * (5 if self.num_neighbors <= 256 else 6) + codes

    @property
    def _codes(self):
        return self.num_rows * (self.cfg.feature_dim + 4)

    @property
    def index(self):
        """Of `selective`; faiss' lists grow by doubling."""
        return 3 * self.num_rows * (4 * self.cfg.feature_dim + 8) // 2 if self.cfg.head == "selective" else 0

    @property
    def building(self):
        """Unit rows, what the rows were, a second graph or index, and the edges found for a block of rows."""
        rows = 4 * self.num_rows * self.cfg.feature_dim
        if self.index:
            return rows + self.index
        if not self.graph:
            return 0
        block = min(self.num_rows, _SEARCH_BYTES // (4 * self.cfg.feature_dim))
        sample = 32 * min(int(4 * self.num_classes**0.5), self.num_classes // 16) / self.num_shards  # of k-means
        edges = block * self.num_neighbors * _EDGE_BYTES
        return int(2**25 + rows + 28 * self.num_rows + self._codes + 2 * self.graph + edges
                   + 2 * min(rows, _SEARCH_BYTES) + 16 * sample * self.cfg.feature_dim)

    @property
    def saved(self):
        index = 4 * self.num_rows * self.cfg.feature_dim if self.index else 0
        return self.table + self.momentum + self.graph + index


def _nbytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)
