"""Images per second from files to batches: an image folder, WebDataset and ours on the same images, in one run.

    pip install --no-deps --target build/webdataset webdataset==1.0.2 braceexpand==0.1.7       # used by nothing else
    PYTHONPATH=build/webdataset python benchmarks/loader.py SCRATCH [--glyphs data/glyphs/train]

Two sets: JPEGs of 200 to 280 pixels a side made of smooth patterns, stretched to 224 × 224; and the 32 × 32 PNGs of an
image folder (python -m data_tools.glyphs makes one). All arms give shuffled batches of 64 float tensors in [-1, 1],
stretched by bicubic sampling with antialiasing, and their labels, without further distortion. SCRATCH is a new folder
on the disk that is measured; it is removed at the end.

folder         torch's DataLoader, a process per worker, that opens files by Pillow, as torchvision's ImageFolder does
webdataset     four tar shards, a buffer of 1,000 for shuffling, decoded by Pillow as its handbook does
ours           xc.data.loader.Loader, a thread per worker
pixels         the same up to what goes to a GPU, which makes numbers of pixels itself: batches of bytes
decode         no files: xc.data.images.decode of bytes in memory by one thread, the most that one worker can reach

For each set, arm, cache and number of workers: images per second, and CPU seconds per 1,000 images of all processes;
medians of --repeats passes, in which the arms take turns. Cold: the files' bytes (not their names) are first put out
of the page cache. Ratios are of images per second, and (cpu) of CPU seconds: times on a machine that others use are
worth less. Then the loader's share of a training step on the PNGs, with one worker on each of --ranks ranks:

step_share     time that a step of train.py waits for its batch, over that of the step
step_cpu_share CPU time in which ours loads and distorts an image, over the time that a rank takes for one
"""

import argparse
import io
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from benchmarks.image_sets import copy_images, forget, write_patterns
from benchmarks.measure import cpu_seconds
from xc.comm.world import World
from xc.config import Config
from xc.data import loader as data
from xc.data.images import decode

BATCH = 64
NUM_SHARDS = 4


class Folder(Dataset):
    """Images of ROOT/<class>/, one file each."""

    def __init__(self, root, to_input):
        classes = sorted(os.listdir(root))
        self.files = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).iterdir())]
        self.to_input = to_input

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path, label = self.files[i]
        with Image.open(path) as image:
            return self.to_input(image), label


class ToInput:
    """A Pillow image as a float tensor (channels, size, size) in [-1, 1]."""

    def __init__(self, size, channels):
        self.size, self.mode = size, {1: "L", 3: "RGB"}[channels]

    def __call__(self, image):
        image = image.convert(self.mode)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image)).reshape(self.size, self.size, -1)
        return pixels.permute(2, 0, 1).float().div_(127.5).sub_(1)


class Set:
    """One set of images in three forms: folder, tar shards and pack, and how to take one pass over each."""

    def __init__(self, root, size, channels):
        self.root, self.size, self.channels = root, size, channels
        self.to_input = ToInput(size, channels)
        self.files = sorted(root.glob("tree/*/*"))
        self._write_tars()
        subprocess.run([sys.executable, "-m", "data_tools.pack", root / "tree", root / "pack"], cwd=ROOT, check=True,
                       stdout=subprocess.DEVNULL)
        self.split = data.open_splits(self._config(1))["train"]
        self.forms = {"folder": self.files, "webdataset": [*root.glob("*.tar")], "ours": [*root.glob("pack/*.h5")],
                      "pixels": [*root.glob("pack/*.h5")]}
        os.sync()  # what is not on the disk yet cannot be put out of the cache

    def _write_tars(self):
        label_of = {name: label for label, name in enumerate(sorted(os.listdir(self.root / "tree")))}
        shuffled = random.Random(0).sample(self.files, len(self.files))
        for shard in range(NUM_SHARDS):
            with tarfile.open(self.root / f"{shard}.tar", "w") as tar:
                for i, path in enumerate(shuffled[shard::NUM_SHARDS]):
                    for suffix, content in (("img", path.read_bytes()), ("cls", b"%d" % label_of[path.parent.name])):
                        member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))

    def _config(self, workers, augment=0.0):
        return Config(data=str(self.root / "pack"), out="-", image_size=self.size, channels=self.channels,
                      augment=augment, loader_threads=workers, global_batch=BATCH)

    def folder(self, workers):
        return DataLoader(Folder(self.root / "tree", self.to_input), BATCH, shuffle=True, num_workers=workers)

    def webdataset(self, workers):
        import webdataset

        def to_pair(sample):
            with Image.open(io.BytesIO(sample["img"])) as image:
                return self.to_input(image), int(sample["cls"])

        shards = [str(path) for path in self.forms["webdataset"]]
        samples = webdataset.WebDataset(shards, shardshuffle=NUM_SHARDS, seed=0).shuffle(1000).map(to_pair)
        return webdataset.WebLoader(samples.batched(BATCH), batch_size=None, num_workers=workers)

    def ours(self, workers, augment=0.0):
        loader = data.Loader(self.split, self._config(workers, augment), World())
        queue = loader.train(0, len(self.files), BATCH)
        while batch := queue.take(1):
            yield batch[0]

    def pixels(self, workers):
        loader = data.Loader(self.split, self._config(workers), World())
        jobs = ((first, BATCH) for first in range(0, len(self.files), BATCH))
        queue = data.BatchQueue(jobs, lambda *places: self.split.examples(loader.order.records(*places)),
                                lambda inputs, *_: inputs, loader.cfg.loader_threads, loader.world.device)
        while batch := queue.take(1):
            yield batch[0]

    def forget(self, form):
        """Its bytes out of the page cache."""
        self.split.pack.close()
        forget(self.forms[form])

    def decode(self):
        """(images per second, CPU seconds per 1,000) of decoding alone."""
        images, _ = self.split.pack.read(np.arange(len(self.files)))
        begin, cpu = time.perf_counter(), time.process_time()
        for image in images:
            decode(image, self.size, self.channels)
        return len(images) / (time.perf_counter() - begin), 1e3 * (time.process_time() - cpu) / len(images)


def one_pass(batches, num_images):
    """(images per second, CPU seconds per 1,000) of a pass, its workers' start and end included."""
    begin, cpu = time.perf_counter(), cpu_seconds()
    iterator, found = iter(batches), 0
    for inputs, _ in iterator:
        found += len(inputs)
    del iterator, batches  # joins the workers, whose CPU time counts from then on
    seconds = time.perf_counter() - begin
    assert abs(num_images - found) < BATCH, (found, num_images)  # ours ends with a whole batch
    return found / seconds, 1e3 * (cpu_seconds() - cpu) / found


def measure(images, repeats):
    """{key: median}."""
    runs = {}
    for _ in range(repeats):
        runs.setdefault("decode", []).append(images.decode())
        for workers in (1, 2):
            for form in images.forms:
                images.forget(form)
                for cache in ("cold", "warm"):
                    batches = getattr(images, form)(workers)
                    runs.setdefault(f"{form}_{cache}_{workers}", []).append(one_pass(batches, len(images.files)))
    speed, cpu = ({key: statistics.median(one[i] for one in found) for key, found in runs.items()} for i in (0, 1))
    values = {f"{key}_per_second": speed[key] for key in runs} | {f"{key}_cpu_seconds": cpu[key] for key in runs}
    for cache in ("cold", "warm"):
        for workers in (1, 2):
            ours = f"ours_{cache}_{workers}"
            for form in ("folder", "webdataset"):
                values[f"over_{form}_{cache}_{workers}"] = speed[ours] / speed[f"{form}_{cache}_{workers}"]
                values[f"over_{form}_{cache}_{workers}_cpu"] = cpu[f"{form}_{cache}_{workers}"] / cpu[ours]
    for arm in ("ours", "pixels"):
        values |= {f"{arm}_of_decode": speed[f"{arm}_warm_1"] / speed["decode"],
                   f"{arm}_of_decode_cpu": cpu["decode"] / cpu[f"{arm}_warm_1"]}
    return values


def step_shares(images, ranks, steps):
    """The loader's shares of a training step, as above."""
    out = images.root / "run"
    flags = ["--data", images.root / "pack", "--out", out, "--steps", 2 * steps, "--log-steps", steps,
             "--save-every", 0, "--eval-every", 0, "--warmup", 0, "--global-batch", BATCH * ranks]
    launch = ["mpirun", "--oversubscribe", "-np", ranks, sys.executable, "train.py", *flags]
    subprocess.run([str(word) for word in launch], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    last = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-1]
    _, cpu = one_pass(images.ours(1, augment=1.0), len(images.files))
    return {"step_share": last["data_ms"] * last["images_per_second"] / (1e3 * BATCH * ranks),
            "step_cpu_share": cpu / 1e3 * last["images_per_second"] / ranks}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--glyphs", default="data/glyphs/train")
    parser.add_argument("--jpegs", type=int, default=2000)
    parser.add_argument("--pngs", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=2, help="of the training step")
    parser.add_argument("--steps", type=int, default=100, help="of that training")
    args = parser.parse_args()
    try:
        import webdataset  # noqa: F401
    except ImportError as e:
        sys.exit(f"error: {e}: see python benchmarks/loader.py --help")
    torch.set_num_threads(1)
    args.scratch.mkdir()
    try:
        write_patterns(args.scratch / "jpeg/tree", args.jpegs)
        copy_images(args.glyphs, args.scratch / "png/tree", args.pngs)
        sets = {"jpeg": Set(args.scratch / "jpeg", 224, 3), "png": Set(args.scratch / "png", 32, 1)}
        values = {f"{name}_{key}": value for name, images in sets.items()
                  for key, value in measure(images, args.repeats).items()}
        values |= step_shares(sets["png"], args.ranks, args.steps)
    finally:
        shutil.rmtree(args.scratch)
    show(values, sets)


def show(values, sets):
    """A table of speeds, the ratios, and all of them as one JSON object on the last line."""
    print(f"{'':24}" + "".join(f"{name + text:>18}" for name in sets for text in (" images/s", " CPU s/1000")))
    for key in [key.removeprefix("jpeg_") for key in values if key.startswith("jpeg_") and key.endswith("_per_second")]:
        arm = key.removesuffix("_per_second")
        numbers = [values[f"{name}_{arm}_{unit}"] for name in sets for unit in ("per_second", "cpu_seconds")]
        print(f"{arm:24}" + "".join(f"{number:18,.4g}" for number in numbers))
    for key, value in values.items():
        if not key.endswith(("_per_second", "_cpu_seconds")):
            print(f"{key:32}{value:10.3f}")
    print(json.dumps({key: round(value, 4) for key, value in values.items()}))


if __name__ == "__main__":
    main()
