"""Bytes that a rank sends in a step: predicted by the plan (xc/plan/sent.py), counted by the collectives, seen by the
link; and what the plan says of more ranks. Root: the hosts are made on this machine, one for each rank unless
--ranks-per-host says otherwise. Bytes, not times.

    python benchmarks/sent_bytes.py --ranks 2 3 4 8
    python benchmarks/sent_bytes.py --ranks 4 8 --ranks-per-host 2
    python benchmarks/sent_bytes.py --ranks 2 4 --head knn

Of W ranks with B examples each, G = W B, features of D numbers, a backbone of N numbers of which DGC sends n:

    features   all-gather of features, reduce-scatter of their gradients: (W-1) B D numbers of 4, 2 or 1 bytes each way
    softmax    all-reduce of G maxima and of 2 G sums: 2 (W-1)/W 3 G numbers of 4 bytes
               --head knn, by scores: before it, of G maxima and of G sums for the choice: 2 (W-1)/W 5 G in all
    backbone   dense: all-reduce of the gradients, 2 (W-1)/W N numbers of 4 or 2 bytes
               dgc: n values and indices, of 8 or 6 bytes, to the ranks that own them, and the largest 4 n of their sums
               to all: about 5 n (W-1)/W; dense where that is less: for vectors, and for layers of which the indices
               would send more
               hier (dgc-hier, L ranks on each of H hosts): inside a host reduce-scatter of N numbers, (L-1)/L N of 4
               bytes; between hosts 5 n/L (H-1)/H values and indices; inside a host those of the sums, (L-1) 4 n/L
               powersgd: all-reduces of P and Q, 2 (W-1)/W r (n + m) numbers of 4 bytes for a layer (n, m); dense for
               vectors
               all: sums of the features' norm over the batch, 2 (W-1)/W (4 D + 1) numbers of 8 bytes; all-gather of
               labels, (W-1) B of 8 bytes
    rows       with R copies of the classifier (--model-parallel-size W/R) of S rows a shard: 2 (R-1)/R S D numbers of 4
               bytes; with them W and G are of a copy in `features` and `softmax`

Keys: W.SETTING.PATH.predicted_mb and .counted_mb, of a rank; W.SETTING.link_mb, what the median host's link sent in a
step (headers, acknowledgements and Horovod's coordination included); model.W.SETTING, the sum for more ranks, each on a
host. Settings: dense, dense16 (16 bits, of features too), dgc, dgc16, dgc8 (8 bits of the features), powersgd
(with 16 bits of the features), hier (with several ranks on a host).
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.hosts import Hosts, link_bytes
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.config import Config
from xc.gradients import exchanges
from xc.model import backbone as backbones
from xc.model import head_table
from xc.optim.schedule import StepPlan
from xc.plan.backbone_size import BackboneSize
from xc.plan.sent import Sent
from xc.plan.workload import Workload
from xc.run.metrics import Timer
from xc.train import pipeline

SETTINGS = {"dense": ("dense", 32), "dense16": ("dense", 16), "dgc": ("dgc", 32), "dgc16": ("dgc", 16),
            "dgc8": ("dgc", 8), "powersgd": ("powersgd", 16), "hier": ("dgc-hier", 32)}
COLUMNS = {"features": ("features",), "softmax": ("choice", "softmax"), "backbone": ("labels", "norm", "backbone"),
           "rows": ("rows",)}
MODELLED = (64, 256, 1024)
CLASSES = 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--model-parallel-size", type=int, default=0, help="of train.py")
    parser.add_argument("--head", choices=("full", "knn"), default="full", help="knn: one copy of the classifier")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--batch-per-rank", type=int, default=32)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--found", help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = {name: how for name, how in SETTINGS.items() if name != "hier" or args.ranks_per_host > 1}
    if args.found:
        run(lambda: measure(args, settings))
        return
    if args.head == "knn" and args.model_parallel_size:
        raise SystemExit("error: --head knn is counted for one copy of the classifier: leave out --model-parallel-size")
    if min(args.ranks) < 2:
        raise SystemExit("error: --ranks 1 sends nothing: give 2 or more")
    if uneven := [size for size in args.ranks if size % args.ranks_per_host]:
        raise SystemExit(f"error: --ranks {uneven[0]} is not a multiple of --ranks-per-host {args.ranks_per_host}")
    result, rows = {}, []
    for size in args.ranks:
        with Hosts(size // args.ranks_per_host) as hosts:
            found = hosts.folder / "found.json"
            try:
                hosts.mpirun(args.ranks_per_host,
                             [sys.executable, Path(__file__).resolve(), *sys.argv[1:], "--found", found])
            except subprocess.CalledProcessError as e:
                raise SystemExit(e.returncode) from None
            for setting, (counted, link) in json.loads(found.read_text()).items():
                predicted = predicted_mb(args, size, *settings[setting])
                for path, mb in predicted.items():
                    result[f"{size}.{setting}.{path}.predicted_mb"] = mb
                    result[f"{size}.{setting}.{path}.counted_mb"] = counted.get(path, 0.0)
                result[f"{size}.{setting}.link_mb"] = link
                pairs = [f"{mb:.3f} {counted.get(path, 0.0):.3f}" for path, mb in predicted.items()]
                rows.append((size, setting, *pairs, f"{sum(predicted.values()):.3f}", f"{link:.3f}"))
    for size in MODELLED if not args.model_parallel_size else ():
        for setting, how in settings.items():
            if setting != "hier":
                predicted = predicted_mb(args, size, *how)
                result[f"model.{size}.{setting}"] = sum(predicted.values())
                rows.append((size, setting, *(f"{mb:.3f}" for mb in predicted.values()),
                             f"{sum(predicted.values()):.3f}", "-"))
    print(f"MiB a step that a rank sends, predicted and counted; {args.backbone}, {args.head} head, "
          f"D = {args.dim}, {args.batch_per_rank} examples a rank, density {args.density}")
    for row in [("ranks", "setting", "features", "softmax", "backbone", "rows", "sum", "link"), *rows]:
        print(f"{row[0]:>6} {row[1]:8} " + " ".join(f"{cell:>16}" for cell in row[2:]))
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


def config(args, size, kind, bits):
    """The Config of a step of so many ranks."""
    sgd = {"optimizer": "sgd", "lr": 0.1, "density": args.density} if kind.startswith("dgc") else {}
    return Config(data="-", out="-", backbone=args.backbone, image_size=args.image_size, head=args.head,
                  feature_dim=args.dim, active_classes=0.5, global_batch=args.batch_per_rank * size,
                  model_parallel_size=args.model_parallel_size, exchange=kind, feature_bits=bits,
                  gradient_bits=max(bits, 16), **sgd)


def predicted_mb(args, size, kind, bits):
    """By path, in the order of the table."""
    cfg = config(args, size, kind, bits)
    backbone = BackboneSize.of(cfg, (1, args.image_size, args.image_size))
    sent = Sent.of(Workload.of(cfg, CLASSES, size), backbone, args.ranks_per_host).by_path
    return {column: sum(sent.get(path, 0) for path in paths) / 2**20 for column, paths in COLUMNS.items()}


def path_of(name):
    """The table's path of a path of xc.traffic."""
    group, _, what = name.partition(".")
    if group == "shards":
        return "softmax" if what == "all_reduce" else "features"
    return "rows" if group == "replicas" else "backbone"


def measure(args, settings):
    world = open_world("cpu", args.model_parallel_size)
    count = args.batch_per_rank
    found = {}
    for setting, (kind, bits) in settings.items():
        cfg = config(args, world.size, kind, bits)
        net = backbones.build(cfg.backbone, (1, args.image_size, args.image_size), args.dim, 0, world)
        head, of_net = head_table.build(cfg, CLASSES, world), exchanges.build(net, world, cfg)
        head.refresh(1, due=True)
        images = torch.randn(count, 1, args.image_size, args.image_size)
        seen = []
        for _ in range(4):
            labels = torch.arange(count)  # anew: those last gathered are kept
            world.all_ranks.all_reduce(torch.zeros(1))
            world.traffic.sent.clear()
            before = link_bytes()
            counts = [count] * world.size
            head.labels.know(labels, counts, world.all_ranks.all_gather(labels, counts))
            head.select(labels, 0)
            plan = StepPlan(0.1, count * world.size, 1, args.density)
            pipeline.forward_backward(net, head, of_net, [(images, labels)], labels, plan, Timer(), bits)
            of_net.reduce()
            head.reduce()
            of_net.zero_grad()
            head.zero_grad()
            by_path = Counter()
            for name, sent in world.traffic.sent.items():
                by_path[path_of(name)] += sent / 2**20
            world.all_ranks.all_reduce(torch.zeros(1))
            seen.append((link_bytes() - before) / 2**20)
        of_ranks = world.all_ranks.all_gather_object((by_path, statistics.median(seen[1:])))
        medians = {path: statistics.median(counted[path] for counted, _ in of_ranks) for path in by_path}
        found[setting] = medians, statistics.median(link for _, link in of_ranks)
    if world.rank == 0:
        Path(args.found).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
