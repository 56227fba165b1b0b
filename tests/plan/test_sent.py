"""Bytes of a step: those that are planned are those that the collectives count, at any number of ranks."""

from collections import Counter

import pytest
import torch

from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.comm.short_rows import bits_of
from xc.config import Config
from xc.gradients import exchanges
from xc.model import backbone as backbones
from xc.model import head_table as heads
from xc.optim import noise_scale
from xc.optim.schedule import StepPlan
from xc.plan.backbone_size import BackboneSize
from xc.plan.sent import PATHS, Sent
from xc.plan.workload import Workload
from xc.run.metrics import Timer
from xc.train.pipeline import forward_backward

C, DIM = 1031, 9
DGC = {"exchange": "dgc", "optimizer": "sgd", "lr": 0.1, "density": 0.02}
GRIDS = [(1, 0), (2, 0), (3, 0), (7, 0), (4, 2), (6, 2), (3, 1)]


def config(**settings):
    return Config(**{"data": "d", "out": "o", "feature_dim": 12, "global_batch": 42} | settings)


def counted(cfg, num_ranks, per_host=0, num_classes=C):
    """{name: bytes} that rank 0 sends in a step, and the number of its collectives."""
    def body(world):
        net = backbones.build("mlp", (DIM,), cfg.feature_dim, 0, world)
        head, exchange = heads.build(cfg, num_classes, world), exchanges.build(net, world, cfg)
        head.refresh(0, due=cfg.head != "full")
        mine = len(Shard.of(cfg.global_batch // cfg.micro_batches, world.size, world.rank))
        labels = (torch.arange(mine * cfg.micro_batches) * 11 + 17 * world.rank) % num_classes
        parts = [(torch.randn(mine, DIM), part) for part in labels.split(mine)]
        world.traffic.sent.clear()
        plan = StepPlan(0.1, cfg.global_batch, cfg.micro_batches, cfg.density)
        counts = [len(Shard.of(cfg.global_batch // cfg.micro_batches, world.size, rank)) * cfg.micro_batches
                  for rank in range(world.size)]
        head.labels.know(labels, counts, world.all_ranks.all_gather(labels, counts))
        head.select(labels, 0, micro_batches=cfg.micro_batches)
        exchange.noise_seed = 1
        forward_backward(net, head, exchange, parts, labels, plan, Timer(), bits_of(cfg))
        exchange.reduce()
        head.reduce()
        exchange.norms(plan)
        return Counter({name.replace("backbone.all_reduce", "backbone.dense"): sent
                        for name, sent in world.traffic.sent.items() if sent})

    return run_ranks(num_ranks, body, cfg.model_parallel_size, per_host)[0]


def planned(cfg, num_ranks, per_host=1, num_classes=C):
    return Sent.of(Workload.of(cfg, num_classes, num_ranks), BackboneSize.of(cfg, (DIM,)), per_host)


@pytest.fixture(autouse=True)
def measured_in_every_step(monkeypatch):
    monkeypatch.setattr(noise_scale, "EVERY", 1)


@pytest.mark.parametrize("ranks, width", GRIDS)
@pytest.mark.parametrize("settings", [
    {}, {"feature_bits": 16, "gradient_bits": 16}, {"feature_bits": 8}, {"amp": "bf16"}, {"head": "sampled"},
    {"head": "selective"}, {"head": "knn", "select": "labels"}, {"micro_batches": 3},
    {"head": "selective", "micro_batches": 2}, DGC, DGC | {"gradient_bits": 16, "micro_batches": 2},
    {"exchange": "powersgd", "powersgd_rank": 3}])
def test_a_step_sends_what_is_planned(ranks, width, settings):
    cfg = config(model_parallel_size=width, active_classes=300.0, **settings)
    plan = planned(cfg, ranks)
    assert plan.by_collective == pytest.approx(counted(cfg, ranks))
    assert plan.total == pytest.approx(sum(plan.by_collective.values())) and set(plan.by_path) <= set(PATHS)
    assert (plan.total == 0) == (ranks == 1)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("settings", [{}, {"near_parts": 1}, {"micro_batches": 2}])
def test_a_choice_by_scores_sends_what_is_planned(ranks, settings):
    cfg = config(head="knn", active_classes=100.0, **settings)
    assert planned(cfg, ranks).by_collective == pytest.approx(counted(cfg, ranks))


@pytest.mark.parametrize("ranks, width", [(4, 2), (6, 2), (3, 1)])
def test_with_copies_a_choice_by_scores_sends_at_most_what_is_planned(ranks, width):
    cfg = config(head="knn", active_classes=100.0, near_parts=2, model_parallel_size=width)
    plan, found = planned(cfg, ranks), counted(cfg, ranks)
    assert set(plan.by_collective) == set(found)
    for name, sent in plan.by_collective.items():
        assert 0.6 * sent < found[name] <= sent * 1.000001, name


@pytest.mark.parametrize("ranks, per_host", [(4, 2), (6, 2), (6, 3), (4, 4)])
@pytest.mark.parametrize("density", [0.01, 0.3])
def test_dgc_inside_hosts_sends_what_is_planned(ranks, per_host, density):
    cfg = config(**DGC | {"exchange": "dgc-hier", "density": density})
    assert planned(cfg, ranks, per_host).by_collective == pytest.approx(counted(cfg, ranks, per_host))


@pytest.mark.parametrize("ranks, head, of_choice", [(64, "knn", 2), (256, "sampled", 0)])
def test_many_ranks(ranks, head, of_choice):
    cfg = config(head=head, active_classes=float(3 * ranks), global_batch=ranks + 5, feature_dim=4, **DGC)
    plan = planned(cfg, ranks, num_classes=8 * ranks)
    assert plan.by_collective == pytest.approx(counted(cfg, ranks, num_classes=8 * ranks))
    assert [plan.calls.get(path, 0) for path in ("features", "softmax", "choice")] == [2, 2, of_choice]
