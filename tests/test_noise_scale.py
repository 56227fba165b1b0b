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
def test_norms_are_those_of_the_first_micro_batch_and_of_all(size, num_parts, kind, scale):
    """Of gradients over all ranks, which with DGC are nowhere. So small a network fills a sketch without loss."""
    if G // num_parts < size:
        pytest.skip("every rank has an example")

    def body(world):
        net = copy.deepcopy(NET)
        exchange = kind(net, world, bucket_mb=100, loss_scale=LossScale(True, scale) if scale else None)
        exchange._buckets.sort(key=lambda bucket: len(bucket.flat))
        now, found = Now(0.1, G, num_parts, 0.5), []
        for exchange.watched in 0, None, 2:
            for i in range(num_parts):
                mine = Shard.of(G // num_parts, size, world.rank)
                if i == num_parts - 1:
                    exchange.begin(now)
                inputs = examples()[i * G // num_parts + mine.first : i * G // num_parts + mine.last]
                (loss_of(net, inputs) * (scale or 1)).backward()
                if i == 0 and num_parts > 1:
                    exchange.first_passed()
            assert exchange.reduce()
            found.append(exchange.norms(now))
            exchange.zero_grad()
        return found

    expected = [gradient(examples()[: G // num_parts]), num_parts / G, gradient(examples()), 1 / G]
    for first, none, second in run_ranks(size, body):
        assert none is None
        for one in first, second:
            if num_parts == 1:
                assert one is None
            elif kind is AllReduce:  # in one bucket: nothing falls on the same place
                assert one == pytest.approx([e if isinstance(e, float) else e.square().sum().item() for e in expected],
                                            rel=1e-4)
            else:
                assert one[1::2] == pytest.approx(expected[1::2])


def test_a_sketch_has_the_norm_of_the_whole():
    """Many rows of it, several buckets, three ranks: 1 % off, and right on average."""
    def body(world):
        net = nn.ModuleList([nn.Linear(300, 700), nn.Linear(300, 500, bias=False), nn.Linear(3, 2)])
        exchange = AllReduce(net, world, bucket_mb=0.3)
        ratios = []
        for exchange.watched in range(30):
            generator = torch.Generator().manual_seed(100 * world.rank + exchange.watched)
            for bucket in exchange._buckets:
                bucket.flat.copy_(torch.randn(len(bucket.flat), generator=generator))
            exchange.first_passed()
            exchange.begin(Now(0.1, 12, 2))
            exchange.reduce()
            first, _, whole, _ = exchange.norms(Now(0.1, 12, 2))
            exact = sum(bucket.flat.double().square().sum().item() for bucket in exchange._buckets)
            assert first == pytest.approx(4 * whole, rel=1e-5)
            ratios.append(whole / exact)
            exchange.zero_grad()
        return torch.tensor(ratios)

    for ratios in run_ranks(3, body):
        assert (ratios - 1).abs().max() < 0.04 and abs(ratios.mean().item() - 1) < 0.006


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
