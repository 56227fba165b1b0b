"""Of what DGC is given, nothing is lost."""

import copy

import pytest
import torch
from torch import nn

from tests.support.gradients import NET, give, now
from tests.support.worlds import run_ranks, write_files
from xc.comm.traffic import sent_all_gather, sent_all_reduce
from xc.config import Config
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.gradients.exchanges import build
from xc.gradients.topk import message_bytes

# (ranks, ranks of a host or 0 for one level)
WORLDS = [(1, 0), (3, 0), (2, 1), (2, 2), (4, 2), (10, 5)]  # 10: parts differ in size


def matrices(net):
    return {name: p for name, p in net.named_parameters() if p.dim() > 1}


def dgc(net, world, two_level, **settings):
    return Dgc(net, world, two_level=bool(two_level), **settings)


@pytest.mark.parametrize("size, per_host", WORLDS)
@pytest.mark.parametrize("bits, density", [(32, 0.01), (16, 0.01), (32, 0.25), (16, 0.3), (32, 0.5)])
def test_nothing_is_lost(size, per_host, bits, density):
    """Without momentum: all gradients of all ranks = all that was delivered + all residuals. The same bits on all."""
    def body(world):
        net = copy.deepcopy(NET)
        exchange = dgc(net, world, per_host, bits=bits, momentum=0.0)
        given, delivered = None, None
        for step in range(3):
            plain = copy.deepcopy(NET)
            give(plain, None, 7 * step + world.rank)
            give(net, exchange, 7 * step + world.rank, density=density)
            exchange.reduce()
            given = add(given, [plain.get_parameter(n).grad for n in matrices(net)])
            delivered = add(delivered, [p.grad for p in matrices(net).values()])
            exchange.zero_grad()
        flat = [(b.first + b.part.first, b.unsent["v"]) for b in exchange.sparse_buckets]
        return given, delivered, flat, order(exchange, net)

    results = run_ranks(size, body, ranks_per_host=per_host)
    names = results[0][3]
    position = {name: i for i, name in enumerate(matrices(NET))}
    given = sum(torch.cat([r[0][position[n]].flatten() for n in names]).double() for r in results)
    delivered = torch.cat([results[0][1][position[n]].flatten() for n in names]).double()
    for first, rows in (piece for r in results for piece in r[2]):
        delivered[first : first + len(rows)] += rows.double()
    torch.testing.assert_close(delivered, given, rtol=1e-4, atol=1e-4)
    for other in results:  # bit for bit
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], other[1], strict=True))


def add(total, tensors):
    return [t.clone() for t in tensors] if total is None else [a + t for a, t in zip(total, tensors, strict=True)]


def order(exchange, net):
    """Names of the matrices as they lie in the sparse buckets, one behind the other."""
    by_memory = {p.grad.data_ptr(): name for name, p in matrices(net).items()}
    names = []
    for bucket in exchange.sparse_buckets:
        start = bucket.flat.data_ptr()
        names += [by_memory[at] for at in sorted(by_memory) if start <= at < start + bucket.flat.nbytes]
    return names


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


def test_one_step_by_hand():
    """The formulas of the class, on four numbers of two ranks that have the same: two are sent, and masked."""
    def body(world):
        net = nn.Linear(40, 1, bias=False)
        exchange = Dgc(net, world, momentum=0.5)
        sent = []
        for grad in ([4.0, -3.0, 1.0, 0.5], [0.0, 0.0, 1.0, 0.5]):
            exchange.before_last_backward(now(0.05))
            (net.weight * torch.tensor([grad + 36 * [0.0]])).sum().backward()
            exchange.reduce()
            sent.append(net.weight.grad.tolist()[0][:4])
            exchange.zero_grad()
        return sent

    # Then u = (0, 0, 1.5, 0.75), v = (0, 0, 2.5, 1.25): without masking the first two would still be 2 and -1.5.
    assert run_ranks(2, body) == [[[8, -6, 0, 0], [0, 0, 5, 2.5]]] * 2


def test_it_sends_what_the_formula_says():
    """Dense where the places would cost more, which is above about 1/W."""
    sent = []

    def body(world):
        exchange = Dgc(copy.deepcopy(NET), world)
        for bucket in exchange.sparse_buckets:
            for density in 0.001, 0.2, 0.3, 0.6:
                bucket.density = density
                n, k = len(bucket.flat), bucket._num_sent(bucket.part)
                dense = sent_all_reduce(4, 4 * n)
                sent.append(dense if k is None else sent_all_gather(4, message_bytes(k, 32)))
                assert sent[-1] <= dense and (k is None) == (density > 0.25)

    run_ranks(4, body)


@pytest.mark.parametrize("before, after", [
    ((3, 0), (3, 0)), ((4, 0), (3, 0)), ((2, 0), (5, 0)), ((4, 2), (3, 0)), ((4, 2), (4, 2)), ((6, 3), (4, 2))])
def test_residuals_are_summed_on_another_number_of_ranks(before, after, tmp_path):
    def total(exchanges, name):
        whole = torch.zeros(exchanges[0].sparse_buckets[-1].last, dtype=torch.float64)
        for bucket in (b for exchange in exchanges for b in exchange.sparse_buckets):
            start = bucket.first + bucket.part.first
            whole[start : start + len(bucket.part)] += bucket.unsent[name].double()
        return whole

    def write(world):
        net = copy.deepcopy(NET)
        exchange = dgc(net, world, before[1])
        for step in range(2):
            give(net, exchange, step + world.rank, density=0.1)
            exchange.reduce()
            exchange.zero_grad()
        write_files(exchange, tmp_path)
        return exchange

    def read(world):
        exchange = dgc(copy.deepcopy(NET), world, after[1])
        exchange.load(tmp_path)
        return exchange

    written = run_ranks(before[0], write, ranks_per_host=before[1])
    found = run_ranks(after[0], read, ranks_per_host=after[1])
    for name in "uv":
        assert total(written, name).abs().sum() > 0
        torch.testing.assert_close(total(found, name), total(written, name), rtol=1e-5, atol=1e-6)
    if before == after:  # bit for bit, the signs of zeros too
        for a, b in zip(written, found, strict=True):
            for x, y in zip(a.sparse_buckets, b.sparse_buckets, strict=True):
                assert all(torch.equal(x.unsent[n].view(torch.int32), y.unsent[n].view(torch.int32)) for n in "uv")


@pytest.mark.parametrize("size, per_host, warned", [(1, 0, "on one rank"), (2, 2, "on one host"), (2, 1, "")])
def test_nothing_sparse_inside_one_host(size, per_host, warned, capsys):
    cfg = Config(data="x", out="y", optimizer="sgd", lr=0.1, exchange="dgc-hier" if per_host else "dgc")

    def body(world):
        exchange = build(copy.deepcopy(NET), world, cfg)
        give(exchange._backbone, exchange, world.rank, density=0.01)
        exchange.reduce()
        return sum(bucket.unsent["v"].abs().sum().item() for bucket in exchange.sparse_buckets)

    residuals = run_ranks(size, body, ranks_per_host=per_host)
    assert capsys.readouterr().err.count(warned or "warning") == bool(warned)
    assert all((residual == 0) == bool(warned) for residual in residuals)
