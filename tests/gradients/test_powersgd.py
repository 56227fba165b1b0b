"""PowerSGD: what it delivers."""

import pytest
import torch
from torch import nn

from tests.support.gradients import now
from tests.support.worlds import run_ranks
from xc.comm.world import World
from xc.gradients.powersgd import PowerSgd


def steps(world, gradients, rank, num_steps=1):
    """Gradients (n, m) of this rank in every step; returns what is delivered in each."""
    net = nn.Linear(gradients.shape[1], gradients.shape[0])
    exchange, delivered = PowerSgd(net, world, rank=rank), []
    for _ in range(num_steps):
        exchange.before_last_backward(now())
        (net.weight * gradients).sum().backward()
        exchange.reduce()
        delivered.append(net.weight.grad.clone())
        exchange.zero_grad()
    return delivered


def of_rank(rank, n=23, m=40, order=2):
    """A matrix of this order, whose sum over ranks is of it, too."""
    columns = torch.randn(n, order, generator=torch.Generator().manual_seed(1))
    return columns @ torch.randn(order, m, generator=torch.Generator().manual_seed(2 + rank))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_a_sum_of_low_rank_arrives_as_it_is(size):
    total = sum(of_rank(r) for r in range(size))
    for (delivered,) in run_ranks(size, lambda world: steps(world, of_rank(world.rank), 2)):
        torch.testing.assert_close(delivered, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [1, 3])
def test_repeated_gradients_arrive_more_and_more_wholly(size):
    """By error feedback the mean of what is delivered comes to the gradient, also in directions that are weak."""
    total = sum(of_rank(r, order=9) for r in range(size))
    (delivered, *_) = run_ranks(size, lambda world: steps(world, of_rank(world.rank, order=9), 2, 60))
    errors = [(sum(delivered[:n]) / n - total).norm() / total.norm() for n in (1, 6, 60)]
    assert errors[0] > 0.3 and errors[1] < 0.7 * errors[0] and errors[2] < 0.1


@pytest.mark.parametrize("gradient", [torch.zeros(23, 40), torch.zeros(23, 40).index_fill(1, torch.tensor([3]), 1e-20)])
def test_gradients_that_vanish_do_no_harm(gradient):
    (delivered,) = steps(World(), gradient, 2)
    torch.testing.assert_close(delivered, gradient, rtol=1e-3, atol=0)
