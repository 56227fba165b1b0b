"""Sums up one step of a trace.json of train.py --trace-steps: what a viewer of traces does not add up.

ui.perfetto.dev shows the spans; here are the times of the phases, and how long transfers were in flight.
A transfer ends when its rank has waited for it, so these times are upper bounds."""

import json

from xc.errors import one_line


class TraceError(ValueError):
    """A file that is not a trace of train.py."""


def read(path):
    """[(rank, lane, number of the lane, name, begin, end)] of a file that train.py wrote, times in ms."""
    try:
        with open(path) as file:
            events = json.load(file)["traceEvents"]
        return [(int(e["pid"]), one_line(str(e["cat"])), int(e["tid"]) % 1000, one_line(str(e["name"])),
                 e["ts"] / 1e3, (e["ts"] + e["dur"]) / 1e3) for e in events if e["ph"] == "X"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise TraceError(f"{path} is not a trace that train.py --trace-steps wrote ({error!r})") from error


def middle_step(spans):
    """Name of the middle one of the recorded steps, and the spans in it, cut to the step, in ms from its begin."""
    steps = sorted({(begin, end, name) for rank, lane, _, name, begin, end in spans if lane == "step" and rank == 0})
    if not steps:
        raise TraceError("the trace holds no complete step")
    first, last, name = steps[len(steps) // 2]
    return name, [(rank, lane, number, what, max(begin, first) - first, min(end, last) - first)
                  for rank, lane, number, what, begin, end in spans if lane != "step" and end > first and begin < last]


def describe(spans):
    """{"rank 0": facts of one step}, in ms.

    phases_ms   {phase: time}
    network_ms  time in which a transfer was in flight
    behind_ms   the part of it during computation, a phase other than wait and exchange
    """
    ranks = {}
    for rank in sorted({span[0] for span in spans}):
        own = [span for span in spans if span[0] == rank]
        compute = [(begin, end) for _, lane, _, name, begin, end in own
                   if lane == "compute" and name not in ("wait", "exchange")]
        network = _union([(begin, end) for _, lane, _, _, begin, end in own if lane == "network"])
        phases = {}
        for _, lane, _, name, begin, end in own:
            if lane == "compute":
                phases[name] = phases.get(name, 0.0) + end - begin
        behind = sum(max(0.0, min(b, d) - max(a, c)) for a, b in network for c, d in _union(compute))
        ranks[f"rank {rank}"] = {"phases_ms": phases, "network_ms": sum(b - a for a, b in network), "behind_ms": behind}
    return ranks


def _union(spans):
    """[[begin, end]] of the same time, in order and without overlaps."""
    joined = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return joined
