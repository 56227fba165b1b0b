"""The sizes of a step and of its tables, on the first rank, which no rank exceeds. From a Config; nothing is run."""

from dataclasses import dataclass

from xc.comm.shard import Shard
from xc.config import Config
from xc.knn.build import method_of
from xc.model import head_table as heads
from xc.model.scored import NUM_FURTHER

_LOGITS_BYTES = 2**28  # for logits and active rows that are kept


@dataclass(frozen=True)
class Workload:
    """Beside the letters of the docs, w ranks hold one copy of the classifier. All numbers are of the first rank.

    num_ranks      W
    num_shards     w
    num_rows       S, rows of this rank
    quota          A, active classes of this rank that an example is compared with
    num_parts      P of a micro-batch, with active classes of their own
    num_neighbors  K of the graph; 0: there is none
    approximate    whether the graph is
    micro_batch    examples of a micro-batch, on all ranks
    examples       of them on this rank
    group          of them on the ranks of a copy, G
    """

    cfg: Config
    num_classes: int
    num_ranks: int
    num_shards: int
    num_rows: int
    quota: int
    num_parts: int
    num_neighbors: int
    approximate: bool
    on_cpu: bool
    micro_batch: int
    examples: int
    group: int

    @classmethod
    def of(cls, cfg, num_classes, num_ranks, on_cpu=True):
        """UserError where the head's settings do not fit the number of classes."""
        num_shards = cfg.model_parallel_size or num_ranks
        settings = heads.head_class(cfg).settings(cfg, num_classes)
        method = method_of(cfg.graph, num_classes, cfg.feature_dim, num_shards, "cpu" if on_cpu else "cuda")
        micro_batch = cfg.global_batch // cfg.micro_batches
        of_ranks = [len(Shard.of(micro_batch, num_ranks, rank)) for rank in range(num_shards)]
        return cls(cfg, num_classes, num_ranks, num_shards, len(Shard.of(num_classes, num_shards, 0)),
                   len(Shard.of(settings.get("active_classes", num_classes), num_shards, 0)),
                   settings.get("near_parts", 1), settings.get("num_neighbors", 0), method == "approx", on_cpu,
                   micro_batch, of_ranks[0], sum(of_ranks))

    @property
    def num_copies(self):
        """R, of the classifier."""
        return self.num_ranks // self.num_shards

    @property
    def block(self):
        """Classes whose logits are computed at a time."""
        memory = min(_LOGITS_BYTES, 2**20) if self.on_cpu else _LOGITS_BYTES
        return max(1, int(memory / (4 * self.group)))

    @property
    def bytes_kept(self):
        """Bytes of an active row that is kept: its logits, and the row where it was gathered, or its length."""
        return 4 * (self.group + (self.cfg.feature_dim if self.cfg.head != "full" else 1))

    @property
    def num_kept(self):
        """Active rows of this shard whose logits are kept; those of the others are computed twice."""
        return min(self.quota * self.num_parts, max(self.block, int(_LOGITS_BYTES / self.bytes_kept)))

    @property
    def by_scores(self):
        """Whether each micro-batch chooses its classes by scores."""
        return self.cfg.head == "knn" and self.cfg.select == "scores"

    @property
    def num_pairs(self):
        """Pairs of an example and a candidate of this shard in the choice by scores, at most."""
        if not self.by_scores:
            return 0
        return -(-self.micro_batch * (self.num_neighbors + NUM_FURTHER + 1) // self.num_shards)

    @property
    def num_targets(self):
        """Target classes of this shard in a selection, if all examples of all copies have different ones."""
        examples = self.micro_batch if self.by_scores else self.cfg.global_batch
        return min(self.num_rows, self.quota, -(-min(examples, self.num_classes) // self.num_shards))

    @property
    def num_active(self):
        """Rows that take part, those of several parts as often, at most."""
        return self.num_targets + self.num_parts * (self.quota - self.num_targets)
