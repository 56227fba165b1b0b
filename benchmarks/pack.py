"""Images per second of packing, beside `tar` of the same tree: python benchmarks/pack.py SCRATCH [--glyphs DIR]

Two trees: JPEGs of 200 to 280 pixels a side made of smooth patterns, and the 32 × 32 PNGs of an image folder (python -m
data_tools.glyphs makes one). SCRATCH is a new folder on the disk that is measured; it is removed at the end.

tar              GNU tar of the tree into a file, which is then synced, as packs are
CHECK_WORKERS    data_tools.pack of it with --check CHECK and so many workers (full_2: two processes that decode)

For each tree, cache and arm: images per second and CPU seconds per 1,000 images, of the whole command, from its start
to the end of the last of its processes; medians of --repeats rounds, in which the arms take turns. Cold: the files'
bytes (not their names) are first put out of the page cache. Ratios (over_tar) are of images per second: on a machine
that others use they are worth less than those of CPU seconds (cpu_of_tar). The packs of one tree are all the same,
byte for byte, which is looked at.
"""

import argparse
import ctypes
import filecmp
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.image_sets import copy_images, forget, write_patterns
from benchmarks.measure import cpu_seconds

CHECKS = ("full", "header", "none")
PR_SET_CHILD_SUBREAPER = 36


def timed(command, num_images):
    """(images per second, CPU seconds per 1,000) of a command and all its processes."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    subprocess.run([str(word) for word in command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    while True:  # what it left behind is a child of ours then: the server that its workers were forked from
        try:
            os.wait()
        except ChildProcessError:
            break
    return num_images / (time.perf_counter() - begin), 1e3 * (cpu_seconds() - cpu) / num_images


def commands(tree, out, workers):
    """{arm: command that writes out}."""
    tar = ["bash", "-c", 'tar -C "$0" -cf "$1" . && sync "$1"', tree, out]
    pack = [sys.executable, "-m", "data_tools.pack", tree, out]
    return {"tar": tar} | {f"{check}_{number}": [*pack, "--check", check, "--workers", number]
                           for check in CHECKS for number in workers}


def measure(tree, scratch, workers, repeats):
    """{key: median}."""
    files = sorted(tree.glob("*/*"))
    first, out, runs = scratch / "first.pack", scratch / "out", {}
    for _ in tqdm(range(repeats), tree.name, disable=not sys.stderr.isatty()):
        for cache in ("cold", "warm"):
            for arm, command in commands(tree, out, workers).items():
                if cache == "cold":
                    forget(files)
                runs.setdefault(f"{arm}_{cache}", []).append(timed(command, len(files)))
                if arm == "tar":
                    out.unlink()
                elif first.exists():
                    assert_same(first, out)
                    shutil.rmtree(out)
                else:
                    out.rename(first)
    shutil.rmtree(first)
    speed, cpu = ({key: statistics.median(one[i] for one in found) for key, found in runs.items()} for i in (0, 1))
    values = {f"{key}_per_second": speed[key] for key in runs} | {f"{key}_cpu_seconds": cpu[key] for key in runs}
    for key in runs:
        arm, _, cache = key.rpartition("_")
        if arm != "tar":
            values[f"{key}_over_tar"] = speed[key] / speed[f"tar_{cache}"]
            values[f"{key}_cpu_of_tar"] = cpu[key] / cpu[f"tar_{cache}"]
    return values


def assert_same(pack, other):
    names = sorted(os.listdir(pack))
    assert names == sorted(os.listdir(other)), other
    assert filecmp.cmpfiles(pack, other, names, shallow=False)[0] == names, other


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--glyphs", default="data/glyphs/train")
    parser.add_argument("--jpegs", type=int, default=20000)
    parser.add_argument("--pngs", type=int, default=28292)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    scratch = args.scratch.absolute()
    scratch.mkdir()
    try:
        write_patterns(scratch / "jpeg", args.jpegs)
        copy_images(args.glyphs, scratch / "png", args.pngs)
        os.sync()  # what is not on the disk yet cannot be put out of the cache
        values = {name: measure(scratch / name, scratch, args.workers, args.repeats) for name in ("jpeg", "png")}
    finally:
        shutil.rmtree(scratch)
    show(values)


def show(values):
    """A table of all arms, and all values as one JSON object on the last line."""
    units = {"per_second": "images/s", "over_tar": "of tar", "cpu_seconds": "CPU s/1000", "cpu_of_tar": "CPU of tar"}
    print(f"{'':24}" + "".join(f"{name + ' ' + text:>17}" for name in values for text in units.values()))
    for key in [key.removesuffix("_per_second") for key in values["jpeg"] if key.endswith("_per_second")]:
        numbers = [values[name].get(f"{key}_{unit}", 1.0) for name in values for unit in units]
        print(f"{key:24}" + "".join(f"{number:17,.4g}" for number in numbers))
    print(json.dumps({f"{name}_{key}": round(value, 4) for name in values for key, value in values[name].items()}))


if __name__ == "__main__":
    main()
