"""Time and memory of a class table with very many names, through packing, training and prediction.

    python benchmarks/class_names.py --classes 100000000

A pack of a few tiny images gets a table of so many names. Then a second pack takes that table over (--classes), a run
trains two steps on it and evaluates, and `xc.predict` names the best classes of some images. Each is a process of its
own.

Keys: STAGE.seconds; STAGE.own_mb, the highest memory of the process's own (RssAnon), looked at fifty times a second;
and train.rows_mb, the class rows in it.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.watch_run import own_mb
from data_tools.packing.class_table import ClassTable
from data_tools.packing.writer import PackWriter

ROOT = Path(__file__).parent.parent
LOOK_SECONDS, IMAGES, DIM = 0.02, 64, 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10**8)
    parser.add_argument("--make", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        return make_table(Path(args.make), args.classes)
    result = {"classes": args.classes}
    with tempfile.TemporaryDirectory() as folder:
        images, first, pack, run = (Path(folder) / name for name in ("images", "first", "pack", "run"))
        make_images(images, args.classes)
        flags = ["--data", pack, "--out", run, "--head", "sampled", "--active-classes", "500", "--feature-dim", DIM,
                 "--row-dtype", "bfloat16", "--image-size", "16", "--global-batch", "16", "--steps", "2"]
        for stage, command in {
            "table": [__file__, "--classes", args.classes, "--make", first],
            "pack": ["-m", "data_tools.pack", images, pack, "--classes", first, "--split", "test=0.2"],
            "train": ["train.py", *flags],
            "predict": ["-m", "xc.predict", run, images, "--out", Path(folder) / "hits.csv"],
        }.items():
            result |= {f"{stage}.{name}": value for name, value in watched(command).items()}
    result["train.rows_mb"] = round(args.classes * DIM * 2 / 2**20, 1)
    print(json.dumps(result))


def make_images(folder, num_classes):
    random = np.random.default_rng(0)
    for label in sorted(random.choice(num_classes, IMAGES // 2, replace=False).tolist()):
        (folder / name_of(label)).mkdir(parents=True)
        for number in range(2):
            picture = Image.fromarray(random.integers(256, size=(16, 16), dtype=np.uint8))
            picture.save(folder / name_of(label) / f"{number}.png")


def name_of(label):
    return f"item-{label:09d}"


def make_table(folder, num_classes):
    folder.mkdir()
    table = ClassTable(folder / "table", (name_of(label).encode() for label in range(num_classes)))
    file, counts = io.BytesIO(), np.memmap(folder / "counts", np.int64, "w+", shape=num_classes)
    Image.new("L", (16, 16)).save(file, "PNG")
    writer = PackWriter(folder / "train", 2**20, counts)
    writer.add(file.getvalue(), 0, 0)
    writer.end_shard()
    writer.write_index(table, source="benchmarks/class_names.py", seed=0, skipped=0)


def watched(command):
    start, highest = time.monotonic(), 0.0
    with subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            highest = max(highest, own_mb(process.pid))
            time.sleep(LOOK_SECONDS)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds": round(time.monotonic() - start, 1), "own_mb": round(highest, 1)}


if __name__ == "__main__":
    main()
