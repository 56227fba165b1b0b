"""Checkpoints and what is in them."""

import contextlib
import io
import json
import os
import shutil
import zlib

import torch
from safetensors.torch import load_file, save_file

from tests.fuzz.changes import INTEGERS, TEXTS, change_bytes, change_json, change_json_file, one_of
from xc import config
from xc.checkpoint import layout, newest
from xc.checkpoint import state as checkpoint
from xc.checkpoint import writer as saver
from xc.comm.world import World
from xc.gradients import exchanges as exchange
from xc.model import backbone
from xc.model import head_table as heads
from xc.optim import schedule
from xc.optim.noise_scale import NoiseScale
from xc.optim.optimizers import RowSGD, backbone_optimizer
from xc.run.loss_meter import LossMeter

CLASSES, WIDTH = 23, 4
IDENTITY = {"seed": 0, "classes_digest": "abc"}
SETTINGS = {
    "full": ("--head-momentum", "0.9"),
    "knn": ("--head", "knn", "--neighbors", "3"),
    "approximate": ("--head", "knn", "--neighbors", "3", "--graph", "approx"),
    "selective": ("--head", "selective"),
    "dgc": ("--exchange", "dgc", "--optimizer", "sgd", "--lr", "0.1"),
}


def a_state(flags, begun):
    """A state of training; `begun`: with all that a run has after some steps."""
    cfg = config.parse(["--data", "unused", "--out", "unused", "--feature-dim", str(WIDTH), "--active-classes", "12",
                        "--global-batch", "4", *flags])
    world = World()
    with contextlib.redirect_stderr(io.StringIO()):  # warnings of --exchange dgc on one rank
        net = backbone.build("mlp", (6,), WIDTH, 0, world)
        head = heads.build(cfg, CLASSES, world)
        gradients = exchange.build(net, world, cfg)
    body = backbone_optimizer(net, cfg, gradients.keeps_momentum)
    if begun:
        head.refresh(0, due=True)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        body.step()
    return checkpoint.State(net, body, head, RowSGD(head, cfg.head_momentum), gradients, NoiseScale(), LossMeter())


def make_runs(folder):
    for name, flags in SETTINGS.items():
        writer = saver.CheckpointWriter(folder / name, World(), IDENTITY, keep=2)
        for step in 3, 4:
            writer.save(a_state(flags, begun=True), schedule.Progress(step, 7 * step, 7), 0.5)
        writer.finish(last=True)


def change_meta(random, folder):
    """Half of the time with a checksum that is right, so that what is behind it is met."""
    path = one_of(random, _only_one(random, folder), "meta.json")
    change_json_file(random, path)
    if random.randrange(2):
        with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
            layout.write_meta(path.parent, json.loads(path.read_text()))


def change_tables(random, folder):
    """Change a file of tensors, and let meta.json say that it is as it was written."""
    run = _only_one(random, folder)
    path = one_of(random, run, "*.safetensors")
    kind = random.randrange(4)
    if kind == 0:
        change_bytes(random, path)
    elif kind == 1:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = change_json(random, json.loads(content[8 : 8 + length])).encode()
        length = len(header) if random.randrange(8) else random.choice(INTEGERS) % 2**64
        path.write_bytes(length.to_bytes(8, "little") + header + content[8 + length :])
    elif kind == 2:
        change_tensors(random, path)
    else:
        others = ("rows-000000000000-999999999999", "neighbors-x", "index-000000000000-000000000001",
                  "index-000000000023-000000000000", "residuals-999999-000000")
        name = random.choice((*(p.name for p in path.parent.glob("*.safetensors")),
                              *(f"{other}.safetensors" for other in others)))
        if name != path.name:
            (shutil.copy if random.randrange(2) else os.rename)(path, path.with_name(name))
    meta_path = path.with_name("meta.json")
    if meta_path.exists():
        meta = json.loads(meta_path.read_text())
        meta["files"] = {p.name: {"bytes": p.stat().st_size, "crc32": zlib.crc32(p.read_bytes())}
                         for p in path.parent.glob("*.safetensors") if layout._FILE.fullmatch(p.name)}
        layout.write_meta(path.parent, meta)


def change_tensors(random, path):
    tensors = load_file(path)
    for _ in range(random.randint(1, 2)):
        name = random.choice(sorted(tensors))
        tensor, kind = tensors[name].clone(), random.randrange(6)
        if kind == 0:
            del tensors[name]
            other = random.choice((*TEXTS, "u.0", "v.-5", "u.99999999999", "x.y", "a.b.c"))
            tensors[other.encode(errors="replace").decode()] = tensor
        elif kind == 1:
            shape = random.choice(((), (0,), (0, 0), (1,), (1, 1), (5,), (2**20,), (*tensor.shape, 1),
                                   tensor.shape[1:]))
            tensors[name] = tensor.new_zeros(shape)
        elif kind == 2:
            types = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
            tensors[name] = tensor.to(random.choice(types))
        elif tensor.numel():
            flat = tensor.view(-1)
            number = random.choice((*INTEGERS, 3, 23, 24))
            if tensor.is_floating_point():
                number = random.choice((float("nan"), float("inf"), -1.0, 1e38))
            elif tensor.dtype != torch.bool:
                limits = torch.iinfo(tensor.dtype)
                number = min(max(number, limits.min), limits.max)
            place = random.randrange(len(flat))
            flat[place : place + random.choice((1, len(flat)))] = number
            tensors[name] = tensor
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _only_one(random, folder):
    """Choose one of the runs; the others go."""
    runs = sorted(folder.iterdir())
    chosen = random.choice(runs)
    for run in runs:
        if run != chosen:
            shutil.rmtree(run)
    return chosen


def read_run(folder, out):
    for run in sorted(folder.iterdir()):
        state = a_state(SETTINGS[run.name], begun=False)
        with contextlib.redirect_stderr(io.StringIO()):
            folder = newest.to_resume("auto", run, World())
        with World().raise_on_all_ranks():
            checkpoint.load(folder, state, IDENTITY)
        labels = torch.tensor([0, 5, 22])
        state.head.select(labels, 3)
        state.head(torch.ones(3, state.head.feature_dim), labels, 3)  # looks into the graph
        checkpoint.files_of(state, World())  # what was read can be written
