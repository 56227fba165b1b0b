"""Time and memory of one step of a classifier head: selection, forward, backward and row update, without a backbone.

    mpirun -np 2 python benchmarks/head_step.py --head full --classes 1000000 --dim 128 --batch-per-rank 64
    mpirun -np 2 python benchmarks/head_step.py --head knn --classes 1000000 --active-ratio 0.1

step_ms            median wall time of a step, of the slowest rank
cpu_ms             median CPU time of a step, of the busiest rank
peak_over_idle_mb  highest resident memory less that before the head was made, of the hungriest rank
resident_mb        resident memory after the steps less that before the head was made, of the same
kept_mb            of it: class rows, their momentum and the graph, of the hungriest rank
roofline_ms        the step's three GEMMs at the speed of such a GEMM, and its rows, their momentum and their gradients
                   read and written once at the speed of a copy, both measured in this run
active             classes that take part in a step, over all ranks
loss               of the first step, to compare runs by

Labels are other ones in every step. The KNN graph is a stand-in, K random neighbours of every class, and selective's
index is one of random rows: looking up takes the same time whatever they hold.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.measure import median_step, report, rss_mb
from xc.comm.launch import run
from xc.comm.shard import Shard
from xc.comm.world import open_world
from xc.config import SELECTS, Config
from xc.errors import UserError
from xc.knn.graph import EdgeTable, place_type
from xc.model.head_table import HEADS, head_class
from xc.optim.optimizers import RowSGD
from xc.run.metrics import peak_rss_mb


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=HEADS, default="full")
    parser.add_argument("--select", choices=SELECTS, default="scores", help="of --head knn")
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch-per-rank", type=int, default=64)
    parser.add_argument("--active-ratio", type=float, default=0.1, help="of the classes; not heeded by --head full")
    parser.add_argument("--active", type=int, default=0, help="the same as a number of classes")
    parser.add_argument("--logits-mb", type=float, default=0.0, help="memory for logits in MiB; 0: as train.py")
    parser.add_argument("--head-momentum", type=float, default=0.9, help="0.9: as the peers; train.py's default is 0")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    if min(args.classes, args.dim, args.batch_per_rank, args.repeats) < 1:
        raise UserError("--classes, --dim, --batch-per-rank and --repeats must be at least 1")
    world = open_world("cpu")
    result = measure(args, world)
    if world.rank == 0:
        report(f"{args.head} head, {args.classes:,} classes, {world.size} ranks", result)


def measure(args, world):
    """Results by name, the same on every rank. Collective."""
    global_batch = args.batch_per_rank * world.size
    generator = torch.Generator().manual_seed(1000 + world.rank)  # the class rows begin with seed 0
    features = torch.randn(args.batch_per_rank, args.dim, generator=generator).requires_grad_()
    features @ features.T  # the GEMM library's own buffers are not the head's
    idle = rss_mb()

    cfg = Config(data="-", out="-", head=args.head, select=args.select, feature_dim=args.dim, global_batch=global_batch,
                 active_classes=float(args.active or args.active_ratio))
    kind = head_class(cfg)
    head = kind(args.classes, args.dim, world, logits_mb=args.logits_mb, **kind.settings(cfg, args.classes))
    optimizer = RowSGD(head, args.head_momentum)
    optimizer.param_groups[0]["lr"] = 0.1
    kept = head.weight.nbytes + optimizer.momentum_rows.nbytes
    if args.head == "knn":
        head.graph = random_graph(head)
        kept += head.graph.bytes_per_class * args.classes
    elif args.head == "selective":
        head.refresh(1, due=True)
    losses, actives = [], []

    def step():
        labels = torch.randint(args.classes, (args.batch_per_rank,), generator=generator)
        head.select(labels, len(losses))
        loss = head(features, labels, global_batch)
        loss.backward()
        head.reduce()
        optimizer.step()
        actives.append(head.num_active)
        head.zero_grad()
        features.grad = None
        losses.append(loss.item())

    times = median_step(step, args.repeats, warmup=3)
    mine = torch.tensor([*times, peak_rss_mb() - idle, rss_mb() - idle, kept / 2**20,
                         roofline_ms(actives[-1], global_batch, args)])
    step_ms, cpu_ms, peak, resident, kept, roofline = world.all_ranks.all_reduce(mine, "max").tolist()
    active = world.shards.all_reduce(torch.tensor(actives[-1])).item()
    return {"head": args.head, "select": args.select, "classes": args.classes, "dim": args.dim,
            "batch_per_rank": args.batch_per_rank,
            "ranks": world.size, "step_ms": step_ms, "cpu_ms": cpu_ms, "roofline_ms": roofline,
            "times_roofline": step_ms / roofline, "active": active, "peak_over_idle_mb": peak,
            "resident_mb": resident, "kept_mb": kept,
            "neighbors": getattr(head, "num_neighbors", 0), "head_momentum": args.head_momentum, "loss": losses[0]}


def random_graph(head):
    """A graph of random neighbours and places, as large and as quick to look up as any: each class has its near-equal
    part of the K neighbours in every shard."""
    group, K = head.world.shards, head.num_neighbors
    here = len(Shard.of(K, group.size, group.rank))
    places = torch.arange(group.rank, K, group.size)[:here].to(place_type(K))
    table = EdgeTable(head.shard, head.num_classes, K, [here * head.num_classes], "cpu")
    for classes in torch.arange(head.num_classes).split(2**16):
        neighbors = torch.randint(len(head.shard), (len(classes) * here,), dtype=torch.int32)
        table.add(0, classes.repeat_interleave(here), neighbors, places.repeat(len(classes)))
    return table.graph()


def roofline_ms(rows, global_batch, args):
    """What a rank's share of a step must take: see above. Logits are not counted: they need not leave the cache."""
    some = torch.randn(min(rows, 2048), args.dim)
    batch = torch.randn(global_batch, args.dim)
    gemm_ms, _ = median_step(lambda: batch @ some.T, 25, warmup=3)
    source, target = torch.zeros(2**24), torch.zeros(2**24)
    copy_ms, _ = median_step(lambda: target.copy_(source), 5, warmup=1)
    row_bytes = rows * args.dim * 4
    passes = 2 + 2 * (args.head_momentum > 0) + 2  # rows, momentum and gradients: one read and one write of each
    return 3 * gemm_ms * rows / len(some) + copy_ms * passes * row_bytes / (2 * source.nbytes)


if __name__ == "__main__":
    run(main)
