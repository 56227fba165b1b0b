"""Of what an exchange with error feedback is given, nothing is lost: not in a step, and not in a checkpoint."""

import copy

import pytest
import torch

from tests.support.gradients import NET, give, matrices
from tests.support.worlds import run_ranks, write_files
from xc.comm.world import World
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.gradients.powersgd import PowerSgd

# (ranks, ranks of a host or 0 for one level)
WORLDS = [(1, 0), (2, 0), (3, 0), (7, 0), (2, 1), (2, 2), (4, 2), (10, 5)]  # 10: parts differ in size
RESIDUAL = {Dgc: "v", PowerSgd: "e"}


def build(net, world, per_host, settings, momentum=0.9):
    """PowerSgd where a rank is given, else Dgc."""
    if "rank" in settings:
        return PowerSgd(net, world, bits=settings.get("bits", 32), rank=settings["rank"])
    return Dgc(net, world, two_level=bool(per_host), bits=settings.get("bits", 32), momentum=momentum)


@pytest.mark.parametrize("size, per_host", WORLDS)
@pytest.mark.parametrize("settings", [
    {"density": 0.01}, {"density": 0.01, "bits": 16}, {"density": 0.15}, {"density": 0.25, "bits": 16},
    {"density": 0.5}, {"rank": 2}, {"rank": 7, "bits": 16}])
def test_nothing_is_lost(size, per_host, settings):
    """Without momentum: all gradients of all ranks = all that was delivered + all that is unsent. The same bits on all.
    """
    def body(world):
        net = copy.deepcopy(NET)
        exchange = build(net, world, per_host, settings, momentum=0.0)
        given, delivered = None, None
        for step in range(3):
            plain = copy.deepcopy(NET)
            give(plain, None, 7 * step + world.rank)
            give(net, exchange, 7 * step + world.rank, density=settings.get("density", 1.0))
            exchange.reduce()
            given = add(given, [plain.get_parameter(n).grad for n in matrices(net)])
            delivered = add(delivered, [p.grad for p in matrices(net).values()])
            exchange.zero_grad()
        flat = [(b.first + b.part.first, b.unsent[RESIDUAL[type(exchange)]]) for b in exchange.compressed]
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
    for bucket in exchange.compressed:
        start = bucket.flat.data_ptr()
        names += [by_memory[at] for at in sorted(by_memory) if start <= at < start + bucket.flat.nbytes]
    return names


@pytest.mark.parametrize("settings", [{"density": 0.1}, {"rank": 3}])
@pytest.mark.parametrize("before, after", [
    ((3, 0), (3, 0)), ((4, 0), (3, 0)), ((2, 0), (5, 0)), ((4, 2), (3, 0)), ((4, 2), (4, 2)), ((6, 3), (4, 2))])
def test_unsent_gradients_are_summed_on_another_number_of_ranks(before, after, settings, tmp_path):
    def found_in(exchange):
        """{name: what this rank keeps, where it stands among all parameters}; -0 elsewhere, which changes no sum."""
        tables = {name: torch.full((exchange.compressed[-1].last,), -0.0) for name in exchange.unsent_names}
        for name, whole in tables.items():
            for bucket in exchange.compressed:
                start = bucket.first + bucket.part.first
                whole[start : start + len(bucket.part)] = bucket.unsent[name]
        return tables

    def step(exchange, seed):
        give(exchange._backbone, exchange, seed, density=settings.get("density", 1.0))
        exchange.reduce()
        gradients = [p.grad.clone() for p in exchange._backbone.parameters()]
        exchange.zero_grad()
        return gradients

    def write(world):
        exchange = build(copy.deepcopy(NET), world, before[1], settings)
        step(exchange, world.rank)
        step(exchange, 1 + world.rank)
        write_files(exchange, tmp_path)
        return found_in(exchange), step(exchange, 2 + world.rank)

    def read(world):
        exchange = build(copy.deepcopy(NET), world, after[1], settings)
        exchange.load(tmp_path)
        return found_in(exchange), step(exchange, 2 + world.rank)

    written = run_ranks(before[0], write, ranks_per_host=before[1])
    found = run_ranks(after[0], read, ranks_per_host=after[1])
    for name in written[0][0]:
        whole = sum(unsent[name].double() for unsent, _ in written)
        assert whole.abs().sum() > 0
        torch.testing.assert_close(sum(unsent[name].double() for unsent, _ in found), whole, rtol=1e-5, atol=1e-6)
    if before == after:  # bit for bit, the signs of zeros too
        for (unsent, gradients), (as_read, of_read) in zip(written, found, strict=True):
            assert all(torch.equal(unsent[name].view(torch.int32), as_read[name].view(torch.int32)) for name in unsent)
            assert all(torch.equal(a, b) for a, b in zip(gradients, of_read, strict=True))


@pytest.mark.parametrize("wrote, reads", [({"density": 0.1}, {"rank": 3}), ({"rank": 3}, {"density": 0.1}),
                                          ({"rank": 3}, {"rank": 4}), (None, {"rank": 3}), ({"rank": 3}, None)])
def test_files_of_another_exchange_are_refused(wrote, reads, tmp_path):
    def made(settings):
        net = copy.deepcopy(NET)
        return AllReduce(net, World()) if settings is None else build(net, World(), 0, settings)

    write_files(made(wrote), tmp_path)
    with pytest.raises(ValueError, match="resume with th"):
        made(reads).load(tmp_path)
