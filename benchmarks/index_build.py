"""Build time, memory and recall of each --type of xc.index: python benchmarks/index_build.py SCRATCH --rows 1000000

The rows are the prototypes of synthetic classes (xc/data/synthetic.py), which lie in clusters of clusters, scaled to
length 1. Printed are seconds and CPU seconds to train and fill the index, seconds of the exact search and the choice of
the search setting, that setting, recall@1 and @10, milliseconds of a query, bytes of a row in the file, and the highest
memory of rank 0 over that of an idle process. mpirun -np N shares the work of ivf and ivfpq. SCRATCH is a new folder,
and removed at the end.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch

# isort: split
import faiss

from benchmarks.measure import cpu_seconds, report, rss_mb
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.data.synthetic import Spec, SyntheticSplit
from xc.run.metrics import peak_rss_mb
from xc.use.index_build import build_index
from xc.use.index_recall import measured
from xc.use.index_types import TYPES, search
from xc.use.vectors import FeatureRows, take

_BLOCK = 2**14
_QUERIES = 1000


def write_rows(path, count, width):
    """A file of the rows (N, D)."""
    split = SyntheticSplit(Spec.parse(f"synth:classes={count},dim={width}"), (width,), count, 0)
    with open(path, "wb") as file:
        for first in range(0, count, _BLOCK):
            rows = split.prototypes(np.arange(first, min(first + _BLOCK, count)))
            file.write(np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), "<f4"))


def measure(kind, vectors, folder, target, world):
    """{name: value} of one type; the numbers are those of rank 0. Collective."""
    idle, cpu, begin = rss_mb(), cpu_seconds(), time.perf_counter()
    index = build_index(vectors, kind, 0, str(folder), world)
    built, cpu = time.perf_counter(), cpu_seconds() - cpu
    facts = measured(index, vectors, target, 0, world)
    values = {"build_seconds": built - begin, "build_cpu_seconds": cpu, "measure_seconds": time.perf_counter() - built,
              "recall_at_1": facts["recall_at_1"], "recall_at_10": facts["recall_at_10"],
              "search": facts["search"], "peak_mb": peak_rss_mb() - idle}
    if index is not None:
        queries = take(vectors, np.arange(0, vectors.count, max(1, vectors.count // _QUERIES)))
        begin = time.perf_counter()
        search(index, queries, 10)
        values["query_ms"] = 1e3 * (time.perf_counter() - begin) / len(queries)
        faiss.write_index(index, str(folder / "index"))
        values["bytes_of_row"] = (folder / "index").stat().st_size / vectors.count
    return values


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--type", default="ivf", help=f"{', '.join(TYPES)}, or a factory string")
    parser.add_argument("--target-recall", type=float, default=0.95)
    args = parser.parse_args()
    world = open_world("cpu")
    torch.set_num_threads(1)
    if world.rank == 0:
        args.scratch.mkdir()
        write_rows(args.scratch / "rows", args.rows, args.dim)
    world.all_ranks.all_gather_object(None)
    try:
        vectors = FeatureRows(args.scratch / "rows", args.rows, args.dim)
        values = measure(args.type, vectors, args.scratch, args.target_recall, world)
    finally:
        if world.rank == 0:
            shutil.rmtree(args.scratch)
    if world.rank == 0:
        report(f"--type {args.type}, {args.rows:,} rows × {args.dim}, {world.size} ranks",
               {"type": args.type, "rows": args.rows, "dim": args.dim, "ranks": world.size, **values})


if __name__ == "__main__":
    run(main)
