"""Accuracy of the heads at equal budgets of active classes and equal steps: every run is one train.py.

    python benchmarks/softmax_table.py --data data/glyphs.pack --runs runs/table-glyphs -- --epochs 10

    --heads   HEAD[:BUDGET[:flag=value,...]], BUDGET as --active-classes: full knn:0.1 knn:0.01:near_share=1 ...
              A budget below twice the batch's distinct labels (at most) is raised to that: the table says to what.
    --seeds   of every head; --ranks of every run (1: no MPI); --jobs runs at a time, for machines with cores to spare
    after --   flags of train.py for all of them

Runs that are in the --runs folder are not done again, so a table can be made in pieces. For each head and budget: mean
and spread (highest less lowest) of the final top-1 over the seeds; `to99`: seconds of training until an evaluation
first reached 99 % of full softmax's mean final top-1, median over the seeds (null: never). Prints a table, then one
JSON object with keys top1.HEAD.BUDGET, each with mean, spread, seeds, active, train_seconds, to99.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from xc import config
from xc.data import loader as data
from xc.model import head_table as heads

ROOT = Path(__file__).parent.parent
HEADS = ["full", *(f"{head}:{budget}" for budget in (0.1, 0.01) for head in ("knn", "sampled", "selective"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--runs", required=True)
    parser.add_argument("--heads", nargs="+", default=HEADS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()

    if unknown := {head.split(":")[0] for head in args.heads} - set(heads.HEADS):
        raise SystemExit(f"error: --heads {unknown.pop()} is not known: {', '.join(heads.HEADS)}")
    common = ["--data", args.data, "--out", "unused", *args.flags]
    cfg = config.parse(common)
    num_classes = data.open_splits(cfg)["train"].num_classes
    least = 2 * min(cfg.global_batch, num_classes)
    jobs = [(head, seed, Path(args.runs) / f"{head.replace(':', '-')}-seed{seed}")
            for seed in args.seeds for head in args.heads]
    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(lambda job: train(args, *job, num_classes, least), jobs):
            pass

    results = {head: [read(folder) for h, _, folder in jobs if h == head] for head in args.heads}
    goal = 0.99 * statistics.mean(r["top1"] for r in results["full"]) if "full" in results else None
    table = {}
    for head, runs in results.items():
        top1 = [run["top1"] for run in runs]
        table[head] = {
            "mean": round(statistics.mean(top1), 4), "spread": round(max(top1) - min(top1), 4), "seeds": len(runs),
            "active": runs[0]["active"], "train_seconds": round(statistics.median(r["seconds"] for r in runs), 1),
            "to99": time_to(goal, runs)}
    print(f"{args.data}, {num_classes} classes, {' '.join(args.flags)}")
    print(f"{'head:budget':40} {'top-1':>8} {'spread':>8} {'active':>8} {'train s':>8} {'to 99 %':>8}")
    for head, row in table.items():
        print(f"{head:40} {row['mean']:8.4f} {row['spread']:8.4f} {row['active']:8} {row['train_seconds']:8} "
              f"{row['to99'] or '-':>8}")
    print(json.dumps({"data": args.data, "classes": num_classes}
                     | {f"top1.{head.replace(':', '.', 1)}": row for head, row in table.items()}))


def train(args, head, seed, folder, num_classes, least):
    """One run of train.py, unless its folder holds a finished one; its output goes beside the folder."""
    if finished(folder):
        return
    name, _, rest = head.partition(":")
    share, _, extra = rest.partition(":")
    flags = ["--data", args.data, "--out", folder, "--resume", "auto", "--head", name, "--seed", seed, *args.flags]
    if share:
        active = float(share) * num_classes if float(share) <= 1 else float(share)
        flags += ["--active-classes", min(num_classes, max(least, round(active)))]
    for setting in extra.split(",") if extra else ():
        flag, _, value = setting.partition("=")
        flags += [f"--{flag.replace('_', '-')}", value]
    launcher = ["mpirun", "--oversubscribe", "-np", args.ranks] if args.ranks > 1 else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(log_of(folder), "w") as log:
        subprocess.run([str(part) for part in (*launcher, sys.executable, "train.py", *flags)], cwd=ROOT, check=True,
                       stdout=log, stderr=subprocess.STDOUT)
    top1 = read(folder)["top1"]
    print(f"{head} seed {seed}: top-1 {top1:.4f}", file=sys.stderr, flush=True)


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_of(folder):
    return folder.with_name(folder.name + ".log")


def finished(folder):
    log = log_of(folder)
    return log.exists() and '"top1"' in log.read_text()


def read(folder):
    """Final top-1, active classes, seconds of training, and (seconds, top-1) of every evaluation of a finished run."""
    lines = [line for line in lines_of(folder) if "top1" in line]
    active = next((line["active"] for line in reversed(lines) if "active" in line), None)
    return {"top1": lines[-1]["top1"], "active": active, "seconds": lines[-1]["train_seconds"],
            "curve": [(line["train_seconds"], line["top1"]) for line in lines]}


def time_to(goal, runs):
    """Median over the runs of the seconds until an evaluation reached the goal; None where most never did."""
    if goal is None:
        return None
    times = sorted(next((s for s, top1 in run["curve"] if top1 >= goal), float("inf")) for run in runs)
    middle = times[len(times) // 2]
    return None if middle == float("inf") else round(middle, 1)


if __name__ == "__main__":
    main()
