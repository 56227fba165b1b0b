"""Bytes that a rank sends in a step: predicted by formula, counted by the collectives, seen by the link; and what the
formulas say of more ranks. Root: the hosts are made on this machine, one for each rank unless --ranks-per-host says
otherwise. Bytes, not times.

    python benchmarks/sent_bytes.py --ranks 2 3 4 8
    python benchmarks/sent_bytes.py --ranks 4 8 --ranks-per-host 2

Of W ranks with B examples each, G = W B, features of D numbers, a backbone of N numbers of which DGC sends n:

    features   all-gather of features, (W-1) B D, and reduce-scatter of their gradients, (W-1) B D; 4 bytes each, or 2
    softmax    all-reduce of G maxima and of 2 G sums: 2 (W-1)/W 3 G numbers of 4 bytes
    dense      all-reduce of the backbone's gradients: 2 (W-1)/W N; 4 bytes each, or 2
    dgc        all-gather of values and places, (W-1) n; 8 bytes each, or 6; dense where that is less: for vectors, and
               for layers of which the places would send more
    hier       (dgc-hier, L ranks on each of H hosts) inside a host reduce-scatter of N numbers, (L-1)/L N of 4 bytes;
               between hosts (H-1) n/L values and places; inside a host these messages, (L-1) H n/L

Keys: W.SETTING.predicted_mb, .counted_mb, of a rank; .link_mb, what the median host's link sent in one step (headers,
acknowledgements and Horovod's coordination included), for the settings dense, dense16, dgc, dgc16 (16: bits, of
features too) and hier (several ranks on a host); and model.W.SETTING for more ranks, each a host of its own.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.hosts import Hosts, link_bytes
from xc import backbone as backbones
from xc import exchange, pipeline
from xc.heads import HEADS
from xc.metrics import Timer
from xc.schedule import Now
from xc.topk import message_bytes
from xc.traffic import sent_all_gather, sent_all_reduce, sent_reduce_scatter
from xc.world import World, open_world, run

SETTINGS = {"dense": ("dense", 32), "dense16": ("dense", 16), "dgc": ("dgc", 32), "dgc16": ("dgc", 16),
            "hier": ("hier", 32)}
MODELLED = (64, 256, 1024)
CLASSES = 1000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--ranks-per-host", type=int, default=1)
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
    if uneven := [size for size in args.ranks if size % args.ranks_per_host]:
        raise SystemExit(f"error: --ranks {uneven[0]} is not a multiple of --ranks-per-host {args.ranks_per_host}")
    layers = layers_of(network(args, World()))
    result = {}
    for size in args.ranks:
        with Hosts(size // args.ranks_per_host) as hosts:
            found = hosts.folder / "found.json"
            try:
                hosts.mpirun(args.ranks_per_host,
                             [sys.executable, Path(__file__).resolve(), *sys.argv[1:], "--found", found])
            except subprocess.CalledProcessError as e:
                raise SystemExit(e.returncode) from None
            for setting, values in json.loads(found.read_text()).items():
                result[f"{size}.{setting}.predicted_mb"] = predicted_mb(args, size, layers, *settings[setting])
                result |= {f"{size}.{setting}.{name}": value for name, value in values.items()}
    for size in MODELLED:
        result |= {f"model.{size}.{name}": predicted_mb(args, size, layers, *how) for name, how in settings.items()
                   if name != "hier"}
    print(f"MB a step that a rank sends; {args.backbone}, {sum(map(sum, layers)):,} numbers, D = {args.dim}, "
          f"{args.batch_per_rank} examples a rank, density {args.density}")
    print(f"{'ranks':>6} {'setting':8} {'predicted':>10} {'counted':>10} {'link':>10}")
    for size in (*args.ranks, *MODELLED):
        for setting in settings:
            values = [result.get(f"{size}.{setting}.{name}_mb") for name in ("predicted", "counted", "link")]
            values[0] = values[0] or result.get(f"model.{size}.{setting}")
            if values[0] is None:
                continue
            print(f"{size:6} {setting:8} " + " ".join(f"{'-' if v is None else format(v, '.3f'):>10}" for v in values))
    print(json.dumps({key: round(value, 4) for key, value in result.items()}))


def network(args, world):
    return backbones.build(args.backbone, (1, args.image_size, args.image_size), args.dim, 0, world)


def layers_of(net):
    """Numbers of the groups of layers that DGC selects in, and of the vectors."""
    layers = [len(bucket.flat) for bucket in exchange.Dgc(net, World())._sparse]
    return layers, [sum(p.numel() for p in net.parameters()) - sum(layers)]


def predicted_mb(args, size, layers, kind, bits):
    matrices, vectors = layers
    features = 2 * (size - 1) * args.batch_per_rank * args.dim * bits // 8
    softmax = sent_all_reduce(size, 3 * size * args.batch_per_rank * 4)
    if kind == "dense":
        return (features + softmax + sent_all_reduce(size, (sum(matrices) + sum(vectors)) * bits // 8)) / 2**20
    total = features + softmax + sent_all_reduce(size, sum(vectors) * bits // 8)
    local = args.ranks_per_host if kind == "hier" else 1
    hosts = size // local
    for n in matrices:
        part = n / local
        message = message_bytes(math.ceil(part * args.density), bits)
        sparse, dense = sent_all_gather(hosts, message), sent_all_reduce(hosts, 4 * part)
        total += sent_reduce_scatter(local, 4 * n) + min(sparse, dense)
        total += sent_all_gather(local, hosts * message if sparse < dense else 4 * part)
    return total / 2**20


def measure(args, settings):
    world = open_world("cpu")
    count = args.batch_per_rank
    found = {}
    for setting, (kind, bits) in settings.items():
        net = network(args, world)
        head = HEADS["full"](CLASSES, args.dim, world)
        of_net = exchange.AllReduce(net, world, bits=bits) if kind == "dense" else exchange.Dgc(
            net, world, bits=bits, two_level=kind == "hier")
        images = torch.randn(count, 1, args.image_size, args.image_size)
        labels = torch.arange(count)
        seen = []
        for _ in range(4):
            world.everyone.all_reduce(torch.zeros(1))
            world.traffic.take()
            before = link_bytes()
            head.select(labels, 0)
            pipeline.run(net, head, of_net, [(images, labels)], labels, Now(0.1, count * world.size, 1, args.density),
                         Timer(), bits)
            of_net.reduce()
            head.reduce()
            of_net.zero_grad()
            head.zero_grad()
            sent = world.traffic.take()["sent_mb"]
            world.everyone.all_reduce(torch.zeros(1))
            seen.append((sent, (link_bytes() - before) / 2**20))
        counted, link = (statistics.median(column) for column in zip(*seen[1:], strict=True))
        of_ranks = world.everyone.all_gather_object((counted, link))
        found[setting] = {"counted_mb": statistics.median(c for c, _ in of_ranks),
                          "link_mb": statistics.median(link for _, link in of_ranks)}
    if world.rank == 0:
        Path(args.found).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
