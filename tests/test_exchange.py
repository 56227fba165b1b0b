"""The exchange equals the plain sum over ranks."""

import copy

import pytest
import torch
from torch import nn

from tests.worlds import run_ranks
from xc import backbone as backbones
from xc.exchange import AllReduce
from xc.world import World

# outside of the threads, which share torch's random generator; without its norm, which has sums of its own
NET = backbones.build("small", (1, 16, 16), 8, 1, World())[0]


def gradients(world, bucket_mb, exchange=True):
    net = copy.deepcopy(NET)
    reducer = AllReduce(net, world, bucket_mb) if exchange else None
    images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(world.rank))
    totals = []
    for step in range(2):  # the second step must not see the first one's sums
        (net(images) * (step + 1)).square().sum().backward()
        if exchange:
            reducer.reduce()
        totals.append({name: p.grad.clone() for name, p in net.named_parameters()})
        net.zero_grad() if reducer is None else reducer.zero_grad()
    return totals


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("bucket_mb", [1e-6, 0.05, 100])  # a bucket a tensor, a few, one
def test_sums_over_ranks(world_size, bucket_mb):
    local = run_ranks(world_size, lambda w: gradients(w, bucket_mb, exchange=False))
    for rank in run_ranks(world_size, lambda w: gradients(w, bucket_mb)):
        for step in range(2):
            for name, grad in rank[step].items():
                torch.testing.assert_close(grad, sum(r[step][name] for r in local), rtol=1e-5, atol=1e-6)


def test_a_parameter_outside_the_loss_does_not_block():
    def body(world):
        net = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
        exchange = AllReduce(net, world)
        if world.rank == 0:  # the others have no example at all
            net["used"](torch.ones(1, 2)).sum().backward()
        exchange.reduce()
        return net["used"].weight.grad.sum().item(), net["unused"].weight.grad.sum().item()

    assert run_ranks(3, body) == [(4.0, 0.0)] * 3


def test_buffers_are_averaged():
    def body(world):
        net = nn.BatchNorm1d(1)
        net.running_mean.fill_(world.rank)
        AllReduce(net, world).average_buffers()
        return net.running_mean.item()

    assert run_ranks(3, body) == [1.0] * 3
