"""What FCCS adds to a step: the schedule, LARS in place of SGD, and the look at the gradients' noise.

    python benchmarks/fccs_cost.py [--backbone resnet18 --image-size 32 --batch 32 --classes 10000]

One process. A step is forward, head, backward, exchange and update of one rank with plain SGD, in two micro-batches;
each part is timed by itself between such steps. Its last line is one JSON object: milliseconds (medians), and the share
of the step that the parts come to.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import median_step, report
from xc import config
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.gradients.allreduce import AllReduce
from xc.model import backbone as backbones
from xc.model import head_table as heads
from xc.optim import noise_scale
from xc.optim.optimizers import RowSGD, backbone_optimizer, set_lr
from xc.optim.schedule import Progress, Schedule
from xc.run.metrics import Timer
from xc.train import pipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    cfgs = {name: config.parse([str(word) for word in (
        "--data", "none", "--out", "none", "--global-batch", args.batch, "--micro-batches", 2, "--optimizer", name,
        "--image-size", args.image_size, "--lr", 1e-4, "--head-lr-scale", 40, "--schedule", "fccs", "--max-batch",
        8 * args.batch)])
        for name in ("sgd", "lars")}
    cfg, world, timer = cfgs["sgd"], open_world("cpu"), Timer()
    backbone = backbones.build(args.backbone, (1, args.image_size, args.image_size), cfg.feature_dim, 0, world)
    head, exchange = heads.build(cfg, args.classes, world), AllReduce(backbone, world)
    optimizers = {name: backbone_optimizer(backbone, one) for name, one in cfgs.items()}
    rows, schedule = RowSGD(head, 0.0), Schedule.of(cfg, 10**6, 1)
    generator, noise = torch.Generator().manual_seed(0), noise_scale.NoiseScale()
    batch = [(torch.randn(args.batch // 2, 1, args.image_size, args.image_size, generator=generator),
              torch.randint(args.classes, (args.batch // 2,), generator=generator)) for _ in range(2)]
    labels, now = torch.cat([part for _, part in batch]), schedule.plan(Progress())

    def step(optimizer, watched=None):
        exchange.noise_seed = watched
        head.select(labels, 0, micro_batches=len(batch))
        pipeline.forward_backward(backbone, head, exchange, batch, labels, now, timer)
        exchange.reduce()
        head.reduce()
        if norms := exchange.norms(now):
            noise.measure(*norms)
        optimizer.step()
        rows.step()
        exchange.zero_grad()
        head.zero_grad()

    def plan():
        for _ in range(1000):
            now = schedule.plan(Progress(5, 5 * args.batch, args.batch))
            schedule.due(Progress(5, 5 * args.batch, args.batch), "1epochs")
            set_lr(optimizers["lars"], now.lr)

    def look():
        exchange.noise_seed = 0
        exchange.after_first_backward()
        for bucket in exchange._buckets:
            exchange.on_bucket_ready(bucket)
        noise.measure(*exchange.norms(now))
        exchange.zero_grad()

    def update(optimizer):
        def timed():
            start = time.perf_counter()
            optimizer.step()
            spent.append(1e3 * (time.perf_counter() - start))
        spent = []
        for _ in range(args.repeats + 3):
            for bucket in exchange._buckets:
                bucket.flat.normal_(generator=generator)
            timed()
        return sorted(spent)[len(spent) // 2]

    whole, cpu = median_step(lambda: step(optimizers["sgd"]), args.repeats, 3)
    looked, _ = median_step(look, args.repeats, 3)
    updates = {name: update(optimizer) for name, optimizer in optimizers.items()}
    planned, _ = median_step(plan, args.repeats, 3)
    parts = {"lars_ms": updates["lars"] - updates["sgd"], "noise_ms": looked / noise_scale.EVERY,
             "schedule_ms": planned / 1000}
    report(f"{args.backbone}, {args.batch} images of {args.image_size} pixels", {
        "step_ms": whole, "step_cpu_ms": cpu, "sgd_ms": updates["sgd"], "lars_whole_ms": updates["lars"],
        "look_ms": looked, **parts, "share": sum(parts.values()) / whole})


if __name__ == "__main__":
    run(main)
