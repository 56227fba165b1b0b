"""Time and recall of the KNN graph: exact and approximate build.

    mpirun -np 2 python benchmarks/graph_build.py --exact 50000 --approx 1000000
    mpirun -np 2 python benchmarks/graph_build.py --exact 50000 --approx 100000000 --dim 32 --neighbors 8 \\
        --cosine 0.95 --row-dtype bfloat16 --moved 0

exact_seconds    an exact build of --exact classes
gemm_share       time of that build's GEMM alone, at the speed measured right before and after, over exact_seconds
approx_seconds   an approximate build of --approx classes
speedup          what an exact build of --approx classes would take at the rate of the one measured, over approx_seconds
again_seconds    the next build, after 5 % of the rows turned by 0.3 radians and all others by 0.02; not if --moved is 0
cells_kept       1 where that build kept the cells of the one before
…_cpu_seconds    of the busiest rank, for machines on which others compute too
…_recall         on sampled rows; …_probes: cells searched for a row
…_mb             the highest memory of a build beyond rows and graph, of all ranks together
bytes_per_class  of the graph that a rank keeps, per class of all

Rows are clustered, as those of trained classes are: 50 classes on average round a centre, 40 centres round a centre of
their own; cosines of 0.61 within a cluster (--cosine), 0.22 between those of one parent. Clusters lie scattered over
the shards. Of 10^6 random rows x 128 the nearest to a row has a cosine of 0.40. Of 10^8 rows x 32 it has 0.80: there,
0.87 sets clusters apart as much (the angles have the same ratio).
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

from benchmarks.measure import report, reset_peak, rss_mb
from xc.comm.launch import run
from xc.comm.shard import Shard
from xc.comm.world import open_world
from xc.errors import UserError
from xc.knn.build import build
from xc.run.metrics import peak_rss_mb

BLOCK = 2**17  # rows that are made at a time


def trained_like(num_classes, dim, shard, cosine, dtype):
    """Class rows (S, D), made in blocks: nothing else of that size is held."""
    noise = (1 / cosine - 1) ** 0.5
    generator = torch.Generator().manual_seed(0)  # centres: the same on every rank
    parents = unit_noise(1 + num_classes // 2000, dim, generator)
    centres = unit_noise(1 + num_classes // 50, dim, generator) * 0.8
    centres += 0.6 * parents[torch.randint(len(parents), (len(centres),), generator=generator)]
    centres = F.normalize(centres)
    generator.manual_seed(1 + shard.first)
    rows = torch.empty(len(shard), dim, dtype=dtype)
    for block in rows.split(BLOCK):
        cluster = torch.randint(len(centres), (len(block),), generator=generator)
        block.copy_(centres[cluster] + noise * unit_noise(*block.shape, generator))
    return rows


def unit_noise(num_rows, dim, generator):
    return F.normalize(torch.randn(num_rows, dim, generator=generator))


def turn(rows, share, shard):
    """Change the rows as if training went on: a share turns by 0.3 radians, the others by 0.02."""
    generator = torch.Generator().manual_seed(2 + shard.first)
    for block in rows.split(BLOCK):
        far = torch.rand(len(block), 1, generator=generator) < share
        step = unit_noise(*block.shape, generator) * torch.where(far, 0.3, 0.02)
        block += (step * block.float().norm(dim=1, keepdim=True)).to(block.dtype)


def gemm_seconds(dim, world):
    """Time of a multiply-add of a rank in a large float32 GEMM while all ranks compute; of the slowest rank."""
    left, right = torch.ones(4096, dim), torch.ones(4096, dim)
    out = left @ right.T
    world.all_ranks.all_reduce(torch.zeros(1))
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < 2:
        torch.mm(left, right.T, out=out)
        done += 1
    seconds = torch.tensor([(time.perf_counter() - start) / (done * 4096**2 * dim)], dtype=torch.float64)
    return world.all_ranks.all_reduce(seconds, "max").item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exact", type=int, default=50_000, help="classes of the exact build")
    parser.add_argument("--approx", type=int, default=0, help="classes of the approximate build; 0: none")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--neighbors", type=int, default=16)
    parser.add_argument("--moved", type=float, default=0.05,
                        help="share of rows that turn far before a second build; 0: no such build")
    parser.add_argument("--cosine", type=float, default=0.61, help="of rows of the same cluster, on average")
    parser.add_argument("--row-dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    if min(args.exact, args.dim) < 1 or args.approx < 0 or not 0 <= args.moved <= 1 or not 0 < args.cosine <= 1:
        raise UserError("--exact and --dim must be at least 1, --approx at least 0, --moved a share, --cosine above 0 "
                        "and at most 1")

    world = open_world("cpu")
    group = world.shards
    dim, neighbors = args.dim, args.neighbors
    shard = Shard.of(args.exact, group.size, group.rank)
    dtype = getattr(torch, args.row_dtype)
    rows = trained_like(args.exact, dim, shard, args.cosine, dtype)
    before = gemm_seconds(dim, world)
    _, stats = build(rows, shard, args.exact, neighbors, group, "exact")
    gemm = args.exact**2 * dim / group.size * (before + gemm_seconds(dim, world)) / 2
    seconds = stats["graph_seconds"]
    values = {"exact_classes": args.exact, "dim": dim, "neighbors": neighbors, "ranks": world.size,
              "exact_seconds": seconds, "gemm_share": gemm / seconds}
    if args.approx:
        shard = Shard.of(args.approx, group.size, group.rank)
        rows, cells = trained_like(args.approx, dim, shard, args.cosine, dtype), None
        values |= {"approx_classes": args.approx}
        for name in ("approx", "again") if args.moved else ("approx",):
            if name == "again":
                turn(rows, args.moved, shard)
            reset_peak()
            idle, before = rss_mb(), time.process_time()
            graph, stats = build(rows, shard, args.approx, neighbors, group, "approx", cells=cells)
            cpu = torch.tensor([time.process_time() - before])
            used = torch.tensor([peak_rss_mb() - idle - graph.bytes_per_class * args.approx / 2**20])
            values |= {f"{name}_seconds": stats["graph_seconds"], f"{name}_recall": stats["graph_recall"],
                       f"{name}_cpu_seconds": world.all_ranks.all_reduce(cpu, "max").item(),
                       f"{name}_probes": stats["graph_probes"], f"{name}_mb": world.all_ranks.all_reduce(used).item()}
            cells = graph.cells
            del graph
        values |= {"cells_kept": stats["graph_cells_kept"]} if args.moved else {}
        values |= {"speedup": seconds * (args.approx / args.exact) ** 2 / values["approx_seconds"]}
    values |= {"bytes_per_class": stats["graph_bytes_per_class"]}
    if world.rank == 0:
        report(f"KNN graph, {world.size} ranks", values)


if __name__ == "__main__":
    run(main)
