"""The time of a step and of a graph build, by phase, from counts of operations, bytes and messages.

A phase takes what its matrix products take at the speed that large ones reach, and what its bytes take at the speed of
memory, with the factors of `Costs` for what lies between. Those of steps on CPUs were fitted to 10^4 to 10^6 classes on
1 to 8 ranks (benchmarks/plan.py; docs/scale.md has what was predicted and measured). Those of builds, and of GPUs, are
counts of passes over memory: nothing was measured on a GPU.
"""

from dataclasses import dataclass

import torch

from xc.knn.build import affordable_probes
from xc.knn.cells import SAMPLES_PER_CELL, number_of_cells
from xc.plan.sent import Sent

_GEMMS = 3  # of the softmax: logits, gradient of the features, gradient of the rows; and logits again if not kept
_PROBES = 8  # cells that an approximate search looks into, if they can be afforded; trained rows need 6 to 16
_KMEANS = 6  # passes over the sample of the rows
_SHARE_HIDDEN = 0.9  # of the backward pass, during which gradients travel


@dataclass(frozen=True)
class Costs:
    """Of a kind of processor.

    width      numbers of a row at which a product with few of them reaches half the speed of a large one
    logit      operations for each logit beside the products, at the speed of large products
    logit_bytes, row_bytes, weight_bytes  read and written for each logit, number of an active row, and weight
    pair       operations for each pair of an example and a candidate in the choice by scores
    candidate  operations for each pair of rows that a search for neighbours compares, beside the product
    edge       operations for each edge of a graph
    step       operations that a micro-batch is worth beside all this: starting some hundred small ones
    call       seconds of starting an operation
    """

    width: float
    logit: float
    logit_bytes: float
    row_bytes: float
    weight_bytes: float
    pair: float
    candidate: float
    edge: float
    step: float
    call: float


COSTS = {"cpu": Costs(8, 440, 0, 40, 40, 200_000, 10, 4000, 2.7e8, 1e-5),
         "cuda": Costs(64, 0, 56, 60, 40, 0, 8, 0, 6e10, 5e-6)}
_CALLS_OF_CELL, _COLLECTIVES_OF_CELL = 40, 8  # where every cell is a round of its own


@dataclass(frozen=True)
class Times:
    """Seconds on the first rank, one accumulation step and no more.

    step   {phase: seconds}; their sum is the step
    build  {phase: seconds} of one build of the graph, empty without one
    """

    step: dict
    build: dict

    @classmethod
    def of(cls, work, backbone, cluster):
        """work: Workload; backbone: BackboneSize; cluster: Cluster"""
        return _Clock(work, backbone, cluster).times()


class _Clock:
    def __init__(self, work, backbone, cluster):
        self.work, self.backbone, self.cluster = work, backbone, cluster
        self.costs = COSTS["cpu" if work.on_cpu else "cuda"]
        self.dim, self.sent = work.cfg.feature_dim, Sent.of(work, backbone, cluster.ranks_per_host)

    def times(self):
        step = {"backbone forward": self.forward(), "choice of classes": self.choice(), "softmax": self.softmax(),
                "backbone backward": 2 * self.forward(), "update": self.update(),
                "starting operations": self.operations(self.costs.step * self.work.cfg.micro_batches)}
        step |= self.network(step)
        return Times(step, self.build() if self.work.num_neighbors else {})

    def products(self, flops, width):
        """Of float32 matrices whose inner dimension is `width`."""
        return flops * (1 + self.costs.width / width) / self.cluster.flops_of(32, self.work.on_cpu)

    def operations(self, count, bits=32):
        return count / self.cluster.flops_of(bits, self.work.on_cpu)

    def moved(self, num_bytes):
        return num_bytes / self.cluster.bandwidth

    def forward(self):
        num_examples = self.work.examples * self.work.cfg.micro_batches
        bits = 32 if self.work.cfg.amp == "off" else 16
        return self.operations(num_examples * self.backbone.flops, bits) + self.moved(
            2 * num_examples * self.backbone.activations)

    def softmax(self):
        """All micro-batches. Rows are gathered once for each selection, and their gradients written."""
        work, cfg = self.work, self.work.cfg
        again = 1 - work.num_kept / (work.quota * work.num_parts)
        logits = work.group * work.quota
        flops = 2 * (_GEMMS + again) * logits * self.dim
        selections = cfg.micro_batches if work.by_scores else 1
        rows = selections * work.num_active * self.dim
        element_wise = logits * (1 + again / 2)
        return (cfg.micro_batches * (self.products(flops, self.dim) + self.operations(element_wise * self.costs.logit)
                                     + self.moved(element_wise * self.costs.logit_bytes))
                + self.moved(rows * self.costs.row_bytes))

    def choice(self):
        work = self.work
        if not work.by_scores:
            return 0.0
        pairs = work.cfg.micro_batches * work.num_pairs
        return self.operations(pairs * (self.costs.pair + 4 * self.dim)) + self.moved(pairs * (8 * self.dim + 220))

    def update(self):
        """Active rows are read, changed and written, and so are the weights of the backbone."""
        work = self.work
        row = 2 * getattr(torch, work.cfg.row_dtype).itemsize * (2 if work.cfg.head_momentum else 1) + 4
        rows = min(work.num_rows, work.num_active)
        return self.moved(rows * self.dim * row + self.backbone.trained / 4 * self.costs.weight_bytes)

    def network(self, step):
        """What travels and is not hidden. Features and their gradients of all micro-batches but one travel under the
        computation of another; gradients of the backbone under its backward pass."""
        parts, rate = self.work.cfg.micro_batches, self.cluster.sending_rate(self.work.on_cpu)
        found = {path: self.sent.by_path.get(path, 0) / rate + self.sent.calls.get(path, 0) * self.cluster.latency
                 for path in self.sent.by_path}
        features, backbone = found.pop("features", 0.0), found.pop("backbone", 0.0)
        computed = sum(step.values()) * (parts - 1) / parts
        hidden = _SHARE_HIDDEN * step["backbone backward"] / parts
        return {"network, features": features / parts + max(0.0, features * (parts - 1) / parts - computed),
                "network, backbone": max(0.0, backbone - hidden), "network, other": sum(found.values())}

    def build(self):
        work = self.work
        C, K, w = work.num_classes, work.num_neighbors, work.num_shards
        edges = self.operations(self.costs.edge * C * K / w) + self.sent_in_build(12 * C * K / w)
        if not work.approximate:
            pairs = C * C / w
            return {"search": self.products(2 * pairs * self.dim, self.dim) + self.operations(
                pairs * self.costs.candidate) + self.sent_in_build(4 * C * self.dim), "distribution": edges}
        num_cells = number_of_cells(C)
        sample = _KMEANS * SAMPLES_PER_CELL * num_cells * num_cells / w
        probes = min(_PROBES, affordable_probes(C, K, self.dim, w, "cpu" if work.on_cpu else "cuda"))
        compared = {"finding cells": sample + C * num_cells / w, "search": C * probes * (C / num_cells) / w}
        found = {name: self.products(2 * pairs * self.dim, self.dim) + self.operations(pairs * self.costs.candidate)
                 for name, pairs in compared.items()}
        found["search"] += self.sent_in_build(4 * self.dim * C / w * min(w, probes)) + num_cells / w * (
            _CALLS_OF_CELL * self.costs.call + _COLLECTIVES_OF_CELL * self.cluster.latency)
        return found | {"distribution": edges}

    def sent_in_build(self, num_bytes):
        return num_bytes / self.cluster.sending_rate(self.work.on_cpu) if self.work.num_shards > 1 else 0.0

