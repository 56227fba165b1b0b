"""DGC: what it sends, and when."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.support.gradients import NET, give, matrices, now
from tests.support.worlds import run_ranks
from xc.comm.traffic import sent_all_reduce
from xc.config import Config
from xc.gradients import sparse_sum
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.gradients.exchanges import build
from xc.gradients.topk import row_bytes

# (ranks, ranks of a host or 0 for one level)
WORLDS = [(1, 0), (3, 0), (2, 1), (2, 2), (4, 2), (10, 5)]  # 10: parts differ in size


def dgc(net, world, two_level, **settings):
    return Dgc(net, world, two_level=bool(two_level), **settings)


@pytest.mark.parametrize("size, per_host", WORLDS)
def test_density_1_is_the_dense_exchange_with_momentum(size, per_host):
    def train(exchange_of, momentum):
        def body(world):
            net = copy.deepcopy(NET)
            exchange = exchange_of(net, world)
            matrix = {"params": list(matrices(net).values()), "momentum": momentum}
            vector = {"params": [p for p in net.parameters() if p.dim() <= 1]}
            sgd = torch.optim.SGD([matrix, vector], lr=1e-3, momentum=0.9)
            for step in range(4):
                give(net, exchange, 7 * step + world.rank, scale=0.1)
                exchange.reduce()
                sgd.step()
                exchange.zero_grad()
            return [p.detach() for p in net.parameters()]

        return run_ranks(size, body, ranks_per_host=per_host)

    dense = train(AllReduce, 0.9)[0]
    for rank in train(lambda net, world: dgc(net, world, per_host), 0.0):
        for a, b in zip(rank, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_step_by_hand(monkeypatch):
    """The formulas of the class, on four numbers of two ranks that have the same: two are sent, and masked.

    Rank 0 owns the first half, rank 1 the second, which has zeros only; each is sent two numbers by the other.
    """
    def body(world):
        net = nn.Linear(40, 1, bias=False)
        exchange = Dgc(net, world, momentum=0.5)
        sent = []
        for grad in ([4.0, -3.0, 1.0, 0.5], [0.0, 0.0, 1.0, 0.5]):
            exchange.before_last_backward(now(0.1))
            (net.weight * torch.tensor([grad + 36 * [0.0]])).sum().backward()
            exchange.reduce()
            sent.append(net.weight.grad.tolist()[0][:4])
            exchange.zero_grad()
        return sent, exchange.compressed[0].unsent["v"][:4].tolist()

    monkeypatch.setattr(sparse_sum, "KEPT", 1)
    results = run_ranks(2, body)
    # Rank 1 sends 4 and -3; rank 0, the owner, sends 8 and -6, and masks its own u there. In the second step rank 1 has
    # u = (0, 0, 1.5, 0.75), v = (0, 0, 2.5, 1.25): without masking, u had 2 and -1.5 and v as much at the first two.
    assert [sent for sent, _ in results] == [[[8, -6, 0, 0], [0, 0, 5, 2.5]]] * 2
    assert [kept for _, kept in results] == [[0, 0, 0, 0]] * 2


def test_what_the_owner_does_not_send_stays_with_it():
    """One number of each rank and step goes to an owner. What is not sent in the first step is sent in later ones."""
    def body(world):
        net = nn.Linear(400, 1, bias=False)
        exchange = Dgc(net, world, momentum=0.0)
        grads = torch.zeros(1, 400)
        grads[0, 3 * world.rank : 3 * world.rank + 3] = torch.tensor([1.0, 2.0, 3.0]) * (world.rank + 1)
        sums = torch.zeros_like(grads)
        for step in range(6):
            exchange.before_last_backward(now(0.01))
            (net.weight * (grads if step == 0 else 0 * grads)).sum().backward()
            exchange.reduce()
            sums += net.weight.grad
            exchange.zero_grad()
        return sums[0, :12].tolist(), exchange.compressed[0].unsent["v"].abs().sum().item()

    for sums, kept in run_ranks(4, body):
        assert sums == [1, 2, 3, 2, 4, 6, 3, 6, 9, 4, 8, 12] and kept == 0


@pytest.mark.parametrize("numbers, density", [(1, 0.01), (7, 0.3), (1000, 0.001), (65537, 0.001), (65537, 0.19)])
@pytest.mark.parametrize("size", [2, 3, 7, 256])
@pytest.mark.parametrize("bits", [32, 16])
def test_the_bytes_do_not_grow_with_the_ranks(numbers, density, size, bits):
    """Above those of the numbers to be sent, times one for the owner and KEPT for all ranks; and never above dense."""
    pieces = sparse_sum.cut([numbers] * 3, density, size, bits)
    k = math.ceil(density * numbers)
    most = 3 * row_bytes(bits) * (1 + sparse_sum.KEPT) * (k + k / size + 1)
    dense = 3 * sent_all_reduce(size, 4 * numbers)
    if None in pieces:
        assert pieces == [None] * 3 and (k == numbers or row_bytes(bits) * k * (1 + sparse_sum.KEPT) >= 0.9 * dense / 3)
        return
    total = 0
    for rank in range(size):
        to_owners, to_all = sparse_sum.rows_sent(pieces, rank, size)
        total += row_bytes(bits) * (to_owners + (size - 1) * to_all)
        assert to_owners <= 3 * (k + k / size + 1)
        owned = [piece for one in pieces if (piece := one.piece_of(rank, size)) is not None]
        assert len(owned) - sum(one.count for one in pieces) / size < 1  # no rank has more than its share, but for one
    assert total / size <= min(most, dense)


@pytest.mark.parametrize("sizes", [[10], [3, 500, 70_000], [200_000] * 5])
def test_rounds_have_every_sparse_bucket_once(sizes):
    pieces = sparse_sum.cut(sizes, 0.1, 4, 32)
    found = [i for together in sparse_sum.rounds(pieces, 32) for i in together]
    assert found == [i for i, one in enumerate(pieces) if one]


@pytest.mark.parametrize("size, per_host, warned", [(1, 0, "on one rank"), (2, 2, "on one host"), (2, 1, "")])
def test_nothing_sparse_inside_one_host(size, per_host, warned, capsys):
    cfg = Config(data="x", out="y", optimizer="sgd", lr=0.1, exchange="dgc-hier" if per_host else "dgc")

    def body(world):
        exchange = build(copy.deepcopy(NET), world, cfg)
        give(exchange._backbone, exchange, world.rank, density=0.01)
        exchange.reduce()
        return sum(bucket.unsent["v"].abs().sum().item() for bucket in exchange.compressed)

    residuals = run_ranks(size, body, ranks_per_host=per_host)
    assert capsys.readouterr().err.count(warned or "warning") == bool(warned)
    assert all((residual == 0) == bool(warned) for residual in residuals)
