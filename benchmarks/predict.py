"""Images per second of xc.predict, beside its loader and backbone alone: python benchmarks/predict.py SCRATCH

A run of --classes classes with --backbone trains for one step on patterns of 32 × 32 pixels, in one pack of --images
records. Both arms take that pack in one process with one loader thread; they take turns.

bare     the Loader's test batches of 64 images through the backbone, and nothing else
predict  all that xc.predict does after its start, from the first image to the renamed Parquet file: the same images,
         scores and probabilities over all classes, names, rows

For each arm: images per second and CPU seconds per 1,000 images, medians of --repeats. Ratios are predict over bare in
images per second, and bare over predict in CPU seconds: 1 is no cost. SCRATCH is a new folder; it is removed.
"""

import argparse
import io
import shutil
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.measure import cpu_seconds, report
from data_tools.packing.class_table import ClassTable
from data_tools.packing.writer import PackWriter
from xc import predict
from xc.comm.world import World
from xc.data.loader import Loader, open_splits
from xc.use.job import Job
from xc.use.trained import open_run


def write_pack(folder, num_classes, num_images):
    """A pack of random patterns; class i of C is that of every C-th image."""
    random, writer = np.random.default_rng(0), PackWriter(str(folder), 2**28, np.zeros(num_classes, np.int64))
    for i in range(num_images):
        pixels = random.integers(0, 256, (8, 8), np.uint8).repeat(4, 0).repeat(4, 1)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        writer.add(buffer.getvalue(), zlib.crc32(buffer.getvalue()), i % num_classes)
    writer.end_shard()
    table = ClassTable(f"{folder}.classes", (f"item {i:08d}".encode() for i in range(num_classes)))
    writer.write_index(table, source="patterns", seed=0, skipped=0)
    shutil.rmtree(f"{folder}.classes")


@torch.no_grad()
def bare(run):
    """Load all images and compute their features."""
    trained, world = open_run(run, "", World()), World()
    begin = time.perf_counter(), cpu_seconds()
    loader = Loader(open_splits(trained.cfg)["train"], trained.cfg, world)
    for images, _ in loader.test(64):
        trained.backbone(images)
    return time.perf_counter() - begin[0], cpu_seconds() - begin[1]


def predicted(run, pack, out):
    """The body of xc.predict."""
    world = World()
    args = predict.parser().parse_args([str(run), str(pack), "--out", str(out), "--device", "cpu"])
    job = Job(args, (".parquet",), world)
    begin = time.perf_counter(), cpu_seconds()
    predict.write(job, job.trained.class_table(""), world)
    seconds = time.perf_counter() - begin[0], cpu_seconds() - begin[1]
    out.unlink()
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--classes", type=int, default=10000)
    parser.add_argument("--images", type=int, default=20000)
    parser.add_argument("--backbone", default="small")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.scratch.mkdir()
    try:
        pack, run, runs = args.scratch / "pack", args.scratch / "run", {"bare": [], "predict": []}
        write_pack(pack, args.classes, args.images)
        subprocess.run([sys.executable, "train.py", "--data", pack.absolute(), "--out", run.absolute(), "--steps", "1",
                        "--global-batch", "8", "--backbone", args.backbone, "--device", "cpu"],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in tqdm(range(args.repeats), "rounds", disable=not sys.stderr.isatty()):
            runs["bare"].append(bare(run))
            runs["predict"].append(predicted(run, pack, args.scratch / "out.parquet"))
    finally:
        shutil.rmtree(args.scratch)
    values = {"backbone": args.backbone, "classes": args.classes, "images": args.images, "repeats": args.repeats}
    for arm, found in runs.items():
        values[f"{arm}_per_second"] = args.images / statistics.median(wall for wall, _ in found)
        values[f"{arm}_cpu_seconds"] = 1e3 * statistics.median(cpu for _, cpu in found) / args.images
    values["predict_over_bare"] = values["predict_per_second"] / values["bare_per_second"]
    values["bare_cpu_of_predict"] = values["bare_cpu_seconds"] / values["predict_cpu_seconds"]
    report("xc.predict beside loader and backbone", values)


if __name__ == "__main__":
    main()
