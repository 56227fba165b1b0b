"""Peak memory of packing, by the number of records: python benchmarks/pack_memory.py --records 100000 1000000

Every record is a tiny PNG in RecordIO, of one of --classes (or a tenth as many as records), so that what is kept of
each record shows and not its image. Each packing is a process of its own. --plot FILE draws the curves. The last line
is one JSON object.

own_mb   peak of the memory that is the process's own, looked at fifty times a second
rss_mb   peak with the pages of files that it looks into (the table of classes), which the system may take at any time
"""

import argparse
import io
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from data_tools.sources import recordio

LOOK_SECONDS = 0.02


def write_records(path, count, classes):
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    image, random = file.getvalue(), 12345
    with open(path, "wb", buffering=2**20) as out:
        for number in tqdm(range(count), "writing", disable=not sys.stderr.isatty()):
            random = random * 6364136223846793005 + 1442695040888963407 & 2**64 - 1
            label = float((random >> 33) % classes)
            record = recordio.IMAGE.pack(0, label, number, 0) + image + struct.pack("<I", number)  # PNG ends before
            out.write(recordio.PART.pack(recordio.MAGIC, len(record)) + record + bytes(-len(record) % 4))


def measure(folder, count, classes, memory_mb, workers):
    write_records(os.path.join(folder, "a.rec"), count, classes)
    started, own, rss = time.monotonic(), 0, 0
    command = [sys.executable, "-m", "data_tools.pack", f"{folder}/a.rec", f"{folder}/{count}", "--memory-mb",
               str(memory_mb), "--shard-mb", "4", "--workers", str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            own, rss = (max(last, *(int(kb) for kb in re.findall(rf"{name}:\s*(\d+)", status)), 0)
                        for name, last in (("RssAnon", own), ("VmHWM", rss)))
            time.sleep(LOOK_SECONDS)
        *_, facts = process.stdout.read().splitlines()
    assert process.returncode == 0 and json.loads(facts)["records"] == count, facts
    return {"records": count, "classes": json.loads(facts)["classes"], "own_mb": round(own / 1024, 1),
            "rss_mb": round(rss / 1024, 1), "seconds": round(time.monotonic() - started, 1)}


def draw(results, memory_mb, path):
    """A picture of peak memory by number of records."""
    from matplotlib.figure import Figure  # takes a second; a figure of its own needs no display

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    records = [run["records"] for run in results]
    for key, label in ("own_mb", "its own"), ("rss_mb", "with mapped pages of files"):
        axes.semilogx(records, [run[key] for run in results], marker="o", label=label)
    for run in results:
        axes.annotate(f"{run['classes']:,} classes", (run["records"], run["rss_mb"]), xytext=(0, 8),
                      textcoords="offset points", ha="center", fontsize=7)
    axes.legend(loc="lower right")
    axes.set_ylim(0, 1.2 * max(run["rss_mb"] for run in results))
    axes.margins(x=0.15)
    axes.set_xlabel("records")
    axes.set_ylabel(f"peak memory in MiB, --memory-mb {memory_mb:g}")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, nargs="+", default=[10**5, 10**6, 10**7])
    parser.add_argument("--classes", type=int)
    parser.add_argument("--memory-mb", type=float, default=16)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--plot", help="a PNG of the curves")
    args = parser.parse_args()
    results = []
    print("records   classes   own MB    rss MB    seconds")
    for count in args.records:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(folder, count, args.classes or max(1, count // 10), args.memory_mb, args.workers))
        print("{records:<9} {classes:<9} {own_mb:<9} {rss_mb:<9} {seconds}".format(**results[-1]), flush=True)
    if args.plot:
        draw(results, args.memory_mb, args.plot)
    print(json.dumps({"memory_mb": args.memory_mb, "runs": results}))


if __name__ == "__main__":
    main()
