"""Preflight: whether ranks reach each other, the speed of their network, and their clocks."""

import statistics
import time

import torch

from xc.comm.traffic import sent_all_reduce
from xc.preflight.hosts import by_host
from xc.preflight.report import MIB, listed, on_all_ranks

_SMALL, _LARGE = 1, 8 * MIB  # numbers of an all-reduce
_MIN_BYTES_PER_SECOND = 500 * MIB  # between hosts; 10 Gbit/s are 1,192 MiB/s
_MAX_CLOCK_SECONDS = 1.0


def report_sums(report, world):
    """Whether sums over all ranks are right, by MPI and by Horovod. Collective."""
    if world.size == 1:
        report.add("sums", "one rank: nothing to sum")
        return
    sums = [int(world.all_ranks.all_reduce(torch.ones(1, device=world.device)).item()),
            int(world.all_reduce_async(torch.ones(1, device=world.device), "preflight")().item())]
    found = on_all_ranks(world, lambda: sums)
    fault = listed(f"rank {rank} got {mpi} by MPI and {horovod} by Horovod"
                   for rank, (mpi, horovod) in enumerate(found) if [mpi, horovod] != [world.size, world.size])
    report.add_checked("sums", f"MPI and Horovod sum over {world.size} rank(s)", fault,
                       "build both with the MPI whose mpirun launches them: make setup", "wrong")


def report_network(report, world, facts):
    """Times of all-reduces between all ranks and inside hosts. A slow network is a fault. Collective."""
    if world.size == 1:
        report.add("network", "one rank: nothing to send")
        return
    hosts = by_host(facts)
    groups = [("all ranks", world.all_ranks)]
    if len(hosts) > 1 and any(len(on_host) > 1 for on_host in hosts.values()):
        groups.append(("the ranks of a host", world.host))
    for name, group in groups:
        speeds = on_all_ranks(world, lambda group=group: _speed(group, world.device) if group.size > 1 else None)
        latency, rate = max(speed[0] for speed in speeds if speed), min(speed[1] for speed in speeds if speed)
        slow = group is world.all_ranks and len(hosts) > 1 and rate < _MIN_BYTES_PER_SECOND
        value = (f"between {name}, an all-reduce of one number takes {1e6 * latency:,.0f} us; one of "
                 f"{4 * _LARGE / MIB:.0f} MiB sends {rate / MIB:,.0f} MiB/s from each rank")
        linked = "OMPI_MCA_btl_tcp_links" in facts[0]["settings"]
        report.add_checked("network", value, slow and f"slow, less than {_MIN_BYTES_PER_SECOND / MIB:.0f} MiB/s",
                           ("" if linked else "on Ethernet, export OMPI_MCA_btl_tcp_links=2; ")
                           + "--exchange dgc and --feature-bits 16 send less")


def _speed(group, device):
    """Medians: (seconds of a small all-reduce, bytes per second that leave this rank in a large one). Collective."""
    def seconds(size, repeats):
        tensor, times = torch.zeros(size, device=device), []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            group.all_reduce(tensor)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times[1:])  # the first one opens connections

    small = seconds(_SMALL, 30)
    return small, sent_all_reduce(group.size, 4 * _LARGE) / seconds(_LARGE, 3)


def report_clocks(report, world, clock=time.time):
    """The rank whose clock differs most from that of rank 0. More than a second is a fault. Collective."""
    if world.size == 1:
        report.add("clocks", "one rank: one clock")
        return
    offsets = clock_offsets(world, clock)
    rank = max(range(world.size), key=lambda rank: abs(sum(offsets[rank])))
    low, high = offsets[rank]
    value = f"rank {rank} differs most from rank 0, by {(low + high) / 2:+.4f} s (+- {(high - low) / 2:.4f})"
    report.add_checked("clocks", value,
                       max(low, -high) > _MAX_CLOCK_SECONDS and "times in logs and of files will disagree",
                       "synchronise the clocks of the hosts (chrony, ntp)")


def clock_offsets(world, clock=time.time):
    """[(least, most) seconds that each rank's clock is ahead of rank 0's], by the quickest of five rounds. Collective.

    Every rank reads its clock between two all-gathers. So it reads it after rank 0 began the first one, and before
    rank 0 ended the second one.
    """
    rounds = []
    for _ in range(5):
        world.all_ranks.all_gather_object(None)  # all ranks arrive here, so that rank 0 waits only briefly below
        begin = clock()
        world.all_ranks.all_gather_object(None)
        readings = world.all_ranks.all_gather_object(clock())
        end = clock()
        begin, end = world.all_ranks.all_gather_object((begin, end))[0]
        rounds.append((end - begin, [(reading - end, reading - begin) for reading in readings]))
    return [(0.0, 0.0), *min(rounds)[1][1:]]
