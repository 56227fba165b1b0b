"""Preflight: whether the ranks reach each other, how fast, and whether their clocks agree."""

import statistics
import time

import torch

from xc.comm.traffic import sent_all_reduce
from xc.preflight.hosts import by_host
from xc.preflight.report import MIB, of_all

_SMALL, _LARGE = 1, 8 * MIB  # numbers of an all-reduce
_SLOW_BYTES = 500 * MIB  # per second between hosts; 10 Gbit/s are 1,192
_CLOCK_SECONDS = 1.0


def agreement(report, world):
    """That a sum over all ranks is one, through MPI and through Horovod."""
    if world.size == 1:
        report("agreement", "one rank: nothing to agree on")
        return
    sums = [int(world.all_ranks.all_reduce(torch.ones(1, device=world.device)).item()),
            int(world.all_reduce_async(torch.ones(1, device=world.device), "preflight")().item())]
    wrong = any(of_all(world, lambda: sums != [world.size, world.size]))
    report.judge("agreement", f"MPI and Horovod both sum over {world.size} rank(s)", wrong and f"they found {sums}",
                 "build both against the MPI whose mpirun launches them: make setup", "wrong")


def network(report, world, facts):
    if world.size == 1:
        report("network", "one rank: nothing to send")
        return
    hosts = by_host(facts)
    places = [("all ranks", world.all_ranks)]
    if len(hosts) > 1 and any(len(on_host) > 1 for on_host in hosts.values()):
        places.append(("ranks of a host", world.host))
    for name, group in places:
        found = of_all(world, lambda group=group: _speed(group, world.device) if group.size > 1 else None)
        latency, rate = max(f[0] for f in found if f), min(f[1] for f in found if f)
        slow = group is world.all_ranks and len(hosts) > 1 and rate < _SLOW_BYTES
        value = (f"between {name} a small all-reduce takes {1e6 * latency:,.0f} us, a large one sends "
                 f"{rate / MIB:,.0f} MiB/s a rank")
        linked = "OMPI_MCA_btl_tcp_links" in facts[0]["settings"]
        report.judge("network", value, slow and "slow",
                     ("" if linked else "on Ethernet, export OMPI_MCA_btl_tcp_links=2; ")
                     + "--exchange dgc and --feature-bits 16 send less")


def _speed(group, device):
    """(seconds of a small all-reduce, bytes per second that leave this rank in a large one), medians. Collective."""
    def seconds(size, repeats):
        tensor, taken = torch.zeros(size, device=device), []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            group.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])  # the first one makes connections

    small = seconds(_SMALL, 30)
    return small, sent_all_reduce(group.size, 4 * _LARGE) / seconds(_LARGE, 3)


def clocks(report, world, clock=time.time):
    if world.size == 1:
        report("clocks", "one rank: one clock")
        return
    offsets = clock_offsets(world, clock)
    rank = max(range(world.size), key=lambda rank: abs(sum(offsets[rank])))
    low, high = offsets[rank]
    value = f"rank {rank} is furthest from rank 0, {(low + high) / 2:+.4f} s (+- {(high - low) / 2:.4f})"
    report.judge("clocks", value,
                 max(low, -high) > _CLOCK_SECONDS and "times in logs and of files disagree",
                 "have the hosts' clocks set (chrony, ntp)")


def clock_offsets(world, clock=time.time):
    """[(least, most) seconds that a rank's clock is ahead of rank 0's], by the quickest of a few rounds. Collective.

    Every rank reads its clock between two gatherings that rank 0 takes part in, so at a moment between those at which
    rank 0 began the first and ended the second.
    """
    best = []
    for _ in range(5):
        world.all_ranks.all_gather_object(None)  # all come together, so that rank 0 does not wait for long below
        begin = clock()
        world.all_ranks.all_gather_object(None)
        read = world.all_ranks.all_gather_object(clock())
        end = clock()
        begin, end = world.all_ranks.all_gather_object((begin, end))[0]
        best.append((end - begin, [(moment - end, moment - begin) for moment in read]))
    return [(0.0, 0.0), *min(best)[1][1:]]
