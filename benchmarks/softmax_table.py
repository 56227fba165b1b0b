"""Accuracy of the heads at equal budgets of active classes, at equal steps and over time: every run is one train.py.

    python benchmarks/softmax_table.py --data data/glyphs.pack --runs runs/table-glyphs -- --epochs 10

    --heads    HEAD[:BUDGET[:flag=value,...]], BUDGET as --active-classes: full knn:0.1 knn:0.01:near_share=1 ...
               A flag without a value is a switch: sampled:0.1:no-sampling-correction
               A budget below twice the batch's distinct labels (at most) is raised to that: the table says to what.
    --seeds    of every head; --ranks of every run (1: no MPI); --jobs runs at a time, for machines with cores to spare
    --minutes  of training that every run may take: longer ones are stopped at the next line of metrics, but not before
               their first evaluation. Their last evaluation counts, and they are marked "cut". More minutes continue
               them. Runs that were finished without this flag stay whole.
    --plot     a picture of top-1 over seconds of training: a line for each head, the mean of its seeds, which are thin
    after --   flags of train.py for all of them

Runs that are in the --runs folder are not done again, so a table can be made in pieces. For each head and budget: mean
and spread (highest less lowest) of the final top-1 over the seeds; `to99`: seconds of training until an evaluation
first reached 99 % of full softmax's mean final top-1, median over the seeds (null: never). Prints a table, a table of
top-1 at common times, then one JSON object with keys top1.HEAD.BUDGET, each with mean, spread, seeds, active,
train_seconds, to99, cut, curve (the means [seconds, top-1] of the evaluations that all seeds have) and best_at (those
of the common `times` at which no head is better).

Seconds of training are wall time of rank 0 in its steps: data, graph builds, choice of classes, forward, backward,
exchange, waiting for other ranks, update. They leave out the start, evaluations and checkpoints, and add up over the
launches of a resumed run. On a GPU, queued work counts where rank 0 waits for it. Runs record no CPU time.

Common times are 25, 50 and 100 % of what the shortest and the longest head took. Between two evaluations a curve is
taken as straight; after its end it keeps its last top-1. Rates fall over all steps of a run, so a point inside of a
curve is not where a run of fewer steps would end.
"""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from xc import config
from xc.data import loader as data
from xc.model import head_table as heads
from xc.run.signals import EXIT_CODE

ROOT = Path(__file__).parent.parent
HEADS = ["full", *(f"{head}:{budget}" for budget in (0.1, 0.01) for head in ("knn", "sampled", "selective"))]
PICTURES = (".png", ".svg", ".pdf")
POLL_SECONDS = 0.2  # between two looks at the metrics of a run with a limit
LOG_AXIS_FROM = 4  # times as long as the shortest head took the longest: short curves would be squeezed


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--heads", nargs="+", default=HEADS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--plot")
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()

    if unknown := {head.split(":")[0] for head in args.heads} - set(heads.HEADS):
        raise SystemExit(f"error: --heads {unknown.pop()} is not known: {', '.join(heads.HEADS)}")
    if args.plot and (Path(args.plot).suffix not in PICTURES or not Path(args.plot).parent.is_dir()):
        raise SystemExit(f"error: --plot {args.plot}: name a file {', '.join(PICTURES)} in a folder that exists")
    common = ["--data", args.data, "--out", "unused", *args.flags]
    cfg = config.parse(common)
    num_classes = data.open_splits(cfg)["train"].num_classes
    least = 2 * min(cfg.global_batch, num_classes)
    jobs = [(head, seed, Path(args.runs) / f"{head.replace(':', '-')}-seed{seed}")
            for seed in args.seeds for head in args.heads]
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda job: train(args, *job, num_classes, least, args.minutes), jobs):
            pass

    results = {head: [read(folder) for h, _, folder in jobs if h == head] for head in args.heads}
    goal = 0.99 * statistics.mean(r["top1"] for r in results["full"]) if "full" in results else None
    table = {head: summary(runs, goal) for head, runs in results.items()}
    times = compare(table)
    show(table, times, f"{args.data}, {num_classes} classes, {' '.join(args.flags)}")
    if args.plot:
        draw(results, table, f"{args.data}: {num_classes:,} classes, seeds {' '.join(map(str, args.seeds))}", args.plot)
    print(json.dumps({"data": args.data, "classes": num_classes, "times": times}
                     | {f"top1.{head.replace(':', '.', 1)}": row for head, row in table.items()}))


def train(args, head, seed, folder, num_classes, least, minutes=None):
    """One run of train.py, unless its folder holds a finished one, or one that was trained for so many minutes; its
    output goes beside the folder."""
    limit = float("inf") if minutes is None else 60 * minutes
    if finished(folder) or is_due(folder, limit):
        return
    flags = ["--data", args.data, "--out", folder, "--resume", "auto", "--seed", seed, *args.flags,
             *flags_of(head, num_classes, least)]
    launcher = ["mpirun", "--oversubscribe", "-np", args.ranks] if args.ranks > 1 else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [str(part) for part in (*launcher, sys.executable, "train.py", *flags)]
    with open(log_of(folder), "a" if folder.exists() else "w") as log, \
            subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as process:
        code, told = None, False
        while code is None:
            try:
                code = process.wait(POLL_SECONDS if limit < float("inf") and not told else None)
            except subprocess.TimeoutExpired:
                if is_due(folder, limit):
                    process.send_signal(signal.SIGUSR1)  # as SIGTERM, on which mpirun would kill its ranks
                    told = True
    if code and not (told and code == EXIT_CODE):
        raise subprocess.CalledProcessError(code, command)
    run = read(folder)
    print(f"{head} seed {seed}: top-1 {run['top1']:.4f}{' cut' * run['cut']}", file=sys.stderr, flush=True)


def flags_of(head, num_classes, least):
    """Flags of train.py for HEAD[:BUDGET[:flag=value,...]]."""
    name, _, rest = head.partition(":")
    share, _, extra = rest.partition(":")
    flags = ["--head", name]
    if share:
        active = float(share) * num_classes if float(share) <= 1 else float(share)
        flags += ["--active-classes", min(num_classes, max(least, round(active)))]
    for setting in extra.split(",") if extra else ():
        flag, equals, value = setting.partition("=")
        flags += [f"--{flag.replace('_', '-')}", *([value] if equals else [])]
    return flags


def lines_of(folder):
    """The metrics of a run; a line that is being written is left out."""
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def log_of(folder):
    return folder.with_name(folder.name + ".log")


def log_text(folder):
    return log_of(folder).read_text() if log_of(folder).exists() else ""


def finished(folder):
    return '"top1"' in log_text(folder)


def is_due(folder, limit):
    """Whether a run was evaluated and trained for so many seconds."""
    if limit == float("inf") or not (folder / "metrics.jsonl").exists():
        return False
    evaluations, seconds = timed(folder)
    return bool(evaluations) and seconds >= limit


def timed(folder):
    """([(seconds of training, line) of every evaluation], seconds until the last line of metrics), over all launches.

    train_seconds begins at 0 in each launch. So after the first one the phases of the logged steps sum to more.
    """
    evaluations, seconds, steps, last = [], 0.0, 0.0, 0
    stops = [int(step) for step in re.findall(r"stopped by a signal after (\d+) steps", log_text(folder))]
    for line in lines_of(folder):
        if "loss" in line:
            phases = sum(value for name, value in line.items() if name.endswith("_ms") and name != "waited_ms")
            last = max([last, *(step for step in stops if step < line["step"])])  # the first step that is in the line
            steps, last = steps + phases / 1e3 * (line["step"] - last), line["step"]
        seconds = max(seconds, steps, line.get("train_seconds", 0.0))
        if "top1" in line:
            evaluations.append((seconds, line))
    return evaluations, seconds


def read(folder):
    """Last top-1, active classes, seconds of training, (seconds, top-1) of every evaluation, and whether it was cut."""
    evaluations, _ = timed(folder)
    active = next((line["active"] for _, line in reversed(evaluations) if "active" in line), None)
    curve = [(seconds, line["top1"]) for seconds, line in evaluations]
    return {"top1": curve[-1][1], "active": active, "seconds": curve[-1][0], "curve": curve,
            "cut": not finished(folder)}


def summary(runs, goal):
    """The row of a head, of its runs with all seeds."""
    top1 = [run["top1"] for run in runs]
    together = zip(*(run["curve"] for run in runs), strict=False)  # cut runs have fewer evaluations
    curve = [[round(statistics.mean(part), 4) for part in zip(*points, strict=True)] for points in together]
    return {"mean": round(statistics.mean(top1), 4), "spread": round(max(top1) - min(top1), 4), "seeds": len(runs),
            "active": runs[0]["active"], "train_seconds": round(statistics.median(r["seconds"] for r in runs), 1),
            "to99": time_to(goal, runs), "cut": any(run["cut"] for run in runs), "curve": curve}


def time_to(goal, runs):
    """Median over the runs of the seconds until an evaluation reached the goal; None where most never did."""
    if goal is None:
        return None
    times = sorted(next((s for s, top1 in run["curve"] if top1 >= goal), float("inf")) for run in runs)
    middle = times[len(times) // 2]
    return None if middle == float("inf") else round(middle, 1)


def top1_at(curve, seconds):
    """Top-1 of a curve after so many seconds; None before its first evaluation."""
    return None if seconds < curve[0][0] else round(float(np.interp(seconds, *zip(*curve, strict=True))), 4)


def compare(table):
    """The common times, in seconds. Every row gets those at which it is best: best_at."""
    ends = [row["curve"][-1][0] for row in table.values()]
    times = sorted({round(share * end, 4) for end in (min(ends), max(ends)) for share in (0.25, 0.5, 1)})
    best = {s: max(top1_at(row["curve"], s) or 0.0 for row in table.values()) for s in times}
    for row in table.values():
        row["best_at"] = [s for s in times if top1_at(row["curve"], s) == best[s]]
    return times


def show(table, times, title):
    """Print the table of results, and the one of common times."""
    print(title)
    print(f"{'head:budget':40} {'top-1':>8} {'spread':>8} {'active':>8} {'train s':>8} {'to 99 %':>8}")
    for head, row in table.items():
        print(f"{head:40} {row['mean']:8.4f} {row['spread']:8.4f} {row['active'] or '-':>8} {row['train_seconds']:8} "
              f"{row['to99'] or '-':>8}{' cut' * row['cut']}")
    print("top-1 after seconds of training (*: the best)")
    print(f"{'head:budget':40}" + "".join(f" {s:8.4g} " for s in times))
    for head, row in table.items():
        found = [(top1_at(row["curve"], s), "*" if s in row["best_at"] else " ") for s in times]
        print(f"{head:40}" + "".join(f" {'-' if top1 is None else f'{top1:.4f}':>8}{mark}" for top1, mark in found)
              + "cut" * row["cut"])


def draw(results, table, title, path):
    """Top-1 over seconds of training. A cut head ends with a cross, another with a dot."""
    from matplotlib.figure import Figure  # takes a second; a figure of its own needs no display
    from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter

    figure = Figure(figsize=(9, 5.5 + 0.12 * len(table)), layout="constrained")
    axes = figure.subplots()
    ends = [row["curve"][-1][0] for row in table.values()]
    logarithmic = max(ends) >= LOG_AXIS_FROM * min(ends) > 0
    for i, (head, row) in enumerate(table.items()):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        for run in results[head] if len(results[head]) > 1 else ():
            axes.plot(*zip(*run["curve"], strict=True), **style, linewidth=0.7, alpha=0.4)
        label = f"{head}: {100 * row['mean']:.1f} %" + (f", {row['active']:,} active" if row["active"] else "")
        axes.plot(*zip(*row["curve"], strict=True), **style, linewidth=2, marker="x" if row["cut"] else "o",
                  markevery=[-1], label=label + ", cut" * row["cut"])
    if logarithmic:
        axes.set_xscale("log", nonpositive="mask")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    axes.set(xlabel="seconds of training, without evaluations", ylabel="top-1")
    axes.set_title(title, wrap=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, title="head:budget: last top-1 (o: all steps done, x: cut)")
    figure.savefig(path)


if __name__ == "__main__":
    main()
