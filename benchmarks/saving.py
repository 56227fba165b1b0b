"""What checkpoints cost: the steps behind which they are written, and the speed of the disk.

    mpirun -np 2 python benchmarks/saving.py [--head full --classes 1000000 --dim 128 --every 50] FOLDER

Blocks of --every steps with a save at their begin take turns with blocks without one. A step is that of the head alone,
with features made up. FOLDER is on the disk that is measured; what is written there is removed.

overhead         a block with a save to one without, less 1; medians
wait_seconds     from the end of such a block until the save is on the disk
save_ms          what the step in which a save begins takes longer: copies of the backbone and of residuals
write_seconds    from the begin of a save to its end, with nothing computed meanwhile
save_to_dd       its speed by that of dd, which writes as many bytes in one file with fsync
load_to_dd       the same of reading a checkpoint that is not in memory; of one file by dd
resume_to_dd     the same with all checksums compared first, as --resume auto does
cpu_seconds      of all threads of the busiest rank, of one save
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from benchmarks.head_step import random_graph
from benchmarks.measure import report
from xc.checkpoint import newest
from xc.checkpoint import state as checkpoint
from xc.checkpoint import writer as saver
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.config import Config
from xc.gradients.allreduce import AllReduce
from xc.model import backbone as backbones
from xc.model.head_table import HEADS
from xc.optim.noise_scale import NoiseScale
from xc.optim.optimizers import RowSGD, backbone_optimizer
from xc.optim.schedule import Progress
from xc.run.loss_meter import LossMeter


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--head", choices=HEADS, default="full")
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch-per-rank", type=int, default=64)
    parser.add_argument("--active-ratio", type=float, default=0.1)
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    world = open_world("cpu")
    result = measure(args, world)
    if world.rank == 0:
        report(f"saves of a {args.head} head of {args.classes:,} classes every {args.every} steps", result)


def measure(args, world):
    """Results by name. Collective."""
    global_batch = args.batch_per_rank * world.size
    cfg = Config(data="-", out="-", head=args.head, feature_dim=args.dim, global_batch=global_batch,
                 active_classes=args.active_ratio)
    head = HEADS[args.head].of(cfg, args.classes, world)
    if args.head == "knn":
        head.graph = random_graph(head)
    net = backbones.build("mlp", (16,), args.dim, 0, world)
    rows = RowSGD(head, 0.0)
    rows.param_groups[0]["lr"] = 0.1
    state = checkpoint.State(net, backbone_optimizer(net, cfg, True), head, rows, AllReduce(net, world), NoiseScale(),
                             LossMeter())
    writer = saver.CheckpointWriter(args.folder, world, {"seed": 0}, keep=1)
    generator = torch.Generator().manual_seed(1000 + world.rank)
    features = torch.randn(args.batch_per_rank, args.dim, generator=generator).requires_grad_()
    steps = 0

    def save():
        writer.save(state, Progress(steps, steps, 1))

    def block(saves):
        nonlocal steps
        world.all_ranks.all_gather_object(None)
        begin = time.perf_counter()
        if saves:
            save()
        saving = time.perf_counter() - begin
        for _ in range(args.every):
            labels = torch.randint(args.classes, (args.batch_per_rank,), generator=generator)
            head.select(labels, steps)
            head(features, labels, global_batch).backward()
            head.reduce()
            rows.step()
            head.zero_grad()
            features.grad = None
            steps += 1
        stepping = time.perf_counter() - begin
        writer.finish()
        return stepping, saving, time.perf_counter() - begin - stepping

    block(saves=True)  # the first one finds new memory and a new file
    blocks = [(block(saves=False)[0], *block(saves=True)) for _ in range(args.rounds)]
    without, behind, saving, wait = (statistics.median(column) for column in zip(*blocks, strict=True))

    seconds, cpu = [], []
    for _ in range(args.rounds):
        world.all_ranks.all_gather_object(None)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        save()
        writer.finish()
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - cpu_begin)
        steps += 1
    write = statistics.median(seconds)
    folder = max(Path(args.folder, "checkpoints").glob("step-*"))
    files = sorted(folder.iterdir())
    num_bytes = sum(file.stat().st_size for file in files)

    def cold(function):
        times = []
        for _ in range(args.rounds):
            for file in files:
                _forget(file)
            world.all_ranks.all_gather_object(None)
            begin = time.perf_counter()
            function()
            world.all_ranks.all_gather_object(None)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    load = cold(lambda: checkpoint.load(folder, state, {"seed": 0}))
    resume = cold(lambda: checkpoint.load(newest.to_resume("auto", args.folder, world), state, {"seed": 0}))
    blob = Path(args.folder) / "dd"
    dd_write = dd_read = 1.0
    if world.rank == 0:
        dd_write = _dd(args.rounds, "if=/dev/zero", f"of={blob}", "conv=fsync", f"count={num_bytes >> 20}")
        dd_read = _dd(args.rounds, f"if={blob}", "of=/dev/null", forget=blob)
        blob.unlink()
        for file in files:
            file.unlink()
        folder.rmdir()
        folder.parent.rmdir()
    numbers = torch.tensor([without, behind, saving, statistics.median(cpu), write, load, resume, wait],
                           dtype=torch.float64)
    numbers = world.all_ranks.all_reduce(numbers, "max").tolist()
    without, behind, saving, cpu_seconds, write, load, resume, wait = numbers
    return {"head": args.head, "classes": args.classes, "ranks": world.size, "checkpoint_mb": num_bytes / 2**20,
            "step_ms": 1e3 * without / args.every, "overhead": behind / without - 1, "save_ms": 1e3 * saving,
            "wait_seconds": wait,
            "write_seconds": write, "cpu_seconds": cpu_seconds, "dd_write_seconds": dd_write,
            "dd_read_seconds": dd_read, "load_seconds": load, "resume_seconds": resume,
            "save_to_dd": dd_write / write, "load_to_dd": dd_read / load, "resume_to_dd": dd_read / resume}


def _dd(rounds, *arguments, forget=None):
    """Median seconds."""
    times = []
    for _ in range(rounds):
        if forget:
            _forget(forget)
        begin = time.perf_counter()
        subprocess.run(["dd", "bs=1M", *arguments], check=True, capture_output=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def _forget(path):
    """Out of the page cache."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


if __name__ == "__main__":
    run(main)
