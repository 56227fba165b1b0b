"""One step of our heads and of others' classifiers, side by side: time, CPU time, memory, and the loss afterwards.

    mpirun -np 2 python benchmarks/peers.py --classes 100000 1000000 --partial-fc FOLDER --cce FOLDER

    full, knn       ours; of knn the graph is a stand-in, K random neighbours of every class
    torch           torch.nn.functional.cross_entropy of all logits, data parallel: all rows on every rank
    loss_parallel   torch.distributed.tensor.parallel.loss_parallel, rows split over ranks as DTensors
    partial_fc      PartialFC_V2 of insightface: --partial-fc names the folder recognition/arcface_torch of a clone of
                    github.com/deepinsight/insightface. It is written for GPUs: here .cuda() does nothing
    cce             cut_cross_entropy of Apple, data parallel: --cce names a folder with that package, as made by
                    pip install --no-deps --target FOLDER cut-cross-entropy triton. Its kernels are for GPUs: on CPUs
                    this is its own compiled replacement, "torch_compile"

Others' code is not part of this project: what is not named is left out. All have the same first rows, features, labels,
cosine logits, batch and optimizer (SGD, --momentum), float32, one thread a rank. They take turns, one after the other.

NAME.ms         median wall time of a step, of the slowest rank; NAME.cpu_ms of the busiest one
NAME.peak_mb    highest resident memory of a rank during these steps, over what it had before
NAME.loss       over ALL classes, after --repeats and 3 steps, of examples that were not trained on
ratio.*         of milliseconds: partial_fc over knn at the same share; the best of the others with all classes over
                full
"""

import argparse
import ctypes
import gc
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import distributed

from benchmarks.head_step import random_graph
from benchmarks.measure import median_step, reset_peak, rss_mb
from xc.comm.launch import run
from xc.comm.shard import Shard
from xc.comm.world import open_world
from xc.config import Config
from xc.errors import UserError
from xc.model.head_table import head_class
from xc.optim.optimizers import RowSGD
from xc.run.metrics import peak_rss_mb

SCALE, POOL, NOISE, ROW_STD, WARM_UP, BLOCK = 20.0, 4096, 0.7, 0.01, 3, 2**16


class Job:
    """What all classifiers share: sizes, first rows, batches, and the loss over all classes."""

    def __init__(self, args, num_classes, world):
        self.args, self.num_classes, self.world = args, num_classes, world
        self.dim, self.batch = args.dim, args.batch_per_rank
        self.shard = Shard.of(num_classes, world.size, world.rank)
        generator = torch.Generator().manual_seed(1)
        self.pool = torch.randint(num_classes, (min(POOL, num_classes),), generator=generator)  # classes with examples
        self.directions = F.normalize(torch.randn(len(self.pool), self.dim, generator=generator))

    def rows(self, shard=None):
        """The first rows of a shard; of all classes without one."""
        shard = shard or Shard(0, self.num_classes)
        rows = torch.empty(len(shard), self.dim)
        for block in range(shard.first // BLOCK * BLOCK, shard.last, BLOCK):  # the same whatever the shard
            made = torch.randn(BLOCK, self.dim, generator=torch.Generator().manual_seed(1000 + block)) * ROW_STD
            start, stop = max(block, shard.first), min(block + BLOCK, shard.last)
            rows[start - shard.first : stop - shard.first] = made[start - block : stop - block]
        return rows

    def examples(self, step):
        """(features (B, D), labels (B,)) of this rank."""
        generator = torch.Generator().manual_seed(10**6 * (1 + self.world.rank) + step)
        which = torch.randint(len(self.pool), (self.batch,), generator=generator)
        noise = F.normalize(torch.randn(self.batch, self.dim, generator=generator))
        return (self.directions[which] + NOISE * noise).requires_grad_(), self.pool[which]

    def gathered(self, tensor):
        """The rows of all ranks, in their order. Collective."""
        parts = [torch.empty_like(tensor) for _ in range(self.world.size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def loss(self, rows):
        """The mean loss of new examples over all classes. rows: (S, D) of this rank. Collective."""
        features, labels = self.examples(10**5)
        features, labels = F.normalize(self.gathered(features.detach())), self.gathered(labels)
        sums, target = torch.zeros(len(labels), dtype=torch.float64), torch.zeros(len(labels), dtype=torch.float64)
        for first in range(0, len(rows), 2**14):
            sums += (SCALE * features @ F.normalize(rows[first : first + 2**14]).T).double().exp().sum(1)
        own = self.shard.owns(labels)
        target[own] = SCALE * (features[own] * F.normalize(rows[labels[own] - self.shard.first])).sum(1).double()
        distributed.all_reduce(sums)
        distributed.all_reduce(target)
        return (sums.log() - target).mean().item()

    def sgd(self, parameters):
        return torch.optim.SGD(parameters, self.args.lr, self.args.momentum)


# Each of these returns (step(features, labels), rows() of this rank).

def ours(job, share):
    cfg = Config(data="-", out="-", head="knn" if share < 1 else "full", feature_dim=job.dim, scale=SCALE,
                 global_batch=job.batch * job.world.size, active_classes=float(share))
    kind = head_class(cfg)
    head = kind(job.num_classes, job.dim, job.world, scale=SCALE, **kind.settings(cfg, job.num_classes))
    with torch.no_grad():
        head.weight.copy_(job.rows(job.shard))
    optimizer, done = RowSGD(head, job.args.momentum), []
    optimizer.param_groups[0]["lr"] = job.args.lr
    if share < 1:
        head.graph = random_graph(head)

    def step(features, labels):
        head.select(labels, len(done))
        head(features, labels, cfg.global_batch).backward()
        head.reduce()
        optimizer.step()
        head.zero_grad()
        done.append(1)

    return step, lambda: head.weight.detach()


def torch_full(job, share, loss_of=lambda features, rows, labels: F.cross_entropy(features @ rows.T, labels)):
    weight = torch.nn.Parameter(job.rows())
    optimizer = job.sgd([weight])

    def step(features, labels):
        loss_of(SCALE * F.normalize(features), F.normalize(weight), labels).backward()
        distributed.all_reduce(weight.grad)
        weight.grad /= job.world.size
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: weight.detach()[job.shard.first : job.shard.last]


def cce(job, share):
    from cut_cross_entropy.torch_compile import torch_compile_linear_cross_entropy

    return torch_full(job, share, torch_compile_linear_cross_entropy)


def loss_parallel(job, share):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
    from torch.distributed.tensor import Shard as Split
    from torch.distributed.tensor.parallel import loss_parallel as context

    mesh = init_device_mesh("cpu", (job.world.size,))
    weight = torch.nn.Parameter(distribute_tensor(job.rows(), mesh, [Split(0)]))
    optimizer = job.sgd([weight])

    def step(features, labels):
        of_all = DTensor.from_local(F.normalize(features), mesh, [Split(0)]).redistribute(placements=[Replicate()])
        labels = DTensor.from_local(job.gathered(labels), mesh, [Replicate()])
        with context():
            F.cross_entropy(SCALE * of_all @ F.normalize(weight).T, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: weight.detach().to_local()


def partial_fc(job, share):
    from partial_fc_v2 import PartialFC_V2

    head = PartialFC_V2(lambda logits, labels: SCALE * logits, job.dim, job.num_classes, share)
    with torch.no_grad():
        head.weight.copy_(job.rows(job.shard))
    optimizer = job.sgd(head.parameters())

    def step(features, labels):
        head(features, labels.clone()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: head.weight.detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.01], help="of the classes: knn, partial_fc")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch-per-rank", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--partial-fc", help="folder with partial_fc_v2.py")
    parser.add_argument("--cce", help="folder with the package cut_cross_entropy")
    args = parser.parse_args()
    for folder, file in (args.partial_fc, "partial_fc_v2.py"), (args.cce, "cut_cross_entropy"):
        if folder and not (Path(folder) / file).exists():
            raise UserError(f"{folder} has no {file}: see --help for how to get it")
        sys.path[:0] = [folder] * bool(folder)
    if min(args.repeats, args.dim, args.batch_per_rank, *args.classes) < 1 or not all(0 < s < 1 for s in args.shares):
        raise UserError("--classes, --dim, --batch-per-rank and --repeats must be at least 1, --shares between 0 and 1")

    world = open_world("cpu")
    least = min(args.classes) * min(args.shares)
    if least < args.batch_per_rank * world.size or not math.isfinite(args.lr):
        raise UserError(f"the smallest share of --classes is {least:g} classes, fewer than the examples of a batch, or "
                        "--lr is not finite: take more")
    meeting = tempfile.mkdtemp() if world.rank == 0 else ""
    meeting = world.all_ranks.all_gather_object(meeting)[0]
    distributed.init_process_group("gloo", init_method=f"file://{meeting}/store", rank=world.rank,
                                   world_size=world.size)
    torch.Tensor.cuda = lambda tensor, *_, **__: tensor
    systems = [("full", ours, 1.0)] + [(f"knn:{share:g}", ours, share) for share in args.shares]
    systems += [("torch", torch_full, 1.0), ("loss_parallel", loss_parallel, 1.0)]
    if args.partial_fc:
        systems += [(f"partial_fc:{share:g}", partial_fc, share) for share in (1.0, *args.shares)]
    systems += [("cce", cce, 1.0)] * bool(args.cce)
    result = {"ranks": world.size, "dim": args.dim, "batch_per_rank": args.batch_per_rank, "momentum": args.momentum}
    for num_classes in args.classes:
        found = {}
        for name, make, share in systems:
            found[name] = measure(Job(args, num_classes, world), make, share)
            if world.rank == 0:
                print(f"{num_classes:>10,}  {name:18}" + "".join(f"  {key} {value:10,.3f}"
                                                                for key, value in found[name].items()), flush=True)
        found |= ratios(found, args.shares)
        result |= {f"{num_classes}.{name}.{key}": value for name, one in found.items() for key, value in one.items()}
    if world.rank == 0:
        print(json.dumps({name: round(value, 4) for name, value in result.items()}))
    distributed.destroy_process_group()
    if world.rank == 0:
        shutil.rmtree(meeting, ignore_errors=True)


def measure(job, make, share):
    """{ms, cpu_ms, peak_mb, loss} of one classifier. Collective."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the last one freed goes back to the system
    batches = [job.examples(number) for number in range(WARM_UP + job.args.repeats)]
    reset_peak()
    idle = rss_mb()
    step, rows = make(job, share)
    waiting = iter(batches)
    ms, cpu = median_step(lambda: step(*next(waiting)), job.args.repeats, WARM_UP)
    mine = torch.tensor([ms, cpu, peak_rss_mb() - idle], dtype=torch.float64)
    ms, cpu, peak = job.world.all_ranks.all_reduce(mine, "max").tolist()
    return {"ms": ms, "cpu_ms": cpu, "peak_mb": peak, "loss": job.loss(rows())}


def ratios(found, shares):
    others = [one["ms"] for name, one in found.items() if name in ("torch", "loss_parallel", "cce", "partial_fc:1")]
    result = {"full": min(others) / found["full"]["ms"]}
    result |= {f"knn:{share:g}": found[f"partial_fc:{share:g}"]["ms"] / found[f"knn:{share:g}"]["ms"]
               for share in shares if f"partial_fc:{share:g}" in found}
    return {"ratio": result}


if __name__ == "__main__":
    run(main)
