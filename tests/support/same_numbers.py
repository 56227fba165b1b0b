"""Compare the numbers of two commits: for a change that should not change them.

    python -m tests.support.same_numbers COMMIT [--only NAME ...] [--ranks 1 2] [--work FOLDER] [--keep-going]

Each scenario trains a small model with a fixed seed in a checkout of COMMIT and in this one: once without a break, and
once stopped by SIGUSR1 and resumed. `rollback` goes back from a loss that is not finite. Compared bit for bit: every
line of metrics.jsonl but for its times, every tensor of the newest checkpoint, and the accuracies of the last line.
Names that only this checkout writes into a line are no difference, nor are the old names of a ResNet's tensors.
The flags are those of COMMIT, so a flag that was renamed since must still be known by its old name.

--work keeps the results of COMMIT, so that a second comparison runs this checkout alone. Exit code 1 where something
differs.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from xc.comm.world import World
from xc.model import backbone

ROOT = Path(__file__).parent.parent.parent
TIMES = re.compile(r"images_per_second|\w+_ms|\w*seconds|peak_rss_mb")
# The recipe is as it was when it was the default.
COMMON = ("--optimizer sgd --lr 0.1 --head-lr-scale 40 --weight-decay 5e-4 --scale 20 "
          "--data synth:classes=600,dim=16,examples=8,test=400 --feature-dim 16 --global-batch 24 --steps 60 "
          "--warmup 5steps --log-steps 7 --eval-every 20steps --save-every 15steps --device cpu --seed 3")
NEAR = "--active-classes 0.2 --graph-from 0 --graph-every 20steps"
SCENARIOS = {
    "full": "",
    "full-momentum": "--head-momentum 0.9 --head-lr-scale 4 --row-dtype bfloat16 --margin arcface --margin-size 0.1",
    "knn": f"--head knn {NEAR}",
    "knn-approx": f"--head knn {NEAR} --graph approx --graph-angle 5",
    "sampled": "--head sampled --active-classes 0.2",
    "selective": f"--head selective {NEAR}",
    "dgc": "--exchange dgc --density 0.05 --density-warmup 20steps --micro-batches 2 --head knn " + NEAR,
    "fccs": "--schedule fccs --max-batch 96 --hold 20% --tail 40% --optimizer lars --lr 5 --head-lr-scale 1.6 "
            "--head knn --active-classes 0.3 --graph-from 0 --graph-every 20steps",
    "fccs-auto": "--schedule fccs --fccs auto --max-batch 96 --micro-batches 2 --tail 30% --steps 0 --epochs 0.5",
    "images": "--data {images} --backbone resnet18 --image-size 16 --channels 3 --steps 20 --warmup 2steps "
              "--log-steps 3 --eval-every 10steps --save-every 5steps",
    "rollback": "--weight-decay 1000 --momentum 0 --max-rollbacks 2 --save-every 4steps",  # the weights become infinite
}
RESNET = backbone.build("resnet18", (3, 16, 16), 16, 0, World())  # of `images`
STOP_AFTER = {"images": 6, "fccs-auto": 21}  # step from which on the signal is sent; 20 for the others


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--keep-going", action="store_true", help="show all scenarios that differ, not the first alone")
    args = parser.parse_args()
    work = (args.work or Path(tempfile.mkdtemp())).resolve()
    before = checkout(args.commit, work)
    images = make_images(work / "images", before)

    differing = 0
    for name in args.only:
        for ranks in args.ranks:
            flags = f"{COMMON} {SCENARIOS[name]}".format(images=images).split()
            for way in ["unbroken"] if name == "rollback" else ["unbroken", "resumed"]:
                stop_after = STOP_AFTER.get(name, 20) if way == "resumed" else None
                results = []
                for root, label in (before, "before"), (ROOT, "after"):
                    folder = work / label / f"{name}-{ranks}-{way}"
                    if label == "after":
                        subprocess.run(["rm", "-rf", folder], check=True)
                    results.append(numbers_of(root, folder, ranks, flags, stop_after))
                fault = difference(*results)
                differing += bool(fault)
                verdict = fault or f"the same: {len(results[0]['lines'])} lines, {len(results[0]['tensors'])} tensors"
                print(f"{name:14} {ranks} rank(s)  {way:9} {verdict}", flush=True)
                if fault and not args.keep_going:
                    raise SystemExit(1)
    raise SystemExit(1 if differing else 0)


def checkout(commit, work):
    """A folder with that commit's files and this checkout's packages."""
    name = subprocess.run(["git", "rev-parse", "--short", commit], cwd=ROOT, check=True, capture_output=True, text=True)
    folder = work / name.stdout.strip()
    if not folder.exists():
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        subprocess.run(["git", "checkout", "-q", commit], cwd=folder, check=True)
    return folder


def make_images(folder, root):
    """Packs of 40 classes of noisy random patterns."""
    if not (folder / "packs").exists():
        random = np.random.default_rng(0)
        for label in range(40):
            pattern = random.integers(0, 256, (8, 8, 3)).repeat(2, 0).repeat(2, 1)
            for split, count in ("train", 7), ("test", 3):
                (folder / "tree" / split / f"class{label}").mkdir(parents=True)
                for i in range(count):
                    image = (pattern + random.normal(0, 30, pattern.shape)).clip(0, 255).astype(np.uint8)
                    Image.fromarray(image).save(folder / "tree" / split / f"class{label}" / f"{i}.png")
        command = [sys.executable, "-m", "data_tools.pack", folder / "tree", folder / "packs"]
        subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
    return folder / "packs"


def numbers_of(root, folder, ranks, flags, stop_after):
    """Train, stopped and resumed where `stop_after` is a step; returns the run's numbers."""
    if not (folder / "last.json").exists():
        process = launch(root, folder, ranks, flags)
        if stop_after:
            while process.poll() is None and newest_step(folder) < stop_after:
                time.sleep(0.01)
            process.send_signal(signal.SIGUSR1)
            _, errors = process.communicate(timeout=300)
            assert process.returncode in (0, 75), errors
            process = launch(root, folder, ranks, [*flags, "--resume", "auto"])
        out, errors = process.communicate(timeout=300)
        last = json.loads(out.splitlines()[-1]) if process.returncode == 0 else {}
        assert (folder / "metrics.jsonl").exists(), f"{' '.join(flags)} in {root} did not begin: {errors}"
        (folder / "last.json").write_text(json.dumps({"code": process.returncode, **last}))
    lines = [untimed(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if stop_after:  # the interval in which a run was resumed counts the bytes since then, and signals come when they do
        lines = [{name: value for name, value in line.items() if name != "sent_mb"} for line in lines]
    newest = max((folder / "checkpoints").glob("step-*"))
    tensors = {}
    for path in newest.glob("*.safetensors"):
        tensors |= {f"{path.name}/{name}": tensor for name, tensor in RESNET.renamed(load_file(path)).items()}
    last = {k: v for k, v in untimed(json.loads((folder / "last.json").read_text())).items() if k != "run"}
    return {"lines": lines, "checkpoint": newest.name, "tensors": tensors, "last": last}


def launch(root, folder, ranks, flags):
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
        "OMPI_MCA_hwloc_base_binding_policy": "none"}
    launcher = ["mpirun", "--oversubscribe", "-np", str(ranks)] if ranks > 1 else []
    folder.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen([*launcher, sys.executable, "train.py", *flags, "--out", folder], cwd=root, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)


def newest_step(folder):
    try:
        return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, IndexError):
        return -1


def untimed(line):
    return {name: value for name, value in line.items() if not TIMES.fullmatch(name)}


def difference(before, after):
    """The first difference as a text; None where there is none."""
    before, after = dict(before), dict(after)
    after["lines"] = [known(old, new) for old, new in zip(before["lines"], after["lines"], strict=False)] + \
        after["lines"][len(before["lines"]) :]
    after["last"] = known(before["last"], after["last"])
    for old, new in zip(before["lines"], after["lines"], strict=False):
        if old != new:
            return f"metrics differ: {old} is now {new}"
    for what in "lines", "checkpoint", "last":
        old, new = before[what], after[what]
        if old != new:
            return f"{what}: {len(old)} is now {len(new)}" if what == "lines" else f"{what}: {old} is now {new}"
    if before["tensors"].keys() != after["tensors"].keys():
        return f"tensors of {before['checkpoint']}: {sorted(before['tensors'].keys() ^ after['tensors'].keys())}"
    wrong = [name for name, tensor in before["tensors"].items() if not torch.equal(tensor, after["tensors"][name])]
    return f"tensors of {before['checkpoint']} differ: {wrong}" if wrong else None


def known(old, new):
    """What a new line has of the names of an old one."""
    return {name: value for name, value in new.items() if name in old}


if __name__ == "__main__":
    main()
