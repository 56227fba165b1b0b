"""The exchange: dense equals the plain sum over ranks; of what DGC is given, nothing is lost."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from tests.support.worlds import run_ranks, write_files
from xc.config import Config
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.gradients.exchanges import build
from xc.gradients.topk import message_bytes
from xc.model import backbone as backbones
from xc.optim.schedule import Now

# outside of the threads, which share torch's random generator; without its norm, which has sums of its own
NET = backbones.build("small", (1, 16, 16), 8, 1, World())[0]


def now(density=1.0):
    return Now(0.1, 2, 1, density)


def give(net, exchange, seed, scale=1.0, density=1.0, passes=1):
    """One step's gradients, of random images, summed over `passes` backward passes."""
    for i in range(passes):
        if exchange and i == passes - 1:
            exchange.begin(now(density))
        images = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(seed * 10 + i))
        (net(images) * scale).square().sum().backward()


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
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
        exchange.begin(now())
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
        exchange.begin(None)  # a step, in which every rank takes its own
        means = exchange.mean_buffers()
        assert net.running_mean.item() == world.rank and means["running_mean"].item() == 1
        exchange.average_buffers()
        assert not exchange.mean_buffers() and not exchange.files()  # now they are the same
        return net.running_mean.item()

    assert run_ranks(3, body) == [1.0] * 3


# --- DGC ---

# (ranks, ranks of a host or 0 for one level)
WORLDS = [(1, 0), (2, 0), (3, 0), (4, 0), (2, 1), (2, 2), (4, 2), (6, 3), (20, 5)]  # 20: parts differ in size


def matrices(net):
    return {name: p for name, p in net.named_parameters() if p.dim() > 1}


def dgc(net, world, two_level, **settings):
    return Dgc(net, world, two_level=bool(two_level), **settings)


@pytest.mark.parametrize("size, per_host", WORLDS)
@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("density", [0.01, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_nothing_is_lost(size, per_host, bits, density, clip):
    """Without momentum: all gradients of all ranks = all that was delivered + all residuals. The same bits on all."""
    def body(world):
        net = copy.deepcopy(NET)
        exchange = dgc(net, world, per_host, bits=bits, momentum=0.0, clip=clip)
        given, delivered = None, None
        for step in range(4):
            plain = copy.deepcopy(NET)
            give(plain, None, 7 * step + world.rank)
            give(net, exchange, 7 * step + world.rank, density=density)
            exchange.reduce()
            if clip:  # of every group of layers that is exchanged together
                for names in groups(exchange, net):
                    norm = torch.cat([plain.get_parameter(n).grad.flatten() for n in names]).norm()
                    for n in names:
                        plain.get_parameter(n).grad.mul_(min(1.0, clip / size**0.5 / norm))
            given = add(given, [plain.get_parameter(n).grad for n in matrices(net)])
            delivered = add(delivered, [p.grad for p in matrices(net).values()])
            exchange.zero_grad()
        flat = [(b.first + b.part.first, b.kept["v"]) for b in exchange._sparse]
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


def groups(exchange, net):
    """Names of the parameters of every sparse bucket."""
    by_memory = {p.grad.data_ptr(): name for name, p in matrices(net).items()}
    found = []
    for bucket in exchange._sparse:
        start = bucket.flat.data_ptr()
        inside = sorted(place for place in by_memory if start <= place < start + bucket.flat.nbytes)
        found.append([by_memory[place] for place in inside])
    return found


def order(exchange, net):
    return [name for names in groups(exchange, net) for name in names]


@pytest.mark.parametrize("size, per_host", WORLDS)
@pytest.mark.parametrize("nesterov", [False, True])
def test_density_1_is_the_dense_exchange_with_momentum(size, per_host, nesterov):
    def train(exchange_of, momentum):
        def body(world):
            net = copy.deepcopy(NET)
            exchange = exchange_of(net, world)
            matrix = {"params": list(matrices(net).values()), "momentum": momentum,
                      "nesterov": bool(momentum and nesterov)}
            vector = {"params": [p for p in net.parameters() if p.dim() <= 1]}
            sgd = torch.optim.SGD([matrix, vector], lr=1e-3, momentum=0.9, nesterov=nesterov)
            for step in range(4):
                give(net, exchange, 7 * step + world.rank, scale=0.1)
                exchange.reduce()
                sgd.step()
                exchange.zero_grad()
            return [p.detach() for p in net.parameters()]

        return run_ranks(size, body, ranks_per_host=per_host)

    dense = train(AllReduce, 0.9)[0]
    for rank in train(lambda net, world: dgc(net, world, per_host, nesterov=nesterov), 0.0):
        for a, b in zip(rank, dense, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_step_by_hand():
    """The formulas of the class, on four numbers of two ranks that have the same: two are sent, and masked."""
    def body(world):
        net = nn.Linear(40, 1, bias=False)
        exchange = Dgc(net, world, momentum=0.5)
        sent = []
        for grad in ([4.0, -3.0, 1.0, 0.5], [0.0, 0.0, 1.0, 0.5]):
            exchange.begin(now(0.05))
            (net.weight * torch.tensor([grad + 36 * [0.0]])).sum().backward()
            exchange.reduce()
            sent.append(net.weight.grad.tolist()[0][:4])
            exchange.zero_grad()
        return sent

    # Then u = (0, 0, 1.5, 0.75), v = (0, 0, 2.5, 1.25): without masking the first two would still be 2 and -1.5.
    assert run_ranks(2, body) == [[[8, -6, 0, 0], [0, 0, 5, 2.5]]] * 2


def test_nesterov_by_hand():
    def body(world):
        net = nn.Linear(40, 1, bias=False)
        exchange = Dgc(net, world, momentum=0.5, nesterov=True)
        for grad in ([4.0, 1.0, 0.5], [0.0, 1.0, 0.0]):
            exchange.begin(now(0.025))
            (net.weight * torch.tensor([grad + 37 * [0.0]])).sum().backward()
            exchange.reduce()
            sent = net.weight.grad.tolist()[0][:3]
            exchange.zero_grad()
        return sent, exchange._sparse[0].kept["u"].tolist()[:3], exchange._sparse[0].kept["v"].tolist()[:3]

    # First u = m (u + g) = (2, 0.5, 0.25), v = u + g = (6, 1.5, 0.75): 6 is sent. Then u = (0, 0.75, 0.125) and
    # v = (0, 1.5 + 0.75 + 1, 0.75 + 0.125).
    assert run_ranks(2, body) == [([0, 6.5, 0], [0, 0, 0.125], [0, 0, 0.875])] * 2


def test_it_sends_what_the_formula_says():
    """Dense where the places would cost more, which is above about 1/W."""
    sent = []

    def body(world):
        exchange = Dgc(copy.deepcopy(NET), world)
        for bucket in exchange._sparse:
            for density in 0.001, 0.2, 0.3, 0.6:
                bucket.density = density
                n, k = len(bucket.flat), bucket._num_sent(bucket.part)
                dense = sent_all_reduce(4, 4 * n)
                sent.append(dense if k is None else sent_all_gather(4, message_bytes(k, 32)))
                assert sent[-1] <= dense and (k is None) == (density > 0.25)

    run_ranks(4, body)


@pytest.mark.parametrize("before, after", [
    ((3, 0), (3, 0)), ((4, 0), (3, 0)), ((2, 0), (5, 0)), ((4, 2), (3, 0)), ((3, 0), (4, 2)), ((4, 2), (4, 2)),
    ((6, 3), (4, 2))])
def test_residuals_are_summed_on_another_number_of_ranks(before, after, tmp_path):
    def total(exchanges, name):
        whole = torch.zeros(exchanges[0]._sparse[-1].last, dtype=torch.float64)
        for bucket in (b for exchange in exchanges for b in exchange._sparse):
            start = bucket.first + bucket.part.first
            whole[start : start + len(bucket.part)] += bucket.kept[name].double()
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
            for x, y in zip(a._sparse, b._sparse, strict=True):
                assert all(torch.equal(x.kept[n].view(torch.int32), y.kept[n].view(torch.int32)) for n in "uv")


def test_a_setting_without_effect_is_named(capsys):
    build(NET, World(), Config(data="x", out="y", density=0.5))
    assert "warning: --density has no effect with --exchange dense" in capsys.readouterr().err


@pytest.mark.parametrize("size, per_host, warned", [(1, 0, "on one rank"), (2, 2, "on one host"), (2, 1, "")])
def test_nothing_sparse_inside_one_host(size, per_host, warned, capsys):
    cfg = Config(data="x", out="y", exchange="dgc-hier" if per_host else "dgc")

    def body(world):
        exchange = build(copy.deepcopy(NET), world, cfg)
        give(exchange._backbone, exchange, world.rank, density=0.01)
        exchange.reduce()
        return sum(bucket.kept["v"].abs().sum().item() for bucket in exchange._sparse)

    residuals = run_ranks(size, body, ranks_per_host=per_host)
    assert capsys.readouterr().err.count(warned or "warning") == bool(warned)
    assert all((residual == 0) == bool(warned) for residual in residuals)


def test_what_is_no_longer_used_is_freed():
    net = nn.Linear(3, 2)
    seen = [weakref.ref(net), weakref.ref(AllReduce(net, World()))]
    del net
    gc.collect()
    assert [one() for one in seen] == [None, None]
