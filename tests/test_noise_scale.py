"""The noise scale of gradients whose noise is known, and the norms that it is taken from, on any number of ranks."""

import copy

import pytest
import torch
from torch import nn

from tests.worlds import run_ranks
from xc.exchange import AllReduce, Dgc
from xc.loss_scale import LossScale
from xc.noise_scale import NoiseScale
from xc.schedule import Now
from xc.shard import Shard

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


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("num_parts", [1, 2, 3])
@pytest.mark.parametrize("kind", [AllReduce, Dgc])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_norms_are_those_of_batches_of_two_sizes(size, num_parts, kind, scale):
    if G // num_parts < size:
        pytest.skip("every rank has an example")

    def parts(rank):
        mine = Shard.of(G // num_parts, size, rank)
        return [examples()[i * G // num_parts + mine.first : i * G // num_parts + mine.last] for i in range(num_parts)]

    def body(world):
        net = copy.deepcopy(NET)
        exchange = kind(net, world, loss_scale=LossScale(True, scale) if scale else None)
        now, found = Now(0.1, G, num_parts, 0.5), []
        for exchange.watched in (True, False, True):
            for i, inputs in enumerate(parts(world.rank)):
                if i == num_parts - 1:
                    exchange.begin(now)
                (loss_of(net, inputs) * (scale or 1)).backward()
                if i == 0 and num_parts > 1:
                    exchange.first_passed()
            assert exchange.reduce()
            if exchange.watched:
                found.append(exchange.norms(now))
            exchange.zero_grad()
        return found

    def squares(batches):
        return [sum(gradient(b).square().sum().item() for b in batches) / size, sum(1 / len(b) for b in batches) / size]

    wholes = [torch.cat(parts(rank)) for rank in range(size)]
    small = squares(wholes if num_parts == 1 else [parts(rank)[0] for rank in range(size)])
    large = squares([examples()] * size if kind is AllReduce else wholes)
    known = num_parts > 1 if kind is Dgc or size == 1 else True
    for found in run_ranks(size, body):
        for one in found:
            assert one == pytest.approx([*small, *large], rel=1e-4) if known else one is None


@pytest.mark.parametrize("small, large", [(1, 2), (4, 32), (30, 33)])
def test_it_finds_the_noise_that_was_put_in(small, large):
    """Gradients of 50 numbers, |mean|² = 2, noise of tr = 300: a scale of 150 examples."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(50, generator=generator, dtype=torch.float64)
    mean *= (2 / mean.square().sum()).sqrt()
    noise = NoiseScale()
    kept = []
    for _ in range(4000):
        of_each = mean + torch.randn(large, 50, generator=generator, dtype=torch.float64) * (300 / 50) ** 0.5
        of_small, of_large = of_each[:small].mean(0), of_each.mean(0)
        noise.look(of_small.square().sum().item(), 1 / small, of_large.square().sum().item(), 1 / large)
        kept.append((noise.noise, noise.signal))
    tr, square = torch.tensor(kept[500:]).mean(0).tolist()
    assert tr == pytest.approx(300, rel=0.05) and square == pytest.approx(2, rel=0.25)


def test_the_first_looks_count_alike():
    noise = NoiseScale()
    assert noise.examples is None
    for value in 1.0, 2.0, 6.0:
        noise.look(value, 1.0, 0.0, 0.5)
    assert noise.noise == pytest.approx(2 * 3.0)


def test_growth_follows_the_noise_scale_and_never_falls():
    noise = NoiseScale()
    assert noise.growth() == 1.0  # nothing known
    for scale, grown in (100, 1.0), (250, 2.5), (50, 2.5), (1000, 10.0):
        noise.noise, noise.signal = float(scale), 1.0
        assert noise.growth() == pytest.approx(grown)
    noise.signal = -1.0  # an estimate that says nothing
    assert noise.examples is None and noise.growth() == pytest.approx(10.0)
