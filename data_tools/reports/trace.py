"""One step of a timeline.json of train.py --timeline-steps, as numbers and as a plot. Called by data_tools.show."""

import json

from xc.message import one_line

_COLORS = {"forward": "tab:blue", "head": "tab:green", "backward": "tab:orange", "select": "tab:olive",
           "wait": "lightgrey", "exchange": "silver", "update": "tab:purple", "data": "tab:brown"}
_MOST_ROWS = 2000  # of a picture, whose pixels then take 570 MB


class TimelineError(ValueError):
    """A file that is not a timeline of train.py."""


def read(path):
    """Spans (rank, lane, lane's number, name, begin, end) in ms, of a file that train.py wrote."""
    try:
        with open(path) as file:
            events = json.load(file)["traceEvents"]
        return [(int(e["pid"]), one_line(str(e["cat"])), int(e["tid"]) % 1000, one_line(str(e["name"])),
                 e["ts"] / 1e3, (e["ts"] + e["dur"]) / 1e3) for e in events if e["ph"] == "X"]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise TimelineError(f"{path} is not a timeline that train.py --timeline-steps wrote ({error!r})") from error


def one_step(spans):
    """Name of the middle one of the recorded steps, and the spans that touch it, cut to it, counted from its begin."""
    steps = sorted({(begin, end, name) for rank, lane, _, name, begin, end in spans if lane == "step" and rank == 0})
    if not steps:
        raise TimelineError("the timeline holds no whole step")
    first, last, name = steps[len(steps) // 2]
    return name, [(rank, lane, number, what, max(begin, first) - first, min(end, last) - first)
                  for rank, lane, number, what, begin, end in spans if lane != "step" and end > first and begin < last]


def describe(spans):
    """Of every rank of one step: ms of every phase, ms in which something was on the network, and of those behind a
    computation (a phase other than wait and exchange)."""
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
    """The same time as spans that do not overlap, in order."""
    joined = []
    for begin, end in sorted(spans):
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(joined[-1][1], end)
        else:
            joined.append([begin, end])
    return joined


def draw(spans, title, path):
    """A PNG with a row for every lane of every rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = sorted({(rank, lane, number) for rank, lane, number, *_ in spans}, key=lambda row: (row[0], row[1], row[2]))
    if len(rows) > _MOST_ROWS:
        raise TimelineError(f"{title} has {len(rows)} lanes over all ranks, at most {_MOST_ROWS} are drawn: leave out "
                            "--plot")
    figure, axes = plt.subplots(figsize=(12, 0.6 + 0.35 * len(rows)))
    for rank, lane, number, name, begin, end in spans:
        row = rows.index((rank, lane, number))
        axes.barh(row, end - begin, left=begin, height=0.8, color=_COLORS.get(name, "tab:red"), edgecolor="white")
        if end - begin > 0.04 * max(span[5] for span in spans):
            axes.text((begin + end) / 2, row, name, ha="center", va="center", fontsize=6, parse_math=False)
    axes.set_yticks(range(len(rows)), [f"rank {rank} {lane}" for rank, lane, _ in rows], fontsize=7,
                    parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.set_title(title, parse_math=False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
