"""A catalogue that changed: a tenth of the classes gone, a tenth new. A grown run beside runs from nothing.

    python benchmarks/grow.py --data data/glyphs.pack --work runs/grow-glyphs --epochs 10

    --data    packs train and test (docs/results.md says how those of Omniglot are made)
    --work    folder for the packs of the old and the new catalogue, and for the runs; runs that are there are not done
              again
    --epochs  of training from nothing at full cost, of the old catalogue's run as well
    --grown   epochs of the grown runs, and of training from nothing at equal cost; 0 stands beside them
    --seeds   each draws other classes, too
    --flags   of all runs, for train.py; --grown-flags: of the grown ones beside them

Top-1 over all classes of the new catalogue, of test images of kept classes, of new ones, and of both. The last line is
one JSON object: means over the seeds, and the spread (highest less lowest) of both.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from xc import config
from xc.checkpoint.checkpoints import Checkpoints
from xc.comm.world import open_world
from xc.data.loader import Loader
from xc.data.pack import Pack
from xc.train import setup
from xc.train.start import Start

_SHARE = 0.1  # of the classes that are gone, and that are new


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=lambda text: Path(text).absolute())
    parser.add_argument("--work", required=True, type=lambda text: Path(text).absolute())
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--grown", type=float, nargs="+", default=[1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--flags", default="")
    parser.add_argument("--grown-flags", default=f"@{ROOT / 'recipes/grow.args'}")
    args = parser.parse_args()
    rows = {}
    for seed in args.seeds:
        for name, scores in one_seed(args, seed):
            print(f"seed {seed}  {name:24} kept {scores[0]:.4f}  new {scores[1]:.4f}  both {scores[2]:.4f}", flush=True)
            rows.setdefault(name, []).append(scores)
    result = {}
    print(f"{'':24} {'kept':>8} {'new':>8} {'both':>8} {'spread':>8}")
    for name, scores in rows.items():
        kept, new, both = (statistics.mean(column) for column in zip(*scores, strict=True))
        spread = max(s[2] for s in scores) - min(s[2] for s in scores)
        result[name] = {"kept": kept, "new": new, "both": both, "spread": spread}
        print(f"{name:24} {kept:8.4f} {new:8.4f} {both:8.4f} {spread:8.4f}")
    print(json.dumps({"data": args.data.name, "epochs": args.epochs, "seeds": len(args.seeds), **result}))


def one_seed(args, seed):
    """Yields (name, (top-1 of kept classes, of new ones, of both)) of every run on the new catalogue."""
    work = args.work / f"seed{seed}"
    old, new = catalogues(args.data, work, seed)
    flags = ["--seed", seed, "--eval-every", 0, "--log-steps", 100, *shlex.split(args.flags)]
    first = train(work / "old", old, ["--epochs", args.epochs, *flags])
    grown = ["--init", first, *flags, *shlex.split(args.grown_flags)]  # its rates go before those of --flags
    yield "grown, 0 epochs", scores(new, old, ["--out", work / "none", *grown])
    runs = [("grown", epochs, grown) for epochs in args.grown]
    runs += [("from nothing", epochs, flags) for epochs in (*args.grown, args.epochs)]
    for name, epochs, its_flags in runs:
        its_flags = [*its_flags, "--epochs", epochs]
        run = train(work / f"{name.split()[-1]}-{epochs:g}", new, its_flags)
        yield f"{name}, {epochs:g} epochs", scores(new, old, ["--out", run, "--resume", "auto", *its_flags])


def catalogues(data, work, seed):
    """Paths of the packs of the old and the new catalogue: each lacks a tenth of the classes, drawn with the seed."""
    table = Pack(data / "train").names
    names = np.array(table.class_names(0, table.num_classes))
    order, count = np.random.default_rng(seed).permutation(len(names)), round(_SHARE * len(names))
    packs = []
    for name, left_out in (("old-pack", order[:count]), ("new-pack", order[count : 2 * count])):
        packs.append(work / name)
        if not packs[-1].exists():
            work.mkdir(parents=True, exist_ok=True)
            wanted = work / f"{name}.txt"
            wanted.write_text("".join(f"{one}\n" for one in np.delete(names, left_out)))
            run("-m", "data_tools.pack", data, packs[-1], "--classes", wanted)
    return packs


def train(folder, data, flags):
    """One run of train.py, unless it is there; returns its folder."""
    if not (folder / "done").exists():
        run("train.py", "--data", data, "--out", folder, "--resume", "auto", *flags)
        (folder / "done").touch()
    return folder


def run(*words):
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(map(str, words))} ended with {done.returncode}: {done.stderr[-2000:]}")


@torch.no_grad()
def scores(new, old, flags):
    """Top-1 of test images of kept classes, of new ones, and of both, over all classes, with the weights of a run, or
    those that it would start from."""
    cfg = config.parse(["--data", str(new), *map(str, flags)])
    world = open_world(cfg.device)
    cfg, splits, loader, schedule = setup.data(cfg, world)
    state = setup.state(cfg, splits["train"], world)
    checkpoints = Checkpoints(cfg, state, schedule, splits, world)
    checkpoints.resume()
    Start(cfg, state, splits["train"], checkpoints.resumed, world).fill_rows(loader, lambda: False)
    known = set(Pack(old / "train").names.class_names(0, Pack(old / "train").num_classes))
    is_new = np.array([name not in known for name in splits["train"].names.class_names(0, state.head.num_classes)])
    state.backbone.eval()
    hits, labels = [], []
    for images, targets in Loader(splits["test"], cfg, world).test(cfg.global_batch):
        hits.append((state.head.num_scores_above_target(state.backbone(images), targets) < 1).numpy())
        labels.append(targets.numpy())
    hits, of_new = np.concatenate(hits), is_new[np.concatenate(labels)]
    return float(hits[~of_new].mean()), float(hits[of_new].mean()), float(hits.mean())


if __name__ == "__main__":
    main()
