"""What each part of the system gains where the network is slow: full softmax and dense exchange, then, each on top of
the last, KNN softmax, overlap, DGC. Two ranks on two hosts joined by a link of a given rate.

    python benchmarks/throughput.py --rate 1gbit        or 100mbit, or none; root: the hosts are made on this machine
    srun --mpi=pmix python benchmarks/throughput.py --on-this-network     on a real cluster: any number of ranks

Stages
    full       hybrid parallel, full softmax; the backbone's gradients are summed after the backward pass
    knn        KNN softmax of --active of the classes
    overlap    gradients leave bucket by bucket inside the backward pass of the last of --micro-batches; features and
               their gradients travel behind the other micro-batches, where there are some
    dgc        --density of the gradients; selection_share of the backward pass of `knn`, which shares its core with
               nothing, is spent in choosing them, dgc_share in all that DGC does there (momentum, residual, choice,
               message)

A step is all of train.py's but reading data: images are random, so is the KNN graph (its look-up costs the same). The
stages take turns, in rounds; medians of all steps. Times are of the slowest rank.

    exposed_ms    in which a rank did nothing but wait for communication
    sent_mb       that leave a rank in a step, as its collectives count them; link_mb: as the link counts them, headers
                  and acknowledgements included
    hidden_share  of the communication time that could be hidden, what overlap hid: (exposed_ms of `knn` - exposed_ms of
                  `overlap`) / min(exposed_ms of `knn`, window). The window is the computation of `knn` behind which
                  communication can be: the last micro-batch's backward pass, and forward and head of all but the first.
    saved_share   the same with the time of the step in place of exposed_ms: less by what communication itself computes
                  (TCP, sums), which a rank of one core takes from its backward pass

Keys: images_per_second.STAGE, exposed_ms.STAGE, sent_mb.STAGE, link_mb.STAGE, total_speedup, hidden_share,
saved_share, selection_share, dgc_share.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.head_step import random_graph
from benchmarks.hosts import Hosts, link_bytes
from xc import config
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.gradients import dgc, sparse_sum
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.model import backbone as backbones
from xc.model import head_table as heads
from xc.optim.optimizers import RowSGD, backbone_optimizer
from xc.optim.schedule import StepPlan
from xc.run.metrics import Timer
from xc.train import pipeline

STAGES = ["full", "knn", "overlap", "dgc"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", default="1gbit")
    parser.add_argument("--on-this-network", action="store_true")
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--batch-per-rank", type=int, default=32)
    parser.add_argument("--active", type=float, default=0.1)
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--density", type=float, default=0.001)
    parser.add_argument("--steps", type=int, default=4, help="of a stage in a round, after one that is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=STAGES)
    args = parser.parse_args()
    if args.batch_per_rank % args.micro_batches:
        parser.error(f"--micro-batches {args.micro_batches} does not divide --batch-per-rank {args.batch_per_rank}")
    if args.on_this_network:
        run(lambda: measure(args))
        return
    try:
        with Hosts(2, args.rate) as hosts:
            hosts.mpirun(1, [sys.executable, Path(__file__).resolve(), "--on-this-network", *sys.argv[1:]])
    except subprocess.CalledProcessError as e:
        raise SystemExit(e.returncode) from None


class SumAfterwards(AllReduce):
    """Begins nothing inside the backward pass."""

    def before_last_backward(self, plan):
        pass


def timed(function, seconds, name):
    def call(*arguments):
        start = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds[name] += time.perf_counter() - start

    return call


SPENT = {"selection": 0.0, "dgc": 0.0}  # seconds of this step


def measure(args):
    sparse_sum.topk_indices = timed(sparse_sum.topk_indices, SPENT, "selection")
    dgc.SparseBucket.select = timed(dgc.SparseBucket.select, SPENT, "dgc")
    world = open_world("cpu")
    global_batch = args.batch_per_rank * world.size
    common = ["--data", "none", "--out", "none", "--global-batch", global_batch, "--feature-dim", args.dim,
              "--active-classes", args.active, "--image-size", args.image_size, "--optimizer", "sgd", "--lr", 1e-4]
    of_head = {}
    for name in ("full", "knn"):
        cfg = config.parse([str(word) for word in (*common, "--head", name)])
        of_head[name] = heads.build(cfg, args.classes, world)
    of_head["knn"].graph = random_graph(of_head["knn"])

    def stage(head, exchange_of, num_parts=1):
        backbone = backbones.build(args.backbone, (1, args.image_size, args.image_size), args.dim, 0, world)
        of_backbone = exchange_of(backbone)
        return SimpleNamespace(
            backbone=backbone, head=of_head[head], exchange=of_backbone,
            now=StepPlan(cfg.lr, global_batch, num_parts, args.density),
            optimizers=[backbone_optimizer(backbone, cfg, of_backbone.keeps_momentum), RowSGD(of_head[head], 0.0)],
            steps=[])

    parts = args.micro_batches
    stages = {"full": lambda: stage("full", lambda net: SumAfterwards(net, world)),
              "knn": lambda: stage("knn", lambda net: SumAfterwards(net, world)),
              "overlap": lambda: stage("knn", lambda net: AllReduce(net, world), parts),
              "dgc": lambda: stage("knn", lambda net: Dgc(net, world, momentum=cfg.momentum), parts)}
    stages = {name: stages[name]() for name in STAGES if name in args.only}
    generator = torch.Generator().manual_seed(world.rank)
    for number in range(args.rounds):
        for name, one in stages.items():
            for step in range(args.steps + 1):
                result = one_step(one, args, world, generator, number * 100 + step)
                if step:
                    one.steps.append(result)
            if world.rank == 0:
                seconds = one.steps[-1]["seconds"]
                print(f"round {number + 1}: {name} {1e3 * seconds:.0f} ms", file=sys.stderr, flush=True)

    medians = {name: {key: statistics.median(step[key] for step in one.steps) for key in one.steps[0]}
               for name, one in stages.items()}
    worst = {name: {key: max(rank[name][key] for rank in of_ranks) for key in one}
             for of_ranks in [world.all_ranks.all_gather_object(medians)] for name, one in medians.items()}
    if world.rank == 0:
        show(args, world, worst, global_batch)


def one_step(one, args, world, generator, step):
    count = args.batch_per_rank
    images = torch.randn(count, 1, args.image_size, args.image_size, generator=generator)
    labels = torch.randint(args.classes, (count,), generator=generator)
    batch = list(zip(images.chunk(one.now.micro_batches), labels.chunk(one.now.micro_batches), strict=True))
    world.all_ranks.all_reduce(torch.zeros(1))
    world.traffic.pop_metrics()
    SPENT.update(selection=0.0, dgc=0.0)
    one.timer = Timer()
    before, start, cpu = link_bytes(), time.perf_counter(), time.process_time()
    one.head.select(labels, step, micro_batches=one.now.micro_batches)
    pipeline.forward_backward(one.backbone, one.head, one.exchange, batch, labels, one.now, one.timer)
    with one.timer("exchange"):
        one.exchange.reduce()
        one.head.reduce()
    with one.timer("update"):
        for optimizer in one.optimizers:
            optimizer.step()
        one.exchange.zero_grad()
        one.head.zero_grad()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    traffic, phases = world.traffic.pop_metrics(), one.timer.take(1, count)
    world.all_ranks.all_reduce(torch.zeros(1))
    return {"seconds": seconds, "cpu_ms": 1e3 * cpu, "exposed_ms": traffic["waited_ms"], "sent_mb": traffic["sent_mb"],
            "link_mb": (link_bytes() - before) / 2**20, **phases, **SPENT}


def show(args, world, stages, global_batch):
    print(f"{world.size} ranks, rate {args.rate}, {args.classes:,} classes x {args.dim}, {args.backbone} on "
          f"{args.image_size} x {args.image_size}, {args.batch_per_rank} images a rank; ms a step")
    columns = ["forward_ms", "head_ms", "backward_ms", "exchange_ms", "update_ms", "exposed_ms", "cpu_ms",
               "sent_mb", "link_mb"]
    print(f"{'stage':10} {'images/s':>9} {'step ms':>9} " + " ".join(f"{name:>12}" for name in columns))
    for name, one in stages.items():
        print(f"{name:10} {global_batch / one['seconds']:9.1f} {1e3 * one['seconds']:9.1f} "
              + " ".join(f"{one[column]:12.1f}" for column in columns))
    result = {f"{key}.{name}": one[key] for name, one in stages.items() for key in ("exposed_ms", "sent_mb", "link_mb")}
    result |= {f"images_per_second.{name}": global_batch / one["seconds"] for name, one in stages.items()}
    names = list(stages)
    result["total_speedup"] = stages[names[0]]["seconds"] / stages[names[-1]]["seconds"]
    if {"knn", "overlap"} <= set(names):
        before, after, parts = stages["knn"], stages["overlap"], args.micro_batches
        window = before["backward_ms"] / parts
        window += (before["forward_ms"] + before["head_ms"]) * max(0, parts - 1) / parts
        most = min(before["exposed_ms"], window)
        result["hidden_share"] = (before["exposed_ms"] - after["exposed_ms"]) / most
        result["saved_share"] = 1e3 * (before["seconds"] - after["seconds"]) / most
    if {"knn", "dgc"} <= set(names):
        for what in "selection", "dgc":
            result[f"{what}_share"] = 1e3 * stages["dgc"][what] / stages["knn"]["backward_ms"]
    result = {key: round(value, 4) for key, value in result.items()}
    print(json.dumps({"rate": args.rate, "ranks": world.size} | result))


if __name__ == "__main__":
    main()
