"""Size, time and memory of a report over many classes: python benchmarks/report.py SCRATCH

A pack train has one image of each of --classes classes, 16 × 16 pixels of noise; a pack val has --examples of 96 × 96,
the largest that a page shows as they are. A run takes ten steps on train; nearly all of its answers are wrong, so the
page has all that it can have. Then xc.report runs in a process of its own. Values: its seconds, CPU seconds, peak
memory, and bytes of the page. SCRATCH is a new folder; it is removed.
"""

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
from PIL import Image

from benchmarks.measure import report
from data_tools.packing.class_table import ClassTable
from data_tools.packing.writer import PackWriter

_IMAGES = 1000  # different ones of a pack


def write_pack(folder, num_classes, labels, side, kind):
    """A pack of coloured noise with these labels."""
    random, images = np.random.default_rng(side), []
    for _ in range(_IMAGES):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (side, side, 3), np.uint8)).save(file, kind)
        images.append((file.getvalue(), zlib.crc32(file.getvalue())))
    writer = PackWriter(str(folder), 2**28, np.zeros(num_classes, np.int64))
    for place, label in enumerate(labels):
        image, crc32 = images[place % _IMAGES]
        writer.add(image, crc32, label)
    writer.end_shard()
    table = ClassTable(f"{folder}.classes", (f"item {i:08d}".encode() for i in range(num_classes)))
    writer.write_index(table, source="noise", seed=0, skipped=0)
    shutil.rmtree(f"{folder}.classes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--classes", type=int, default=10**6)
    parser.add_argument("--examples", type=int, default=20000)
    args = parser.parse_args()
    args.scratch.mkdir()
    try:
        packs, run, out = (args.scratch.absolute() / name for name in ("packs", "run", "report.html"))
        packs.mkdir()
        write_pack(packs / "train", args.classes, range(args.classes), 16, "png")
        labels = np.random.default_rng(0).integers(args.classes, size=args.examples)
        write_pack(packs / "val", args.classes, labels.tolist(), 96, "jpeg")
        # Without val nothing is evaluated at its end, which would take as long as the report.
        subprocess.run([sys.executable, "train.py", "--data", packs / "train", "--out", run, "--steps", "10", "--head",
                        "sampled", "--active-classes", "0.01", "--channels", "3", "--device", "cpu", "--warmup", "0",
                        "--global-batch", "32"],
                       cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "xc.report", run, "--data", packs, "--out", out, "--device", "cpu", "--examples",
             str(args.examples)], cwd=ROOT, stdout=subprocess.PIPE)
        result = json.loads(process.stdout.read().splitlines()[-1])
        _, status, used = os.wait4(process.pid, 0)
        assert status == 0, status
        values = {"classes": args.classes, "examples": result["examples"][0],
                  "seconds": time.perf_counter() - begin, "cpu_seconds": used.ru_utime + used.ru_stime,
                  "peak_rss_mb": used.ru_maxrss / 2**10, "page_bytes": result["bytes"],
                  "pictures": out.read_bytes().count(b"<img ")}
    finally:
        shutil.rmtree(args.scratch)
    report("xc.report", values)


if __name__ == "__main__":
    main()
