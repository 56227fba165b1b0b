"""The folder of a run whose weights are random numbers: what commands on a trained run read, in milliseconds."""

import copy
import json
from dataclasses import asdict

import torch

from tests.support.worlds import run_ranks
from xc.checkpoint.state import State
from xc.checkpoint.writer import CheckpointWriter
from xc.comm.world import World
from xc.config import Config
from xc.data.pack import open_splits
from xc.gradients.allreduce import AllReduce
from xc.model import backbone as backbones
from xc.model import head_table
from xc.optim.noise_scale import NoiseScale
from xc.optim.optimizers import RowSGD, backbone_optimizer
from xc.optim.schedule import Progress
from xc.run.loss_meter import LossMeter

STEP = 3


def write_run(out, packs, ranks=1, **settings):
    """Write a run folder with one checkpoint, in files of class rows as so many ranks write them; returns its Config.

    settings  fields of Config
    """
    cfg = Config(data=str(packs), out=str(out), device="cpu", **settings)
    pack = open_splits(packs)["train"]
    out.mkdir()
    (out / "config.json").write_text(json.dumps(asdict(cfg)))
    net = random_weights(backbones.build(cfg.backbone, (cfg.channels, cfg.image_size, cfg.image_size), cfg.feature_dim,
                                         cfg.seed, World()))
    identity = {"seed": cfg.seed, "logits": cfg.logits, "input_norm": cfg.input_norm,
                "classes_digest": pack.classes_digest}

    def save(world):
        own, head = copy.deepcopy(net), head_table.build(cfg, pack.num_classes, world)
        state = State(own, backbone_optimizer(own, cfg), head, RowSGD(head, 0.0), AllReduce(own, world), NoiseScale(),
                      LossMeter())
        writer = CheckpointWriter(out, world, identity, 1, "test")
        writer.save(state, Progress(STEP, 36, 12), top1=0.25)
        writer.finish(last=True)

    run_ranks(ranks, save)
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (
        {"step": STEP, "loss": 2.0}, {"step": STEP, "split": "test", "top1": 0.25}, {"step": 9, "split": "test"},
        {"step": STEP, "split": "test", "scored_step": 1}, {"step": 9, "split": "test", "scored_step": STEP})))
    return cfg


@torch.no_grad()
def random_weights(net):
    """Gives biases, norms and statistics random numbers too (variances above zero), so that none hides a fault."""
    random = torch.Generator().manual_seed(1)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() < 2:
            numbers = torch.rand(tensor.shape, generator=random)
            tensor.copy_(0.5 + numbers if "var" in name or "weight" in name else numbers - 0.5)
    return net
