"""LossMeter are scaled and gradients scaled back; a step that overflows on one rank is skipped on all."""

import copy

import pytest
import torch

from tests.support.gradients import NET, give
from tests.support.worlds import run_ranks
from xc.comm.world import World
from xc.config import Config
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.model import backbone as backbones
from xc.optim.loss_scale import _GROW_AFTER, _LARGEST, LossScale


def test_it_halves_at_an_overflow_and_doubles_after_long_without():
    scale = LossScale.of(Config(data="d", out="o", amp="fp16"))
    assert scale.active and scale.scale == 2.0**16
    scale.update(False)
    assert scale.scale == 2.0**15
    for _ in range(_GROW_AFTER):
        assert scale.scale == 2.0**15
        scale.update(True)
    assert scale.scale == 2.0**16
    for _ in range(60):
        scale.update(False)
    assert scale.scale == 1.0
    scale.scale, scale.good_steps = _LARGEST, _GROW_AFTER - 1
    scale.update(True)
    assert scale.scale == _LARGEST


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_nothing_else_is_scaled(amp):
    scale = LossScale.of(Config(data="d", out="o", amp=amp))
    for _ in range(_GROW_AFTER + 1):
        scale.update(True)
    assert not scale.active and scale.scale == 1.0


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("exchange_of", [AllReduce, Dgc])
def test_all_ranks_skip_what_overflows_on_one(size, exchange_of):
    """The last rank's second step overflows: nobody uses it, no residual has it; the third is as if it never was."""
    def body(world, spoiled):
        net = copy.deepcopy(NET)
        exchange = exchange_of(net, world, loss_scale=LossScale(True, 1024.0))
        found = []
        for seed in (1, 2, 3) if spoiled else (1, 3):
            scale = 1024.0 * (torch.inf if seed == 2 and world.rank == size - 1 else 1.0)
            give(net, exchange, seed + 10 * world.rank, scale**0.5, density=0.1)
            finite = exchange.reduce()
            assert finite == (seed != 2)
            if finite:
                found.append([p.grad.clone() for p in net.parameters()])
            exchange.zero_grad()
        return found

    for with_it, without in zip(run_ranks(size, lambda w: body(w, True)), run_ranks(size, lambda w: body(w, False)),
                                strict=True):
        assert all(torch.equal(a, b) for x, y in zip(with_it, without, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("exchange_of", [AllReduce, Dgc])
def test_scaled_gradients_are_those_unscaled(exchange_of):
    def body(world, scale):
        net = copy.deepcopy(NET)
        exchange = exchange_of(net, world, loss_scale=LossScale(scale > 1, scale))
        give(net, exchange, world.rank, scale**0.5, density=0.1)
        exchange.reduce()
        return [p.grad.clone() for p in net.parameters()]

    for scaled, plain in zip(run_ranks(3, lambda w: body(w, 4096.0)), run_ranks(3, lambda w: body(w, 1.0)),
                             strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amp, error", [("bf16", 0.05), ("fp16", 0.01)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here"))])
def test_the_backbone_in_16_bits(device, amp, error):
    images = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    nets = [backbones.build("small", (1, 16, 16), 8, 1, World(device), a) for a in ("off", amp)]
    exact, short = (net(images) for net in nets)
    assert short.dtype == torch.float32 and not torch.equal(exact, short)
    assert (exact - short).norm() <= error * exact.norm()
    short.square().sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in nets[1].parameters())
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()  # a run may change its mind
