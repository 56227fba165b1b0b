"""What a large pack costs a rank: time to open it and its memory while batches are taken, for each sampler.

    python benchmarks/pack_open.py SCRATCH [--records 10000000 --classes 1000000]

Every record is the same tiny PNG, of a class drawn at random and with a weight, so what shows is what grows with
records and classes. SCRATCH is a new folder, removed at the end. Each sampler has a process of its own, with one loader
thread; the pack is first put out of the page cache.

open_seconds    from a path to the splits of it
order_seconds   from the splits to a Loader, which then has the sampler's order
batch_ms        median of a batch of 64, decoded
cost_mb         most memory that the process had, less what it had before it opened the pack (its libraries)
"""

import argparse
import io
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import rss_mb
from data_tools.packing.class_table import ClassTable
from data_tools.packing.writer import PackWriter
from xc.comm.world import World
from xc.config import SAMPLERS, Config
from xc.data import loader as data

SIZE, BATCH, NUM_BATCHES = 8, 64, 200


def write_pack(folder, num_records, num_classes):
    file = io.BytesIO()
    Image.new("L", (SIZE, SIZE)).save(file, "PNG")
    image, numbers = file.getvalue(), np.random.default_rng(0)
    crc = zlib.crc32(image)
    writer = PackWriter(folder / "pack", 2**28, np.zeros(num_classes, np.int64), has_weights=True)
    for first in range(0, num_records, 2**16):
        for label in numbers.integers(num_classes, size=min(2**16, num_records - first)).tolist():
            writer.add(image, crc, label, weight=1 + label % 7)
    writer.end_shard()
    names = (b"%09d" % label for label in range(num_classes))
    writer.write_index(ClassTable(folder / "classes", names), source="made", seed=0, skipped=0)


def measure(pack, sampler):
    """{key: value} of this process."""
    torch.set_num_threads(1)
    for path in pack.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    cfg = Config(data=str(pack), out="-", image_size=SIZE, sampler=sampler, augment=0, loader_threads=1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, times = rss_mb(), [time.perf_counter()]
    train = data.open_splits(cfg)["train"]
    times.append(time.perf_counter())
    loader = data.Loader(train, cfg, World())
    times.append(time.perf_counter())
    queue = loader.train(0, BATCH * NUM_BATCHES, BATCH)
    while queue.take(1):
        times.append(time.perf_counter())
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10
    open_seconds, order_seconds, *batches = np.diff(times).tolist()
    return {"open_seconds": open_seconds, "order_seconds": order_seconds,
            "batch_ms": 1e3 * statistics.median(batches), "cost_mb": peak - before}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--records", type=int, default=10**7)
    parser.add_argument("--classes", type=int, default=10**6)
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    args = parser.parse_args()
    args.scratch.mkdir()
    try:
        write_pack(args.scratch, args.records, args.classes)
        os.sync()  # what is not on the disk yet cannot be put out of the cache
        values = {}
        for sampler in args.samplers:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
                values[sampler] = alone.submit(measure, args.scratch / "pack", sampler).result()
    finally:
        shutil.rmtree(args.scratch)
    print(f"{args.records:,} records in {args.classes:,} classes")
    for sampler, found in values.items():
        print(f"{sampler:12}" + "".join(f"{key:>16}{value:10.4g}" for key, value in found.items()))
    print(json.dumps({sampler: {key: round(value, 4) for key, value in found.items()}
                      for sampler, found in values.items()}))


if __name__ == "__main__":
    main()
