"""How many updates FCCS saves: until it is as accurate as tuned SGD with a fixed batch. Every run is one train.py.

    python benchmarks/convergence.py --data glyphs --runs runs/convergence-glyphs --plot glyphs.png

    --data    glyphs (data/glyphs.pack, which `make train` makes), omniglot (data/omniglot.pack, see docs/results.md)
              or synth, 100,000 synthetic classes
    --heads   as in softmax_table.py: full knn:0.1
    --arms    of ARMS, beside the baseline; --extra, of those that one seed is enough for
    --seeds   of the baseline and of the arms with the first head; the first one is tuned with
    --others  seeds with the other heads
    --jobs    runs at a time
    --rate    last of all, wall time: baseline and fccs, two ranks on two hosts joined by a link of that rate (root);
              run in the repository's root

The baseline is SGD with momentum at a fixed batch, with the better of decay by steps and cosine and of a few learning
rates, by the final top-1 of one seed with the first head. The goal is its mean final top-1 less 0.2 points. An arm's
updates are those until an evaluation first reached the goal; `updates_saved`, their share less of the updates of a
baseline run, is 0 where that never was: medians over the seeds. Every arm sees as many examples as the baseline. Runs
that are in the --runs folder are not done again.
"""

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.hosts import Hosts
from benchmarks.softmax_table import ROOT, finished, lines_of, log_of, read, train
from xc import config
from xc.data import loader as data

# Of every set: flags of all runs; the baseline's batch, and the rates (backbone, class rows) that it is tried with.
SETS = {
    "glyphs": {"data": "data/glyphs.pack", "flags": "epochs=12,eval_every=1epochs", "batch": 128,
               "rates": ((0.05, 4), (0.01, 4))},
    "omniglot": {"data": "data/omniglot.pack", "flags": "epochs=15,eval_every=1epochs", "batch": 128,
                 "rates": ((0.05, 4), (0.02, 4))},
    "synth": {"data": "synth:classes=100000,examples=8,test=5000", "batch": 256, "schedules": ("cosine",),
              "flags": "epochs=1,warmup=10%,eval_every=5%,feature_dim=64,graph_every=12.5%",
              "rates": ((0.05, 6), (0.1, 12), (0.2, 24))},
}
# What an arm multiplies the batch by, and the rates, and other flags; {4} is four times the baseline's batch. With LARS
# the backbone's rate is one of its own. `small` is for heads whose budget is for the examples of a round: it begins
# with the baseline's batch, or that budget would be divided among twice as many.
_LARS, _FCCS = "optimizer=lars,lr=5", "schedule=fccs,max_batch={4},hold=20%,tail=50%"
ARMS = {
    "large": (4, 4, "schedule=cosine"),
    "lars": (2, 2, f"schedule=cosine,{_LARS}"),
    "fccs": (2, 2, f"{_FCCS},{_LARS}"),
    "small": (1, 2, f"schedule=fccs,max_batch={{4}},growth=30%,tail=50%,{_LARS}"),
    "auto": (2, 2, f"{_FCCS},{_LARS},fccs=auto,micro_batches=2"),
}
GRID = ("cosine", "step")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, choices=SETS)
    parser.add_argument("--runs", required=True, type=Path)
    parser.add_argument("--heads", nargs="+", default=["full", "knn:0.1"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["fccs"])
    parser.add_argument("--extra", nargs="*", choices=ARMS, default=["large", "lars", "auto"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--others", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--plot")
    parser.add_argument("--rate")
    args = parser.parse_args()
    of_set = SETS[args.data]
    if not of_set["data"].startswith("synth:") and not (ROOT / of_set["data"]).exists():
        raise SystemExit(f"error: {of_set['data']} is not there: docs/results.md, FCCS, says how to make it")
    runs = Runs(args, of_set)

    schedule, rate = runs.tuned(args.heads[0])
    results = {}
    for head in args.heads:
        seeds, extra = (args.seeds, args.extra) if head == args.heads[0] else (args.others, [])
        arms = {"baseline": seeds} | {arm: seeds for arm in args.arms} | {arm: seeds[:1] for arm in extra}
        found = runs.all([(head, arm, schedule, rate, seed) for arm, seeds in arms.items() for seed in seeds])
        results[head] = {arm: [found[head, arm, schedule, rate, seed] for seed in seeds] for arm, seeds in arms.items()}
    table = {head: {arm: summary(of_arms["baseline"], of_arm) for arm, of_arm in of_arms.items()}
             for head, of_arms in results.items()}

    print(f"{args.data}: baseline {schedule}, rates {rate}, batch {of_set['batch']}, {of_set['flags']}")
    columns = ("top1", "spread", "seeds", "updates", "updates_saved", "to_goal")
    print(f"{'head':10} {'arm':10}" + "".join(f"{name:>14}" for name in columns))
    for head, arms in table.items():
        for arm, row in arms.items():
            print(f"{head:10} {arm:10}" + "".join(f"{row[column]!s:>14}" for column in columns))
    if args.plot:
        draw(results, args)
    wall = runs.wall_time(schedule, rate) if args.rate else {}
    print(json.dumps({"data": args.data, "baseline": f"{schedule} {rate}",
                      "updates_saved": {head: arms[args.arms[0]]["updates_saved"] for head, arms in table.items()},
                      "top1": {head: arms[args.arms[0]]["top1"] for head, arms in table.items()},
                      "table": table} | wall))


class Runs:
    def __init__(self, args, of_set):
        self.args, self.set = args, of_set
        cfg = config.parse(["--data", of_set["data"], "--out", "unused"])
        self.num_classes = data.open_splits(cfg)["train"].num_classes

    def tuned(self, head):
        """(schedule, rates) of the baseline that ends best."""
        grid = [(head, "baseline", schedule, rates, self.args.seeds[0])
                for schedule in self.set.get("schedules", GRID) for rates in self.set["rates"]]
        found = self.all(grid)
        for (_, _, schedule, rates, _), run in found.items():
            print(f"baseline {schedule:7} {rates!s:12} top-1 {run['top1']:.4f}", file=sys.stderr)
        best = max(found, key=lambda key: found[key]["top1"])
        return best[2:4]

    def all(self, keys):
        """{key: run} of keys (head, arm, schedule, rates, seed), as `read` gives them; done where they are not yet."""
        with ThreadPoolExecutor(self.args.jobs) as pool:
            return dict(zip(keys, pool.map(self.one, keys), strict=True))

    def one(self, key):
        head, arm, schedule, rates, seed = key
        name = arm if arm != "baseline" else f"{schedule}-{rates[0]}-{rates[1]}"
        folder = self.args.runs / f"{head.replace(':', '-')}-{name}-seed{seed}"
        if not finished(folder):
            table = argparse.Namespace(data=self.set["data"], flags=[], ranks=1)
            name, _, budget = head.partition(":")
            flags = ",".join(f"{flag}={value}" for flag, value in self.flags(arm, schedule, rates).items())
            train(table, f"{name}:{budget}:{flags}", seed, folder, self.num_classes, 2 * self.set["batch"])
        return read(folder) | {"updates": [(line["step"], line["top1"]) for line in lines_of(folder) if "top1" in line]}

    def flags(self, arm, schedule, rates):
        """{flag: value} of a run."""
        times_batch, times, more = ARMS.get(arm, (1, 1, f"schedule={schedule}"))
        flags = {"optimizer": "sgd", "scale": 20, "weight_decay": 5e-4, "warmup": "0.5epochs", "lr": times * rates[0],
                 "global_batch": times_batch * self.set["batch"], "save_every": 0, "log_steps": 20}
        for text in self.set["flags"], more.replace("{4}", str(4 * self.set["batch"])):
            flags |= dict(flag.split("=") for flag in text.split(","))
        return flags | {"head_lr_scale": times * rates[1] / float(flags["lr"])}

    def wall_time(self, schedule, rates):
        """Seconds of training of the baseline and of fccs, full softmax, on two hosts: of a run, and until the
        baseline's final top-1 less 0.2 points was reached."""
        seconds, goal = {}, None
        with Hosts(2, self.args.rate) as hosts:
            for arm in "baseline", "fccs":
                folder = (self.args.runs / f"{self.args.rate}-{arm}").resolve()
                if not finished(folder):
                    flags = {"data": self.set["data"], "out": folder} | self.flags(arm, schedule, rates)
                    words = [word for flag, value in flags.items() for word in (f"--{flag.replace('_', '-')}", value)]
                    with open(log_of(folder), "w") as log:
                        hosts.mpirun(1, [sys.executable, "train.py", *words], stdout=log)
                run = read(folder)
                goal = goal or run["top1"] - 0.002
                seconds[f"{self.args.rate}.{arm}.seconds"] = run["seconds"]
                seconds[f"{self.args.rate}.{arm}.to_goal"] = next((s for s, top1 in run["curve"] if top1 >= goal), None)
        return seconds


def summary(baseline, arm):
    """A row of the table: of runs of the baseline and of an arm, one for each seed."""
    goal = statistics.mean(run["top1"] for run in baseline) - 0.002
    updates = statistics.median(run["updates"][-1][0] for run in baseline)
    reached = [next((step for step, top1 in run["updates"] if top1 >= goal), None) for run in arm]
    saved = statistics.median(1 - step / updates if step else 0.0 for step in reached)
    top1 = [run["top1"] for run in arm]
    return {"top1": round(statistics.mean(top1), 4), "spread": round(max(top1) - min(top1), 4), "seeds": len(arm),
            "goal": round(goal, 4), "updates": statistics.median(run["updates"][-1][0] for run in arm),
            "to_goal": reached, "updates_saved": round(saved, 3)}


def draw(results, args):
    """Top-1 of the first seed over updates, a panel for each head."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(results), 4.5), layout="constrained")
    for axes, (head, arms) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        for arm, runs in arms.items():
            axes.plot(*zip(*runs[0]["updates"], strict=True), label=arm)
        goal = summary(arms["baseline"], arms["baseline"])["goal"]
        axes.axhline(goal, color="grey", linestyle=":", label="goal")
        axes.set(title=f"{args.data}, {head}", xlabel="updates", ylabel="top-1", ylim=(goal - 0.25, goal + 0.05))
        axes.legend()
    figure.savefig(args.plot)


if __name__ == "__main__":
    main()
