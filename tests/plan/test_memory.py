"""The plan against the tensors: what is planned is what is there."""

import copy

import pytest
import torch

from tests.support.worlds import run_ranks
from xc.checkpoint import state as checkpoint
from xc.checkpoint.writer import CheckpointWriter
from xc.comm.shard import Shard
from xc.comm.world import World
from xc.config import Config
from xc.errors import UserError
from xc.gradients import exchanges
from xc.model import backbone as backbones
from xc.model import head_table as heads
from xc.optim.noise_scale import NoiseScale
from xc.optim.optimizers import RowSGD, backbone_optimizer
from xc.optim.schedule import Progress
from xc.plan.backbone_size import BackboneSize
from xc.plan.memory import MemoryPlan
from xc.plan.workload import Workload
from xc.run.loss_meter import LossMeter

C, D, G = 137, 6, 12
NOTHING = BackboneSize(0, 0, 0, 0, 0, 0)
GRIDS = [(1, 0), (3, 0), (4, 2), (4, 1)]


def config(**settings):
    return Config(data="d", out="o", feature_dim=D, global_batch=G, **settings)


def planned(cfg, num_ranks, network=NOTHING, num_classes=C, **options):
    return MemoryPlan.of(Workload.of(cfg, num_classes, num_ranks), network, **options)


@pytest.mark.parametrize("num_ranks, width", GRIDS)
@pytest.mark.parametrize("settings", [
    {}, {"head_momentum": 0.9}, {"row_dtype": "bfloat16", "head_momentum": 0.9},
    {"head": "sampled", "active_classes": 0.4}, {"head": "knn", "active_classes": 0.5, "neighbors": 7},
    {"head": "knn", "active_classes": 0.5, "neighbors": 7, "row_dtype": "bfloat16", "head_momentum": 0.5},
])
def test_tables_are_as_planned(num_ranks, width, settings):
    """On rank 0, which no rank exceeds; the edges of a graph are those of all ranks."""
    cfg = config(model_parallel_size=width, **settings)
    plan = planned(cfg, num_ranks)

    def body(world):
        head = heads.build(cfg, C, world)
        optimizer = RowSGD(head, cfg.head_momentum)
        head.refresh(0, due=True)
        mine = Shard.of(G, world.size, world.rank)
        generator = torch.Generator().manual_seed(1)
        features, labels = torch.randn(G, D, generator=generator), torch.randint(C, (G,), generator=generator)
        features, labels = features[mine.first : mine.last].requires_grad_(), labels[mine.first : mine.last]
        head.select(labels, 0)
        head(features, labels, G)
        head.reduce()
        kept = sum(m.nbytes for name, m in head._workspace.items() if name in ("rows", "logits"))
        grads = head._workspace["row_grad"].nbytes
        graph = 0
        if cfg.head == "knn":
            graph = sum(table.nbytes for name, table in head.graph.tables().items() if name != "shape")
        return head.weight.nbytes, optimizer.momentum_rows.nbytes, graph, kept, grads

    found = run_ranks(num_ranks, body, width)
    rows, momentum, graphs, kept, grads = zip(*found, strict=True)
    assert plan.parts["class rows"] == rows[0] == max(rows)
    assert plan.parts.get("row momentum", 0) == momentum[0] == max(momentum)
    assert 0 < max(kept) <= plan.parts["logits and active rows"]
    if cfg.head == "full":
        assert plan.parts["row gradients"] == grads[0] == max(grads)
    if cfg.head == "knn":
        shards = width or num_ranks
        most = shards * plan.parts["graph"]
        assert 0 <= most - sum(graphs[:shards]) <= shards * 16


def test_a_partial_step_has_the_gradients_planned():
    cfg = config(head="sampled", active_classes=40.0)
    head = heads.build(cfg, C, World())
    head.select(torch.arange(G), 0)
    head(torch.randn(G, D).requires_grad_(), torch.arange(G), G)
    assert head.row_grad.nbytes == planned(cfg, 1).parts["row gradients"] == 40 * D * 4


def test_a_choice_by_scores_has_the_memory_planned(monkeypatch):
    """Scores by part, and the sums of row gradients of micro-batches that choose for themselves."""
    cfg = config(head="knn", active_classes=0.5, neighbors=7, near_parts=4, micro_batches=3)
    head, scores = heads.build(cfg, C, World()), []
    head.refresh(0, due=True)
    monkeypatch.setattr(head, "_scores", lambda *given: scores.append(type(head)._scores(head, *given)) or scores[-1])
    head.select(torch.arange(G), 0, micro_batches=3)
    for i in range(3):
        head.use_selection(i)
        head(torch.randn(G // 3, D).requires_grad_(), torch.arange(G)[i::3], G)
    head.reduce()
    plan, sums = planned(cfg, 1), head._workspace["sum"].nbytes + head.row_grad.nbytes
    assert head._workspace["row_grad"].nbytes + sums <= plan.parts["row gradients"]
    assert len(scores) == 3 and max(found.nbytes for *_, found in scores) <= plan.parts["candidates"]


@pytest.mark.parametrize("head", ["full", "knn", "sampled", "selective"])
def test_laws(head):
    cfg = config(head=head, active_classes=0.5)
    one, many = planned(cfg, 1), planned(cfg, 4)
    building = one.parts.get("building graph or index", 0)
    beside_steps = one.parts["checkpoint rows"] + one.parts["evaluation"]
    assert one.total == sum(one.parts.values()) - min(building, beside_steps) and min(one.parts.values()) > 0
    assert (building > 0) == (head in ("knn", "selective"))
    assert many.total < one.total
    assert abs(4 * many.parts["class rows"] - one.parts["class rows"]) <= 4 * D * 4
    with_momentum = planned(config(head=head, active_classes=0.5, head_momentum=0.9), 1)
    extra = sum(with_momentum.parts.values()) - sum(one.parts.values())  # in memory, and in the copy that is written
    assert extra == 2 * one.parts["class rows"] == 2 * (with_momentum.on_disk - one.on_disk)
    large = planned(config(head=head, active_classes=0.5), 1, num_classes=50_000_000)  # 1.2 GB of rows
    assert large.parts["checkpoint rows"] < large.on_disk - large.parts["class rows"] + 2**28 + 60_000_000
    half = planned(config(head=head, active_classes=0.5, row_dtype="bfloat16"), 1)
    assert 2 * half.parts["class rows"] == one.parts["class rows"]
    with pytest.raises(UserError, match="--head 'knnn'"):
        planned(config(head="knnn"), 1)


@pytest.mark.parametrize("name, shape", [("mlp", (9,)), ("small", (1, 32, 32)), ("resnet18", (3, 16, 16))])
def test_a_network_is_as_it_is_built(name, shape):
    network = BackboneSize.of(config(backbone=name), shape)
    built = backbones.build(name, shape, D, 0, World())
    assert network.parameters == sum(p.nbytes for p in built.parameters()) >= network.matrices > 0
    assert network.buffers == sum(b.nbytes for b in built.buffers())
    assert network.example == torch.zeros(shape).nbytes
    assert network.activations >= torch.zeros(shape).nbytes * (name != "mlp")
    plan = planned(config(), 3, network)  # 4 examples a rank
    assert plan.parts["activations"] == 6 * network.activations  # of a backward pass half as much again
    split = planned(config(micro_batches=4), 3, network)  # three of the parts are under way
    assert split.parts["activations"] == 7 * network.activations // 2


@pytest.mark.parametrize("ranks, width, settings", [
    (1, 0, {}), (3, 0, {"head_momentum": 0.9}), (2, 0, {"head": "knn"}), (3, 0, {"head": "selective"}),
    (2, 0, {"exchange": "dgc", "optimizer": "sgd", "lr": 0.1}), (3, 0, {"exchange": "powersgd"}),
    (2, 1, {"row_dtype": "bfloat16"})])
def test_a_checkpoint_is_as_large_as_planned(ranks, width, settings, tmp_path):
    cfg = Config(data="d", out="o", active_classes=900.0, model_parallel_size=width, **settings)
    net = backbones.build("mlp", (16,), cfg.feature_dim, 0, World())

    def body(world):
        backbone, head = copy.deepcopy(net), heads.build(cfg, 3000, world)
        exchange = exchanges.build(backbone, world, cfg)
        state = checkpoint.State(backbone, backbone_optimizer(backbone, cfg, exchange.keeps_momentum), head,
                                 RowSGD(head, cfg.head_momentum), exchange, NoiseScale(), LossMeter())
        for p in backbone.parameters():
            p.grad = torch.ones_like(p) if p.grad is None else p.grad
        state.backbone_optimizer.step()
        head.refresh(1, due=True)
        saver = CheckpointWriter(tmp_path, world, {"seed": 0}, keep=1)
        saver.save(state, Progress(1, 128, 128))
        saver.finish(last=True)

    run_ranks(ranks, body, width)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in folder.iterdir())
    plan = planned(cfg, ranks, BackboneSize.of(cfg, (16,)), num_classes=3000)
    assert 0.99 * plan.on_disk < size < plan.on_disk + 20_000


def test_what_is_frozen_has_neither_gradient_nor_moments():
    """AdamW has two moments of what is trained. Frozen layers also keep nothing for a backward pass."""
    shape, settings = (3, 16, 16), {"backbone": "resnet18", "optimizer": "adamw"}
    sizes = {stages: BackboneSize.of(config(freeze=stages, **settings), shape) for stages in (0, 3)}
    trained = sum(p.nbytes for p in backbones.build("resnet18", shape, D, 0, World(), freeze=3).parameters()
                  if p.requires_grad)
    plan = planned(config(freeze=3, **settings), 2, sizes[3])
    assert plan.parts["backbone gradients"] == trained < plan.parts["backbone"]
    assert plan.parts["backbone momentum"] == 2 * trained
    assert sizes[3].activations < sizes[0].activations and sizes[3].parameters == sizes[0].parameters
