"""The dense exchange equals the plain sum over ranks."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from tests.support.gradients import NET, give, now
from tests.support.worlds import run_ranks
from xc.comm.world import World
from xc.config import Config
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.gradients.exchanges import build


def gradients(world, exchange_of, passes=1):
    net = copy.deepcopy(NET)
    exchange = exchange_of and exchange_of(net, world)
    totals = []
    for step in range(2):  # the second step must not see the first one's sums
        give(net, exchange, world.rank, step + 1, passes=passes)
        if exchange:
            exchange.reduce()
        totals.append({name: p.grad.clone() for name, p in net.named_parameters()})
        exchange.zero_grad() if exchange else net.zero_grad()
    return totals


@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("bucket_mb, passes, bits", [(1e-6, 1, 32), (0.05, 2, 32), (100, 3, 32), (0.05, 1, 16)])
def test_dense_sums_over_ranks(world_size, bucket_mb, passes, bits):
    local = run_ranks(world_size, lambda w: gradients(w, None, passes))
    found = run_ranks(world_size, lambda w: gradients(w, lambda net, w: AllReduce(net, w, bucket_mb, bits), passes))
    for rank in found:
        for step in range(2):
            for name, grad in rank[step].items():
                error = (grad - sum(r[step][name] for r in local)).abs()
                # of float16: half a last place of every number and of every partial sum
                most = 1e-5 if bits == 32 else 2**-11 * (1 + world_size)
                assert (error <= most * sum(r[step][name].abs() for r in local) + 1e-6).all()


@pytest.mark.parametrize("exchange_of", [AllReduce, Dgc])
def test_a_parameter_outside_the_loss_does_not_block(exchange_of):
    def body(world):
        net = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
        exchange = exchange_of(net, world)
        exchange.before_last_backward(now())
        if world.rank == 0:  # the others have no example at all
            net["used"](torch.ones(1, 2)).sum().backward()
        exchange.reduce()
        return net["used"].weight.grad.sum().item(), net["unused"].weight.grad.sum().item()

    assert run_ranks(3, body) == [(4.0, 0.0)] * 3


def test_buffers_are_averaged():
    def body(world):
        net = nn.BatchNorm1d(1)
        net.running_mean.fill_(world.rank)
        exchange = AllReduce(net, world)
        exchange.before_last_backward(None)  # a step, in which every rank takes its own
        means = exchange.mean_buffers()
        assert net.running_mean.item() == world.rank and means["running_mean"].item() == 1
        exchange.average_buffers()
        assert not exchange.mean_buffers() and not exchange.files()  # now they are the same
        return net.running_mean.item()

    assert run_ranks(3, body) == [1.0] * 3


def test_a_setting_without_effect_is_named(capsys):
    build(NET, World(), Config(data="x", out="y", density=0.5))
    assert "warning: --density has no effect with --exchange dense" in capsys.readouterr().err


def test_what_is_no_longer_used_is_freed():
    net = nn.Linear(3, 2)
    seen = [weakref.ref(net), weakref.ref(AllReduce(net, World()))]
    del net
    gc.collect()
    assert [one() for one in seen] == [None, None]


def test_what_is_frozen_is_not_exchanged_nor_averaged():
    """Three equal numbers and a third of their sum can differ by rounding."""
    def body(world):
        net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3))
        net[:2].requires_grad_(False)
        net[1].running_mean.copy_(torch.tensor([0.1, 0.7, 1e-3]) * (1 + world.rank))
        net[2].running_mean.fill_(float(world.rank))
        exchange = AllReduce(net, world)
        exchange.before_last_backward(None)
        assert list(exchange.mean_buffers()) == ["2.running_mean", "2.running_var"]
        assert set(*exchange.files().values()) == {"2.running_mean", "2.running_var"}
        assert sum(len(bucket.flat) for bucket in exchange._buckets) == 6
        exchange.average_buffers()
        assert torch.equal(net[1].running_mean, torch.tensor([0.1, 0.7, 1e-3]) * (1 + world.rank))
        assert net[2].running_mean.tolist() == [1.0] * 3
        return True

    assert all(run_ranks(3, body))
