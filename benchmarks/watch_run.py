"""Looks at a run from outside, for benchmarks/hundred_million.sh.

    python benchmarks/watch_run.py memory PID RANKS FILE     the memory of the ranks of the launcher PID, until it ends
    python benchmarks/watch_run.py saved RUN PERCENT PID     waits until RUN has a checkpoint of that share of its steps
    python benchmarks/watch_run.py logged RUN PERCENT PID    waits until it has a line of metrics of that share
    python benchmarks/watch_run.py report RUN FILE -- FLAGS  all launches, against the plan of a run with FLAGS

`memory` appends a line of JSON to FILE: rank_mb, the highest of any rank; sum_mb, of all ranks together. It is that of
the processes' own (RssAnon), looked at every half a second. Files that they map are not counted: the system can take
their pages back. `saved` and `logged` end with 1 where the process PID ends before. `report` takes off what a process
has after its imports. Its last line is one JSON object.
"""

import json
import re
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from xc import config
from xc.data.loader import open_splits
from xc.optim.schedule import Schedule
from xc.plan.cluster import Cluster
from xc.plan.plan import Data, Plan

LOOK_SECONDS, WAIT_SECONDS = 0.5, 2.0


def memory(pid, ranks, file):
    highest = {"rank_mb": 0.0, "sum_mb": 0.0}
    start = time.monotonic()
    while Path(f"/proc/{pid}").exists():
        now = [own_mb(rank) for rank in ranks_of(pid)]
        highest = {"rank_mb": max([highest["rank_mb"], *now]), "sum_mb": max(highest["sum_mb"], sum(now))}
        time.sleep(LOOK_SECONDS)
    with open(file, "a") as lines:
        print(json.dumps({"ranks": int(ranks), "seconds": round(time.monotonic() - start, 1)} | highest), file=lines)


def ranks_of(pid):
    """Process ids of the ranks that a launcher started; its own, where it is the only rank."""
    children = subprocess.run(["pgrep", "-P", pid, "-f", "train.py"], capture_output=True, text=True, check=False)
    return children.stdout.split() or [pid]


def own_mb(pid):
    try:
        found = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:  # it has ended
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def wait_until(reached, run, percent, pid):
    """Wait until reached(run, step) holds for the step at this share of the run. 1 where the process ends before."""
    run, step = Path(run), None
    while Path(f"/proc/{pid}").exists():
        if step is None and (run / "run.args").exists():
            step = steps_of(run) * float(percent) / 100 - 1
        if step is not None and reached(run, step):
            return 0
        time.sleep(WAIT_SECONDS)
    return 1


def saved(run, step):
    folders = sorted((run / "checkpoints").glob("step-*"))
    return bool(folders) and int(folders[-1].name[5:]) >= step


def logged(run, step):
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        return bool(lines) and json.loads(lines[-1])["step"] >= step
    except (OSError, ValueError):  # not begun, or in the middle of a line
        return False


def steps_of(run):
    cfg = config.parse([f"@{Path(run) / 'run.args'}"])
    return Schedule.of(cfg, len(open_splits(cfg)["train"]), 1).length


def report(run, file, flags):
    run, cfg = Path(run), config.parse(flags)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    launches = [json.loads(line) for line in (run / "launches.jsonl").read_text().splitlines()]
    watched = [json.loads(line) for line in Path(file).read_text().splitlines()]
    idle = float(subprocess.run(
        [sys.executable, "-c", "import os, sys; sys.path.insert(0, '.'); import train\n"
         "from benchmarks.watch_run import own_mb; print(own_mb(os.getpid()))"],
        cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True).stdout)
    result = {"classes": open_splits(cfg)["train"].num_classes, "launches": []}
    for launch, seen in zip(launches, watched, strict=True):
        facts = f"ranks={seen['ranks']},ranks-per-host=8,memory=24GB,network=10GB,flops=4e10,bandwidth=1e10"
        data = Data.of(cfg, Cluster.parse(facts))
        plan = Plan.of(config.parse([*flags, "--plan", facts, "--device", "cpu"]), Cluster.parse(facts), data)
        peak, planned = seen["rank_mb"] - idle, plan.memory.total / 2**20
        result["launches"].append({"began": launch["time"], "ranks": launch["ranks"], "seconds": seen["seconds"],
                                   "peak_rank_mb": round(peak), "planned_rank_mb": round(planned),
                                   "planned_over_peak": round(planned / peak, 3),
                                   "peak_sum_mb": round(seen["sum_mb"] - seen["ranks"] * idle)})
    began = [datetime.strptime(launch["time"], "%Y-%m-%dT%H:%M:%S%z") for launch in launches]
    result["hours"] = round(((began[-1] - began[0]).total_seconds() + watched[-1]["seconds"]) / 3600, 2)
    result["graphs"] = [{name: line[name] for name in ("step", "graph_seconds", "graph_recall", "graph_probes")}
                        for line in metrics if "graph_seconds" in line]
    result["top1"] = [[line["step"], line["top1"]] for line in metrics if "top1" in line]
    result["loss"] = [[line["step"], round(line["loss"], 3)] for line in metrics if "loss" in line][::10]
    print(json.dumps(result))


def main():
    match sys.argv[1:]:
        case "memory", pid, ranks, file:
            memory(pid, ranks, file)
        case "saved", run, percent, pid:
            sys.exit(wait_until(saved, run, percent, pid))
        case "logged", run, percent, pid:
            sys.exit(wait_until(logged, run, percent, pid))
        case "report", run, file, "--", *flags:
            report(run, file, flags)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main()
