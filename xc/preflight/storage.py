"""Preflight: the data set and the run folder."""

import os
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from xc.data import loader
from xc.data.augment import prepared
from xc.data.pack_split import PackSplit
from xc.errors import UserError
from xc.optim.schedule import Schedule
from xc.preflight.report import MIB, of_all, of_first, shown, size_text
from xc.run import folder

_WRITTEN = 64 * MIB
_RECORDS = 256  # read by one thread


@dataclass(frozen=True)
class Examples:
    """What --data names."""

    num_classes: int
    num_records: int
    input_shape: tuple
    order_bytes: int  # of the order of examples, in memory
    max_accumulation_steps: int
    digest: str


def data_set(report, cfg, world):
    """Opens --data on all ranks and reads some of it on rank 0; returns its Examples."""
    splits = {}

    def opened():
        splits.update(loader.open_splits(cfg))
        train = splits["train"]
        order_bytes = train.order_bytes if isinstance(train, PackSplit) else 0
        max_accumulation_steps = Schedule.of(cfg, len(train), world.size).max_accumulation_steps
        return Examples(train.num_classes, len(train), train.input_shape, order_bytes, max_accumulation_steps,
                        train.classes_digest)

    def read():
        train = splits["train"]
        records = train.order(cfg.seed).records(0, min(_RECORDS, len(train)))
        start = time.perf_counter()
        inputs, _ = train.examples(records)
        if world.device.type == "cpu":  # else the GPU does it
            prepared(inputs, 0, cfg.augment, cfg.seed)
        return len(records) / (time.perf_counter() - start)

    found = of_all(world, opened)
    if len(set(found)) > 1:
        raise UserError(f"--data {cfg.data} is not the same on all ranks: give one on a shared file system")
    rate = of_first(world, read)
    sizes = " + ".join(f"{len(split):,}" for split in splits.values())
    report("data", f"{found[0].num_classes:,} classes, {sizes} examples ({' + '.join(splits)}), one thread reads "
                   f"{rate:,.0f} a second")
    return found[0]


def run_folder(report, cfg, world, plan):
    """Writes into the run folder, or into the one that it would be made in, and takes it away again."""
    place = Path(of_first(world, lambda: _make_place(cfg)))
    try:
        problems = of_all(world, lambda: _try_place(place, world.rank))
        free, kept, rate, unseen = of_first(world, lambda: _measure_place(place, world.size, Path(cfg.out)))
    finally:
        if world.rank == 0:
            shutil.rmtree(place, ignore_errors=True)
    problems = [f"rank {rank} {problem}" for rank, problem in enumerate(problems) if problem]
    problems += [f"rank 0 does not see what rank {rank} writes" for rank in unseen]
    value = f"{cfg.out}: {rate / MIB:,.0f} MiB/s to the disk, {size_text(free)} free"
    report.judge("run folder", value, shown(problems), "take a folder on a file system that all hosts share, and may "
                 "write to", "wrong")
    if plan:
        count = cfg.keep_checkpoints + 2  # the best one, and one that is being written
        value = f"{count} of {size_text(plan.on_disk)} at most, {plan.on_disk / rate:,.1f} s each if one rank wrote all"
        fault = count * plan.on_disk > free + kept and f"more than the {size_text(free)} free"
        report.judge("checkpoints", value, fault, "another --out, or a lower --keep", "wrong")


def _make_place(cfg):
    folder.check(cfg)
    base = Path(cfg.out).absolute()
    while not base.is_dir():
        if base.exists():
            raise UserError(f"--out {cfg.out} cannot be made: {base} is not a folder")
        base = base.parent
    try:
        place = Path(tempfile.mkdtemp(prefix=".check-", dir=base))
    except OSError as error:
        raise UserError(f"--out {cfg.out} cannot be written to ({error}): name another folder") from error
    return place


def _try_place(place, rank):
    """What is wrong with it for this rank, "" if nothing."""
    try:
        if not place.is_dir():
            return "does not see what rank 0 writes"
        (place / f"{rank}").touch()
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def _measure_place(place, size, out):
    """(bytes free, bytes of checkpoints that are there, bytes per second that reach the disk, ranks of which no file is
    seen here)."""
    block = secrets.token_bytes(MIB)  # that no file system makes small
    start = time.perf_counter()
    with open(place / "speed", "wb") as file:
        for _ in range(_WRITTEN // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = _WRITTEN / (time.perf_counter() - start)
    kept = sum(file.stat().st_size for file in out.glob("checkpoints/*/*"))
    unseen = [rank for rank in range(size) if not (place / f"{rank}").exists()]
    return shutil.disk_usage(place).free + _WRITTEN, kept, rate, unseen
