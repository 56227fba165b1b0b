"""The yardstick for train.py: the same network, data order, augmentation and schedule in one process, with torch's own
nn.Linear, CrossEntropyLoss and SGD for the rows in place of the sharded head, its row optimizer and the exchange.

    python benchmarks/dense_baseline.py --data data/glyphs.pack [--plain-adamw RATE] [the flags of train.py]

--plain-adamw: what one would write without this project. One torch.optim.AdamW as it comes for the backbone and
nn.Linear, and torch's OneCycleLR with that peak rate; the flags of optimizer and schedule are not used. Neither is
--out, with either.

Its last line is one JSON object with top1, top5, steps, seconds.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import report
from xc import config
from xc.comm.launch import run
from xc.comm.shard import Shard
from xc.comm.world import World
from xc.data import loader as data
from xc.errors import UserError
from xc.model import backbone as backbones
from xc.model.initial_rows import initial_rows
from xc.model.logit_scale import logit_scale
from xc.optim.optimizers import backbone_optimizer, set_lr
from xc.optim.schedule import Schedule
from xc.optim.schedule_plot import steps_of


def main():
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--plain-adamw", type=float)
    args, flags = parser.parse_known_args()
    cfg = config.parse([*flags, "--out", "unused"])
    packs = data.open_splits(cfg)
    if cfg.margin != "none" or "test" not in packs:
        raise UserError("the dense baseline has no margins and needs data with a test split")
    schedule = Schedule.of(cfg, len(packs["train"]), num_ranks=1)
    backbone = backbones.build(cfg.backbone, packs["train"].input_shape, cfg.feature_dim, cfg.seed, World())
    num_classes = packs["train"].num_classes
    scale = logit_scale(cfg, num_classes)
    linear = nn.Linear(cfg.feature_dim, num_classes, bias=False)
    with torch.no_grad():  # both start from the same rows, so that their first losses can be compared
        linear.weight.copy_(initial_rows(Shard(0, num_classes), cfg.feature_dim, cfg.seed))
    criterion = nn.CrossEntropyLoss()
    step = (plain_adamw(args.plain_adamw, backbone, linear, schedule) if args.plain_adamw
            else as_train_does(cfg, backbone, linear))

    def logits_of(images):
        features = backbone(images)
        if cfg.logits == "inner":
            return linear(features)
        return scale * F.linear(F.normalize(features), F.normalize(linear.weight))

    start = time.perf_counter()
    batches = data.Loader(packs["train"], cfg, World()).train(0, schedule.examples, cfg.global_batch)
    for progress, now in steps_of(schedule):
        images, labels = (torch.cat(parts) for parts in zip(*batches.take(now.accumulation_steps), strict=True))
        loss = criterion(logits_of(images), labels)
        loss.backward()
        step(now.lr)
        if progress.step < 3 or (progress.step + 1) % 500 == 0:
            print(f"step {progress.step + 1}/{schedule.num_steps}  loss {loss.item():.6f}", flush=True)

    backbone.eval()
    hits = torch.zeros(2)
    with torch.no_grad():
        for images, labels in data.Loader(packs["test"], cfg, World()).test(512):
            best = logits_of(images).topk(min(5, num_classes)).indices == labels[:, None]
            hits += torch.tensor([best[:, 0].sum(), best.any(1).sum()])
    top1, top5 = (hits / len(packs["test"])).tolist()
    report("dense baseline, one process", {
        "top1": top1, "top5": top5, "steps": schedule.num_steps, "seconds": time.perf_counter() - start,
        "classes": num_classes, "logits": cfg.logits})


def as_train_does(cfg, backbone, linear):
    """step(rate): one update by the optimizers of a Config, with SGD for the rows."""
    optimizers = [backbone_optimizer(backbone, cfg), torch.optim.SGD(linear.parameters(), cfg.lr, cfg.head_momentum)]
    scales = [cfg.backbone_lr_scale, cfg.head_lr_scale]

    def step(rate):
        for optimizer, scale in zip(optimizers, scales, strict=True):
            set_lr(optimizer, rate * scale)
            optimizer.step()
            optimizer.zero_grad()

    return step


def plain_adamw(peak, backbone, linear, schedule):
    """step(rate): one update by AdamW with a one-cycle rate up to `peak`; the rate of the schedule is not used."""
    optimizer = torch.optim.AdamW([*backbone.parameters(), *linear.parameters()], peak)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=schedule.num_steps)

    def step(rate):
        optimizer.step()
        optimizer.zero_grad()
        cycle.step()

    return step


if __name__ == "__main__":
    run(main)
