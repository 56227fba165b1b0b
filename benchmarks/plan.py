"""What train.py --plan predicts of a step, against what a step takes here: time, bytes sent, memory.

    python benchmarks/plan.py --ranks 1 2 4 8 --classes 10000 100000 1000000
    python benchmarks/plan.py --ranks 1 2 --classes 100000 --memory  memory of whole runs instead

The facts of the plan (flops, bandwidth, network, latency) are measured on all ranks at once, before each case: a square
product of matrices, a copy, an all-reduce of 8 MiB and one of 4 bytes. Ranks that share cores so have their part.

Each case runs real steps of train.py, on synthetic vectors, with a graph of random neighbours: looking up takes the
same time whatever it holds. Waiting for data is left out. For each case: predicted and measured milliseconds (median of
the steps, slowest rank), their ratio, and the same of MiB sent. With --memory: the plan's sum of parts, and the highest
resident memory of any rank less that of a process after its imports.

Keys: RANKS.CLASSES.HEAD.{predicted,measured}_ms, .ratio, .sent_ratio; with --memory .planned_mb, .peak_mb, .ratio.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.head_step import random_graph
from benchmarks.measure import median_step
from xc import config
from xc.comm.launch import run
from xc.comm.traffic import sent_all_reduce
from xc.comm.world import open_world
from xc.optim.schedule import Progress
from xc.plan.backbone_size import BackboneSize
from xc.plan.cluster import Cluster
from xc.plan.memory import MemoryPlan
from xc.plan.sent import Sent
from xc.plan.times import Times
from xc.plan.workload import Workload
from xc.run.metrics import Timer
from xc.train import setup
from xc.train.batches import StepBatches
from xc.train.step import train_step

ROOT = Path(__file__).parent.parent
WARM_UP = 3


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--heads", nargs="+", default=["full", "knn:0.1", "knn:0.01"], help="HEAD[:active classes]")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch-per-rank", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--found", help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="after --: further flags of train.py")
    args = parser.parse_args()
    if args.found:
        return run(lambda: measure_all(args))
    result = {}
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as folder:
            if args.memory:
                found = memory_of_runs(args, ranks, Path(folder))
            else:
                path = Path(folder) / "found.json"
                subprocess.run([*mpirun(ranks), __file__, *sys.argv[1:], "--found", path], check=True)
                found = json.loads(path.read_text())
        result |= {f"{ranks}.{name}": value for name, value in found.items()}
    for name, value in result.items():
        print(f"{name:44} {value:,.4g}")
    ratios = sorted(value for name, value in result.items() if name.endswith(".ratio"))
    print(f"predicted / measured: {ratios[0]:.2f} to {ratios[-1]:.2f}, {sum(abs(r - 1) <= 0.25 for r in ratios)} of "
          f"{len(ratios)} within 25 %")
    print(json.dumps({name: round(value, 4) for name, value in result.items()}))


def mpirun(ranks):
    return ["mpirun", "--oversubscribe", "-np", str(ranks), sys.executable]


def cases(args, ranks):
    """(name, Config) of each head and number of classes. A budget below two batches is raised to that."""
    for classes in args.classes:
        for head in args.heads:
            kind, _, share = head.partition(":")
            batch = args.batch_per_rank * ranks
            flags = ["--active-classes", str(max(2 * batch, round(float(share) * classes)))] if share else []
            if share and 2 * batch > classes:
                continue
            yield f"{classes}.{head}", config.parse([
                "--data", f"synth:classes={classes},dim=64,examples={max(1, 10**6 // classes)},test=100", "--out", "-",
                "--head", kind, *flags, "--feature-dim", str(args.dim), "--global-batch", str(batch), "--epochs", "1",
                *args.flags])


def measure_all(args):
    world, found = open_world("cpu"), {}
    for name, cfg in cases(args, world.size):
        cluster = facts(world)
        milliseconds, sent = measure(cfg, world, args.steps)
        classes = int(name.split(".")[0])
        work, backbone = Workload.of(cfg, classes, world.size), BackboneSize.of(cfg, (64,))
        times, planned = Times.of(work, backbone, cluster), Sent.of(work, backbone)
        predicted = 1e3 * sum(times.step.values())
        found |= {f"{name}.predicted_ms": predicted, f"{name}.measured_ms": milliseconds,
                  f"{name}.ratio": predicted / milliseconds}
        if world.size > 1:
            found[f"{name}.sent_ratio"] = planned.total / sent
        if world.rank == 0:
            phases = ", ".join(f"{phase} {1e3 * seconds:.1f}" for phase, seconds in times.step.items())
            print(f"{world.size} ranks, {name}: {milliseconds:.1f} ms, predicted {predicted:.1f} ({phases}); "
                  f"{cluster.flops:.3g} flop/s, {cluster.bandwidth:.3g} B/s, {8 * cluster.network:.3g} bit/s, "
                  f"{1e6 * cluster.latency:.0f} us", flush=True)
    if world.rank == 0:
        Path(args.found).write_text(json.dumps(found))


def facts(world):
    """The Cluster that these ranks are, each a host of its own. Collective."""
    a, source, target = torch.randn(1024, 1024), torch.zeros(2**24), torch.zeros(2**24)
    small, large = torch.zeros(1), torch.zeros(2**21)
    world.all_ranks.all_reduce(small)
    product, _ = median_step(lambda: a @ a, 7, warmup=1)
    copy, _ = median_step(lambda: target.copy_(source), 5, warmup=1)
    latency, _ = median_step(lambda: world.all_ranks.all_reduce(small), 30, warmup=3)
    reduce, _ = median_step(lambda: world.all_ranks.all_reduce(large), 5, warmup=1)
    mine = torch.tensor([product, copy, latency, reduce], dtype=torch.float64)
    product, copy, latency, reduce = world.all_ranks.all_reduce(mine).div_(world.size).tolist()
    network = 1e3 * sent_all_reduce(world.size, large.nbytes) / reduce if world.size > 1 else 1e12
    return Cluster(world.size, 1, 1e12, network, 1e3 * 2 * 1024**3 / product, 1e3 * 2 * source.nbytes / copy,
                   latency=latency / 1e3)


def measure(cfg, world, num_steps):
    """(milliseconds of a step, median, of the slowest rank; MiB that rank 0 sends in it). Collective."""
    cfg, splits, loader, schedule = setup.data(cfg, world)
    state, progress = setup.state(cfg, splits["train"], world), Progress()
    if cfg.head == "knn":
        state.head.graph = random_graph(state.head)
    batches = StepBatches(loader, progress, schedule, world)
    seconds, sent, timer = [], [], Timer()
    for _ in range(min(WARM_UP + num_steps, schedule.num_steps)):
        plan = schedule.plan(progress)
        state.head.refresh(plan.first_accumulation_step, due=cfg.head == "selective" and not progress.step)
        batch, labels = batches.take(plan.micro_batches)
        world.all_ranks.all_reduce(torch.zeros(1))
        world.traffic.sent.clear()
        start = time.perf_counter()
        train_step(state, batch, labels, plan, progress, schedule, cfg, timer)
        seconds.append(time.perf_counter() - start)
        sent.append(sum(world.traffic.sent.values()))
        progress = progress.after(plan)
        if progress.step == WARM_UP:
            timer = Timer()
    batches.close()
    phases = timer.take(len(seconds) - WARM_UP, 1)
    if world.rank == 0:
        print("  " + ", ".join(f"{name} {value:.1f}" for name, value in phases.items() if name.endswith("_ms")))
    mine = torch.tensor([1e3 * statistics.median(seconds[WARM_UP:])], dtype=torch.float64)
    return world.all_ranks.all_reduce(mine, "max").item(), statistics.median(sent[WARM_UP:])


def memory_of_runs(args, ranks, folder):
    """Of whole runs of train.py with a build of the graph, an evaluation and saves."""
    code = "import sys; sys.path.insert(0, '.'); import train; from benchmarks.measure import rss_mb; print(rss_mb())"
    idle = float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True,
                                text=True).stdout)
    found = {}
    for name, cfg in cases(args, ranks):
        out = folder / name.replace(":", "-")
        times = "--steps 12\n--graph-from 0\n--graph-every 4steps\n--save-every 6steps\n"
        (folder / "run.args").write_text(config.as_arguments(cfg) + f"--out {out}\n{times}")
        done = subprocess.run([*mpirun(ranks), "train.py", f"@{folder / 'run.args'}"], cwd=ROOT, check=True,
                              capture_output=True, text=True)
        peak = json.loads(done.stdout.splitlines()[-1])["peak_rss_mb"] - idle
        work, backbone = Workload.of(cfg, int(name.split(".")[0]), ranks), BackboneSize.of(cfg, (64,))
        planned = MemoryPlan.of(work, backbone).total / 2**20
        found |= {f"{name}.planned_mb": planned, f"{name}.peak_mb": peak, f"{name}.ratio": planned / peak}
    return found


if __name__ == "__main__":
    main()
