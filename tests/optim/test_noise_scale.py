"""The noise scale of gradients whose noise is known, and the norms that it is taken from, on any number of ranks."""

import copy
import itertools

import pytest
import torch
from torch import nn

from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.optim.loss_scale import LossScale
from xc.optim.noise_scale import NoiseScale
from xc.optim.schedule import StepPlan

G = 12
NET = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))


def examples():
    return torch.randn(G, 5, generator=torch.Generator().manual_seed(2))


def loss_of(net, inputs):
    return net(inputs).square().sum() / G


def gradient(inputs):
    """Of the mean over these examples alone."""
    net = copy.deepcopy(NET)
    (loss_of(net, inputs) * G / len(inputs)).backward()
    return torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("kind", [AllReduce, Dgc])
@pytest.mark.parametrize("size, num_parts, scale", [(1, 2, None), (2, 1, None), (3, 3, 8.0), (4, 3, None), (5, 2, 8.0)])
def test_norms_are_those_of_the_first_micro_batch_and_of_all(kind, size, num_parts, scale):
    """Of gradients over all ranks, which with DGC are nowhere. A bucket so small fills its sketch without loss; with
    DGC there are two buckets, whose places fall on one another, now with one sign and now with the other."""
    looks = 100 if kind is Dgc and num_parts > 1 else 3

    def body(world):
        net = copy.deepcopy(NET)
        exchange = kind(net, world, bucket_mb=100, loss_scale=LossScale(True, scale) if scale else None)
        now, found = StepPlan(0.1, G, num_parts, 1.0), []
        for look in range(looks):
            exchange.noise_seed = None if look == 1 else look
            for i in range(num_parts):
                mine = Shard.of(G // num_parts, size, world.rank)
                if i == num_parts - 1:
                    exchange.before_last_backward(now)
                inputs = examples()[i * G // num_parts + mine.first : i * G // num_parts + mine.last]
                (loss_of(net, inputs) * (scale or 1)).backward()
                if i == 0 and num_parts > 1:
                    exchange.after_first_backward()
            assert exchange.reduce()
            found.append(exchange.norms(now))
            exchange.zero_grad()
        return found

    first, whole = (gradient(part).square().sum().item() for part in (examples()[: G // num_parts], examples()))
    for found in run_ranks(size, body):
        assert found.pop(1) is None
        if num_parts == 1:
            assert not any(found)
            continue
        assert all(one[1::2] == (num_parts / G, 1 / G) for one in found)
        mean = torch.tensor(found, dtype=torch.float64).mean(0)[::2].tolist()
        assert mean == pytest.approx([first, whole], rel=1e-4 if kind is AllReduce else 0.3)


def test_a_sketch_has_the_norm_of_the_whole():
    """Many rows of it, several buckets, three ranks: 1 % off, and right on average, also of buckets that are alike."""
    def body(world):
        net = nn.ModuleList([nn.Linear(300, 700), nn.Linear(300, 500, bias=False), nn.Linear(3, 2)])
        exchange = AllReduce(net, world, bucket_mb=0.3)
        ratios = []
        for exchange.noise_seed in range(30):
            generator = torch.Generator().manual_seed(100 * world.rank + exchange.noise_seed)
            numbers = torch.randn(10**6, generator=generator)
            for bucket in exchange._buckets:
                bucket.flat.copy_(numbers[: len(bucket.flat)])
            exchange.after_first_backward()
            exchange.before_last_backward(StepPlan(0.1, 12, 2))
            exchange.reduce()
            first, _, whole, _ = exchange.norms(StepPlan(0.1, 12, 2))
            exact = sum(bucket.flat.double().square().sum().item() for bucket in exchange._buckets)
            assert first == pytest.approx(4 * whole, rel=1e-5)
            ratios.append(whole / exact)
            exchange.zero_grad()
        return torch.tensor(ratios)

    for ratios in run_ranks(3, body):
        assert (ratios - 1).abs().max() < 0.04 and abs(ratios.mean().item() - 1) < 0.006


def looks_at(generator, mean, deviation, small, large):
    """Arguments of a look at gradients of that mean, and of noise of that deviation in every number."""
    of_each = mean + torch.randn(large, len(mean), generator=generator, dtype=torch.float64) * deviation
    of_small, of_large = of_each[:small].mean(0), of_each.mean(0)
    return of_small.square().sum().item(), 1 / small, of_large.square().sum().item(), 1 / large


def a_mean(generator, square):
    mean = torch.randn(50, generator=generator, dtype=torch.float64)
    return mean * (square / mean.square().sum()).sqrt()


@pytest.mark.parametrize("small, large", [(1, 2), (4, 32), (30, 33)])
def test_it_finds_the_noise_that_was_put_in(small, large):
    """Gradients of 50 numbers, |mean|² = 2, noise of tr = 300: a scale of 150 examples."""
    generator = torch.Generator().manual_seed(0)
    mean, noise, kept = a_mean(generator, 2.0), NoiseScale(), []
    for _ in range(4000):
        noise.measure(*looks_at(generator, mean, (300 / 50) ** 0.5, small, large))
        kept.append((noise.noise, noise.signal))
    tr, square = torch.tensor(kept[500:]).mean(0).tolist()
    assert tr == pytest.approx(300, rel=0.05) and square == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize("seed", range(4))
def test_a_scale_is_known_only_where_the_signal_stands_out(seed):
    generator = torch.Generator().manual_seed(seed)
    known = {}
    for square in 0.0, 100.0:  # against noise of 300 / 32 in the larger batch
        noise, mean, found = NoiseScale(), a_mean(generator, 1.0) * square**0.5, []
        for _ in range(300):
            noise.measure(*looks_at(generator, mean, (300 / 50) ** 0.5, 4, 32))
            found.append(noise.examples is not None)
        known[square] = sum(found) / len(found)
    assert known[100.0] > 0.9 and known[0.0] < 0.3


@pytest.mark.parametrize("seed", range(3))
def test_growth_follows_the_noise_scale_without_leaps(seed):
    """A noise scale of 15, five times that when the gradient has shrunk to a fifth of its square, over 600 looks: a
    batch of 15 grows about fivefold, and not before it may; where the gradient stays as it is, hardly at all."""
    for last, low, high in (0.2, 3.0, 8.0), (1.0, 1.0, 1.7):
        generator = torch.Generator().manual_seed(seed)
        mean, noise, grown = a_mean(generator, 20.0), NoiseScale(), []
        for i in range(1000):
            factor = last ** (min(max(0, i - 200), 600) / 600)
            found = looks_at(generator, mean * factor**0.5, (300 / 50) ** 0.5, 8, 64)
            noise.measure(*found, grows_from=15 if i >= 200 else 0)
            grown.append(noise.grown)
        assert set(grown[:200]) == {1.0} and grown == sorted(grown)
        assert all(b / a <= 1.1 + 1e-9 for a, b in itertools.pairwise(grown))
        assert low <= grown[-1] <= high, grown[-1]


def test_the_first_looks_count_alike():
    noise = NoiseScale()
    assert noise.examples is None
    for value in 1.0, 2.0, 6.0:
        noise.measure(value, 1.0, 0.0, 0.5)
    assert noise.noise == pytest.approx(2 * 3.0)
