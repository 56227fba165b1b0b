"""A state of training with every kind of tensor: saved, and compared after it was read in worlds of any size."""

import copy

import torch

from tests.support.worlds import run_ranks
from xc.checkpoint import state as checkpoint
from xc.checkpoint import writer as savers
from xc.comm.world import World
from xc.gradients.allreduce import AllReduce
from xc.model import backbone as backbones
from xc.model.head_table import HEADS
from xc.optim.noise_scale import NoiseScale
from xc.optim.optimizers import RowSGD
from xc.optim.schedule import Progress
from xc.run.loss_meter import LossMeter

C, D = 10, 4
HEAD_SETTINGS = {"full": {}, "knn": {"active_classes": 6, "num_neighbors": 3},
                 "selective": {"active_classes": 6}}
# outside of the threads, which share torch's random generator
NETS = {seed: backbones.build("small", (1, 16, 16), D, seed, World()) for seed in (1, 2)}
IDENTITY = {"seed": 5, "classes_digest": "abc"}


def state_of(world, seed, num_classes=C, head="full"):
    net = copy.deepcopy(NETS[seed])
    head = HEADS[head](num_classes, D, world, seed=seed, **HEAD_SETTINGS[head])
    state = checkpoint.State(net, torch.optim.SGD(net.parameters(), 0.1, 0.9), head, RowSGD(head, 0.9),
                             AllReduce(net, world), NoiseScale(), LossMeter())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    state.backbone_optimizer.step()
    state.head_optimizer.momentum_rows.copy_(head.weight * 2)
    return state


def position(step):
    return Progress(step, 7 * step, 7)


def save(world, run, step=3, keep_checkpoints=2, top1=None, num_classes=C, head="full", seed=1):
    saver = savers.CheckpointWriter(run, world, IDENTITY, keep_checkpoints)
    state = state_of(world, seed, num_classes, head)
    state.head.refresh(0, due=True)
    saver.save(state, position(step), top1)
    saver.finish(last=True)


def everything(state):
    """{name: tensor} of this rank."""
    return {"weight": state.head.weight, "momentum": state.head_optimizer.momentum_rows,
            **{f"net.{k}": v for k, v in state.backbone.state_dict().items()},
            **{f"sgd.{i}": s["momentum_buffer"] for i, s in enumerate(state.backbone_optimizer.state.values())}}


def graph_of(head):
    """Edges (class, place, neighbour) of the graph of all shards, and K."""
    if not hasattr(head, "graph"):
        return None
    classes, neighbors, places = head.graph.lookup(torch.arange(head.num_classes))
    edges = torch.stack([classes, places, neighbors + head.shard.first], 1).tolist()
    edges = sorted(edge for of_rank in head.world.shards.all_gather_object(edges) for edge in of_rank)
    return edges, head.graph.num_neighbors


def assert_holds_what_was_saved(folder, readers, width, head="full", num_classes=C):
    """In a world of so many ranks, every rank reads what a run of that world would have had."""
    def read(world):
        state, original = state_of(world, 2, num_classes, head), state_of(world, 1, num_classes, head)
        original.head.refresh(0, due=True)
        assert not torch.equal(state.head.weight, original.head.weight) or not len(state.head.weight)
        assert checkpoint.load(folder, state, IDENTITY) == position(3)
        found, expected = everything(state), everything(original)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert graph_of(state.head) == graph_of(original.head)
        files, expected = state.head.files(), original.head.files()
        assert files.keys() == expected.keys()
        for name, tables in expected.items():
            assert files[name].keys() == tables.keys()
            assert all(torch.equal(files[name][key], tables[key]) for key in tables)

    run_ranks(readers, read, width)
