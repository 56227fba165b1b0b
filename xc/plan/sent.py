"""The bytes that a rank sends in a step, by collective: the numbers that xc/comm/traffic.py counts. Nothing is sent.

They are exact where the classes of a step are known beforehand. With several copies of the classifier, the classes that
are chosen by scores, and the gradients of the rows of several selections, are at most as many as given here.
"""

import math
from collections import Counter
from dataclasses import dataclass

from xc.comm.short_rows import bits_of, row_bytes
from xc.comm.traffic import sent_all_gather, sent_all_reduce, sent_reduce_scatter
from xc.config import FLAGS_OF_EXCHANGES
from xc.gradients import sparse_sum, topk
from xc.gradients.allreduce import SKETCH_SIZE
from xc.gradients.powersgd import numbers_sent
from xc.optim import noise_scale

_FORMULAS = {"all_gather": sent_all_gather, "all_reduce": sent_all_reduce, "reduce_scatter": sent_reduce_scatter,
             "all_to_all": lambda size, num_bytes: num_bytes}
_SKETCH_BYTES = 2 * 4 * SKETCH_SIZE  # of the two gradients whose norms give the noise scale
PATHS = {"labels": "labels", "choice": "choice of classes", "features": "features and their gradients",
         "softmax": "softmax", "norm": "norm of the features", "rows": "row gradients of the copies",
         "backbone": "gradients of the backbone"}


@dataclass(frozen=True)
class Sent:
    """What the first rank sends in a step of one accumulation step.

    by_path        {key of PATHS: bytes}
    by_collective  {name in Traffic.sent: bytes}
    calls          {key of PATHS: number of collectives}
    """

    by_path: dict
    by_collective: dict
    calls: dict

    @property
    def total(self):
        """Bytes of all paths."""
        return sum(self.by_path.values())

    @classmethod
    def of(cls, work, backbone, ranks_per_host=1):
        """work: Workload; backbone: BackboneSize; ranks_per_host: the same number on every host"""
        ledger = _Ledger(work, ranks_per_host)
        _labels(ledger, work)
        for _ in range(work.cfg.micro_batches):
            ledger.add("norm", "all_ranks", "all_reduce", 8 * (2 * work.cfg.feature_dim + 1), times=2)
            _choice(ledger, work)
            _features(ledger, work)
            ledger.add("softmax", "shards", "all_reduce", 4 * work.group)
            ledger.add("softmax", "shards", "all_reduce", 8 * work.group)
            ledger.add("softmax", "replicas", "all_reduce", 4)
        ledger.add("rows", "replicas", "all_reduce", 4 * work.cfg.feature_dim * min(work.num_rows, work.num_active))
        _backbone(ledger, work.cfg, backbone)
        return cls(dict(ledger.by_path), dict(ledger.by_collective), dict(ledger.calls))


class _Ledger:
    """Adds up the bytes of collectives. A group of one rank sends nothing."""

    def __init__(self, work, ranks_per_host):
        hosts = -(-work.num_ranks // ranks_per_host)
        self.sizes = {"all_ranks": work.num_ranks, "backbone": work.num_ranks, "shards": work.num_shards,
                      "replicas": work.num_copies, "host": min(ranks_per_host, work.num_ranks), "cross_host": hosts}
        self.by_path, self.by_collective, self.calls = Counter(), Counter(), Counter()

    def add(self, path, group, collective, num_bytes, times=1):
        """num_bytes: of the whole in an all-reduce and a reduce-scatter; of this rank in an all-gather; to other ranks
        in an all-to-all
        """
        size = self.sizes[group]
        if size == 1:
            return
        sent = times * _FORMULAS["all_reduce" if group == "backbone" else collective](size, num_bytes)
        self.by_path[path] += sent
        self.by_collective[f"{group}.{collective}"] += sent
        self.calls[path] += times


def _labels(ledger, work):
    ledger.add("labels", "all_ranks", "all_gather", 8 * work.examples, times=work.cfg.micro_batches)


def _choice(ledger, work):
    """Of a micro-batch. `selective` has one selection in a step."""
    features = 4 * work.group * work.cfg.feature_dim
    if work.by_scores:
        ledger.add("choice", "replicas", "all_gather", 8)
        ledger.add("choice", "replicas", "all_gather", features)
        ledger.add("choice", "replicas", "all_gather", 8 * work.group)
        ledger.add("choice", "shards", "all_reduce", 4 * work.micro_batch, times=2)
        ledger.add("choice", "replicas", "all_gather", 8 * (work.num_parts + 1))
        ledger.add("choice", "replicas", "all_gather", 8 * work.num_active)
        ledger.add("choice", "replicas", "all_gather", 4 * (work.num_active - work.num_targets))
    if work.cfg.head == "selective":
        ledger.add("choice", "replicas", "all_gather", 8 / work.cfg.micro_batches)
        ledger.add("choice", "replicas", "all_gather", features / work.cfg.micro_batches)


def _features(ledger, work):
    bits = bits_of(work.cfg)
    of_one = row_bytes(work.cfg.feature_dim, bits)
    ledger.add("features", "shards", "all_gather", work.examples * of_one)
    if bits == 8:
        ledger.add("features", "shards", "all_to_all", (work.group - work.examples) * of_one)
    else:
        ledger.add("features", "shards", "reduce_scatter", work.group * of_one)


def _backbone(ledger, cfg, backbone):
    """The buckets of the exchange; and the noise scale, where several micro-batches show it, on average."""
    if cfg.micro_batches > 1:
        ledger.add("backbone", "all_ranks", "all_reduce", _SKETCH_BYTES / noise_scale.EVERY)
    if "density" not in FLAGS_OF_EXCHANGES[cfg.exchange]:
        low_rank = low_rank_shapes(cfg, backbone)
        dense = backbone.trained - 4 * sum(map(math.prod, low_rank))
        ledger.add("backbone", "backbone", "dense", dense * cfg.gradient_bits // 32)
        for side in (0, 1) if low_rank else ():
            ledger.add("backbone", "backbone", "dense",
                       4 * sum(numbers_sent(shape, cfg.powersgd_rank)[side] for shape in low_rank))
        return
    ledger.add("backbone", "backbone", "dense", (backbone.trained - backbone.matrices) * cfg.gradient_bits // 32)
    by_host = cfg.exchange == "dgc-hier"
    num_inner = ledger.sizes["host"] if by_host else 1
    outer = "cross_host" if by_host else "all_ranks"
    num_outer, width = ledger.sizes[outer], topk.row_bytes(cfg.gradient_bits)
    longest = [-(-size // num_inner) for size in backbone.buckets]  # part of a rank of the host
    pieces = sparse_sum.cut(longest, cfg.density, num_outer, cfg.gradient_bits)
    for size, part, of_bucket in zip(backbone.buckets, longest, pieces, strict=True):
        if by_host:
            ledger.add("backbone", "host", "reduce_scatter", 4 * size)
        if not of_bucket:
            ledger.add("backbone", outer, "all_reduce", 4 * part)
        if not of_bucket and by_host:
            ledger.add("backbone", "host", "all_gather", 4 * part)
    for together in sparse_sum.rounds(pieces, cfg.gradient_bits):
        of_round = [pieces[i] for i in together]
        to_owners, to_all = sparse_sum.rows_sent(of_round, 0, num_outer)
        ledger.add("backbone", outer, "all_to_all", width * to_owners)
        ledger.add("backbone", outer, "all_gather", width * to_all)
        if by_host:
            ledger.add("backbone", "host", "all_gather", width * sum(one.count * one.kept for one in of_round))


def low_rank_shapes(cfg, backbone):
    """Shapes of the parameters that PowerSGD sends as two matrices; none with another exchange."""
    return [shape for shape in backbone.shapes if cfg.exchange == "powersgd" and numbers_sent(shape, cfg.powersgd_rank)]
