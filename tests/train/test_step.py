"""Micro-batches change no number: neither loss nor weights, on any number of ranks."""

import copy

import pytest
import torch

from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.comm.world import World
from xc.gradients.allreduce import AllReduce
from xc.model import backbone as backbones
from xc.model.head_table import HEADS
from xc.model.knn import KnnHead
from xc.model.scored import ScoredKnnHead
from xc.optim.schedule import StepPlan
from xc.run.metrics import Timer
from xc.train import pipeline

C, D, G = 23, 8, 24
KINDS = HEADS | {"knn": KnnHead, "scored": ScoredKnnHead}
WITH_NORM = backbones.build("small", (1, 16, 16), D, 1, World())
SETTINGS = {"full": {}, "sampled": {"active_classes": 19}, "knn": {"active_classes": 19, "num_neighbors": 3}}


def examples():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(G, 1, 16, 16, generator=generator, dtype=torch.float64), \
        torch.randint(C, (G,), generator=generator)


def parts_of(world, num_parts):
    images, labels = examples()
    found = []
    for i in range(num_parts):
        mine = Shard.of(G // num_parts, world.size, world.rank)
        here = slice(i * G // num_parts + mine.first, i * G // num_parts + mine.last)
        found.append((images[here], labels[here]))
    return found


def step(world, net, head_name, num_parts, feature_bits=32):
    """(loss, backbone's gradients, class rows' gradient) of one step."""
    net = copy.deepcopy(net).double()
    for module in net.modules():
        if isinstance(module, backbones.FeatureNorm):  # its group is that of the world which it was built in
            module._group = world.all_ranks
    head = KINDS[head_name](C, D, world, dtype=torch.float64, seed=5, **SETTINGS[head_name])
    exchange = AllReduce(net, world)
    now = StepPlan(0.1, G, num_parts)
    batch = parts_of(world, num_parts)
    labels = torch.cat([part for _, part in batch])
    head.refresh(1, due=True)
    head.select(labels, 1)
    loss, features = pipeline.forward_backward(net, head, exchange, batch, labels, now, Timer(), feature_bits)
    exchange.reduce()
    head.reduce()
    assert features.shape == (len(batch[0][1]), D) and not features.requires_grad
    return loss, [p.grad.clone() for p in net.parameters()], head.row_grad


@pytest.mark.parametrize("size, width, num_parts", [(1, 1, 2), (3, 3, 3), (4, 2, 4), (5, 5, 2), (4, 1, 3)])
@pytest.mark.parametrize("head_name", SETTINGS)
def test_it_equals_the_unsplit_step(size, width, num_parts, head_name):
    def body(world):
        return [step(world, WITH_NORM[0], head_name, n) for n in (1, num_parts)]

    for whole, split in run_ranks(size, body, width):
        torch.testing.assert_close(split[0], whole[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(split[1:], whole[1:], rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("size, width, num_parts", [(1, 1, 4), (2, 2, 1), (3, 3, 2), (4, 2, 2)])
def test_with_batch_norm_it_equals_plain_gradient_accumulation(size, width, num_parts):
    def body(world):
        return step(world, WITH_NORM, "full", num_parts)

    def accumulated(world):
        net = copy.deepcopy(WITH_NORM).double()
        head = HEADS["full"](C, D, world, dtype=torch.float64, seed=5)
        head.select(examples()[1], 1)
        losses = []
        for i, (images, labels) in enumerate(parts_of(world, num_parts)):
            losses.append(head(net(images), labels, G, last=i == num_parts - 1))
            losses[-1].backward()
        return sum(losses).detach(), [p.grad for p in net.parameters()], head.row_grad

    expected = run_ranks(1, accumulated)[0]
    found = run_ranks(size, body, width)
    for loss, grads, _ in found:
        torch.testing.assert_close(loss, expected[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(grads, expected[1], rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(torch.cat([rows for _, _, rows in found[:width]]), expected[2], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("bits, of_loss, of_gradients", [(16, 1e-3, 0.02), (8, 0.01, 0.05)])
def test_features_may_travel_in_fewer_bits(size, bits, of_loss, of_gradients):
    def body(world):
        return [step(world, WITH_NORM[0], "full", 2, bits) for bits in (32, bits)]

    for exact, short in run_ranks(size, body):
        assert not torch.equal(short[0], exact[0])
        torch.testing.assert_close(short[0], exact[0], rtol=of_loss, atol=0)
        for a, b in zip(short[1], exact[1], strict=True):
            assert (a - b).norm() <= of_gradients * b.norm()


@pytest.mark.parametrize("size, width, rounds, of_round", [(1, 1, 2, 2), (3, 3, 3, 1), (4, 2, 2, 2), (2, 2, 4, 1)])
@pytest.mark.parametrize("head_name", [*SETTINGS, "selective", "scored"])
def test_a_step_of_several_rounds_is_the_sum_of_theirs(size, width, rounds, of_round, head_name):
    """Each round with the classes that a step of its own would take; losses, and gradients of backbone and rows."""
    def body(world):
        whole = step_of(world, head_name, 5, slice(0, rounds * of_round), rounds)
        parts = [step_of(world, head_name, 5 + i, slice(i * of_round, (i + 1) * of_round), 1) for i in range(rounds)]
        return whole, parts

    def step_of(world, head_name, first_round, micro_batches, num_rounds):
        net = copy.deepcopy(WITH_NORM[0]).double()
        settings = SETTINGS.get(head_name, {"active_classes": 19, "near_share": 0.5})
        if head_name == "scored":
            settings = settings | {"num_neighbors": 5, "near_parts": 2}
        head = KINDS[head_name](C, D, world, dtype=torch.float64, seed=5, **settings)
        exchange = AllReduce(net, world)
        batch = parts_of(world, rounds * of_round)[micro_batches]
        labels = torch.cat([part for _, part in batch])
        head.refresh(1, due=True)
        head.select(labels, first_round, num_rounds, len(batch))
        now = StepPlan(0.1, G * num_rounds // rounds, len(batch), accumulation_steps=num_rounds)
        loss, _ = pipeline.forward_backward(net, head, exchange, batch, labels, now, Timer())
        exchange.reduce()
        head.reduce()
        rows = torch.zeros_like(head.weight)
        rows[slice(None) if head.selection.active is None else head.selection.active] = head.row_grad
        assert head.num_active == len(head.row_grad)
        return loss, [p.grad.clone() for p in net.parameters()], rows, head.num_active

    for whole, parts in run_ranks(size, body, width):
        torch.testing.assert_close(whole[0], sum(p[0] for p in parts) / rounds, rtol=1e-10, atol=1e-12)
        mean = [sum(grads) / rounds for grads in zip(*(p[1] for p in parts), strict=True)]
        torch.testing.assert_close(whole[1], mean, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(whole[2], sum(p[2] for p in parts) / rounds, rtol=1e-8, atol=1e-11)
        if size == 1 and head_name in ("knn", "sampled", "selective"):
            assert whole[3] > max(p[3] for p in parts)  # the rounds have other classes
