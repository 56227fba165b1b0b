"""Time and memory of one step of a classifier head: forward, backward and row update, without a backbone.

    mpirun -np 2 python benchmarks/head_step.py --head full --classes 1000000 --dim 128 --batch-per-rank 64

step_ms            median wall time of a step, of the slowest rank
cpu_ms             median CPU time of a step, of the busiest rank
peak_over_idle_mb  highest resident memory less that before the head was made, of the hungriest rank
loss               of the first step, to compare runs by
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.measure import median_step, report, rss_mb
from xc.config import UserError
from xc.heads import HEADS
from xc.metrics import peak_rss_mb
from xc.optim import RowSGD
from xc.world import open_world, run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=HEADS, default="full")
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch-per-rank", type=int, default=64)
    parser.add_argument("--logits-mb", type=float, default=0.0, help="as of train.py")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    if min(args.classes, args.dim, args.batch_per_rank, args.repeats) < 1:
        raise UserError("--classes, --dim, --batch-per-rank and --repeats must be at least 1")
    world = open_world("cpu")
    generator = torch.Generator().manual_seed(1000 + world.rank)  # the class rows begin with seed 0
    features = torch.randn(args.batch_per_rank, args.dim, generator=generator).requires_grad_()
    labels = torch.randint(args.classes, (args.batch_per_rank,), generator=generator)
    features @ features.T  # the GEMM library's own buffers are not the head's
    idle = rss_mb()

    head = HEADS[args.head](args.classes, args.dim, world, logits_mb=args.logits_mb)
    optimizer = RowSGD(head, momentum=0.9, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = 0.1
    losses = []

    def step():
        loss = head(features, labels, args.batch_per_rank * world.size)
        loss.backward()
        head.reduce()
        optimizer.step()
        head.zero_grad()
        features.grad = None
        losses.append(loss.item())

    mine = torch.tensor([*median_step(step, args.repeats, warmup=2), peak_rss_mb() - idle])
    step_ms, cpu_ms, peak = world.everyone.all_reduce(mine, "max").tolist()
    if world.rank == 0:
        report(f"{args.head} head, {args.classes:,} classes, {world.size} ranks", {
            "head": args.head, "classes": args.classes, "dim": args.dim, "batch_per_rank": args.batch_per_rank,
            "ranks": world.size, "step_ms": step_ms, "cpu_ms": cpu_ms, "peak_over_idle_mb": peak, "loss": losses[0]})


if __name__ == "__main__":
    run(main)
