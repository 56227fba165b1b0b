"""Preflight: the data set, the weights of the start, the run folder, and space for checkpoints."""

import os
import secrets
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from xc.checkpoint.saved_run import is_run, open_saved
from xc.comm.world import World
from xc.data import loader
from xc.data.augment import norm_of, prepared
from xc.data.class_names import names_of
from xc.data.evaluated import classes_without_images, how_to_split, split_while_training, tested_at_the_end
from xc.data.pack_split import PackSplit
from xc.errors import UserError, one_line
from xc.model import backbone as backbones
from xc.model import start_weights
from xc.optim.schedule import Schedule
from xc.preflight.report import MIB, listed, on_all_ranks, on_rank_0, size_text
from xc.run import folder as run_folder

_TEST_BYTES = 64 * MIB  # written to measure the speed of the disk
_NAMED = 4  # of the classes that train has no image of
_TEST_RECORDS = 256  # read to measure the speed of one thread


@dataclass(frozen=True)
class Examples:
    """Facts about the training split of --data.

    order_bytes             memory for the order of examples
    max_accumulation_steps  of a step
    digest                  of the list of classes
    """

    num_classes: int
    num_records: int
    input_shape: tuple
    order_bytes: int
    max_accumulation_steps: int
    digest: str


def report_data(report, cfg, world):
    """Open --data on all ranks and read some of it on rank 0. Returns its Examples. Collective."""
    splits = {}

    def opened():
        splits.update(loader.open_splits(cfg))
        train = splits["train"]
        norm_of(cfg.input_norm, cfg.channels)
        order_bytes = train.order_bytes if isinstance(train, PackSplit) else 0
        accumulation_steps = Schedule.of(cfg, len(train), world.size).max_accumulation_steps
        return Examples(train.num_classes, len(train), train.input_shape, order_bytes, accumulation_steps,
                        train.classes_digest)

    def read():
        train = splits["train"]
        records = train.order(cfg.seed).records(0, min(_TEST_RECORDS, len(train)))
        start = time.perf_counter()
        inputs, _ = train.examples(records)
        if world.device.type == "cpu":  # otherwise the GPU does this
            prepared(inputs, 0, cfg.augment, cfg.seed)
        return len(records) / (time.perf_counter() - start)

    found = on_all_ranks(world, opened)
    if len(set(found)) > 1:
        raise UserError(f"--data {cfg.data} is not the same on all ranks: use a file system that all hosts share")
    rate = on_rank_0(world, read)
    sizes = " + ".join(f"{len(split):,}" for split in splits.values())
    untrained = on_rank_0(world, lambda: _untrained(splits))
    report.add("data", f"{found[0].num_classes:,} classes, {sizes} examples ({' + '.join(splits)}), one thread reads "
                       f"{rate:,.0f} a second")
    _report_evaluation(report, cfg, splits, untrained)
    return found[0]


def _untrained(splits):
    """{split: (number of its classes without an image in train, names of the first ones)} of val and test."""
    found = {name: classes_without_images(splits["train"], split) for name, split in splits.items() if name != "train"}
    return {name: (len(ids), list(names_of(torch.from_numpy(ids[:_NAMED]), splits["train"].names).values()))
            for name, ids in found.items()}


def _report_evaluation(report, cfg, splits, untrained):
    """Say what is evaluated when, and which of its classes cannot be known."""
    split = split_while_training(splits)
    if split is None:
        report.add("evaluation", f"none: {cfg.data} has neither val nor test", "warning", how_to_split(cfg.data))
        return
    at_end = (f"at the end on test, {len(splits['test']):,} examples, with the {cfg.test} weights"
              if tested_at_the_end(splits) else "and at the end, with the last weights")
    unknown = [f"{number:,} classes of {name} have no image in train: {listed(map(one_line, names), _NAMED, number)}"
               for name, (number, names) in untrained.items() if number]
    if cfg.eval == "retrieval":  # which is for such classes, too
        report.add("evaluation", f"retrieval on {split} while training, {len(splits[split]):,} examples; {at_end}")
        return
    known = "" if unknown else f"; train has images of all classes of {' and '.join(untrained)}"
    report.add_checked("evaluation", f"on {split} while training, {len(splits[split]):,} examples; {at_end}{known}",
                       "; ".join(unknown), "add images of them to train, or read top1_by_frequency, which has their "
                       "examples as 0")


def report_start_weights(report, cfg, world, examples):
    """Try the file or the run of --init on rank 0. Collective."""
    def tried():
        net = backbones.build(cfg.backbone, examples.input_shape, cfg.feature_dim, cfg.seed, World(), cfg.amp)
        if not is_run(cfg.init):
            return start_weights.load(net, Path(cfg.init))
        saved = open_saved(cfg.init, "", World())
        saved.start(net, cfg, images=len(examples.input_shape) == 3)
        num_old = saved.class_table(advice="move the pack of that run back").num_classes
        return [f"backbone and class rows of {saved.run}, {saved.folder.name}, of {num_old:,} classes"]

    report.add("start weights", "; ".join(line.removeprefix("init: ") for line in on_rank_0(world, tried)))


def report_run_folder(report, cfg, world, plan):
    """Write a hidden folder into the run folder, or into its nearest existing parent, and delete it. Collective.

    plan  MemoryPlan, for the size of checkpoints; None if it is not known
    """
    folder = Path(on_rank_0(world, lambda: _make_test_folder(cfg)))
    try:
        problems = on_all_ranks(world, lambda: _try_folder(folder, world.rank))
        free, in_use, rate, unseen = on_rank_0(world, lambda: _measure_folder(folder, world.size, Path(cfg.out)))
    finally:
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    problems = [f"rank {rank} {problem}" for rank, problem in enumerate(problems) if problem]
    problems += [f"rank 0 does not see what rank {rank} writes" for rank in unseen]
    value = f"{cfg.out}: {rate / MIB:,.0f} MiB/s to the disk, {size_text(free)} free"
    report.add_checked("run folder", value, listed(problems),
                       "use a folder on a file system that all hosts share and can write to", "wrong")
    if plan:
        count = cfg.keep_checkpoints + 2  # and the best one, and one that is being written
        value = f"at most {count} of {size_text(plan.on_disk)}, {plan.on_disk / rate:,.1f} s each if one rank wrote all"
        fault = count * plan.on_disk > free + in_use and f"more than the {size_text(free)} free"
        report.add_checked("checkpoints", value, fault, "use another --out, or a lower --keep-checkpoints", "wrong")


def _make_test_folder(cfg):
    """Create a hidden folder in --out or in its nearest existing parent; returns its path. UserError if it cannot."""
    run_folder.check(cfg)
    base = Path(cfg.out).absolute()
    while not base.is_dir():
        if base.exists():
            raise UserError(f"--out {cfg.out} cannot be created: {base} is not a folder")
        base = base.parent
    try:
        return tempfile.mkdtemp(prefix=".check-", dir=base)
    except OSError as error:
        raise UserError(f"--out {cfg.out} cannot be written to ({error}): use another folder") from error


def _try_folder(folder, rank):
    """Write a file into the folder. Returns what is wrong with the folder for this rank; "" if nothing is."""
    try:
        if not folder.is_dir():
            return "does not see what rank 0 writes"
        (folder / f"{rank}").touch()
    except OSError as error:
        return f"cannot write there ({error.strerror})"
    return ""


def _measure_folder(folder, num_ranks, out):
    """(bytes free, bytes of existing checkpoints, bytes written per second, ranks whose files are not visible here)."""
    block = secrets.token_bytes(MIB)  # random, so that no file system compresses it
    start = time.perf_counter()
    with open(folder / "speed", "wb") as file:
        for _ in range(_TEST_BYTES // MIB):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    rate = _TEST_BYTES / (time.perf_counter() - start)
    in_use = sum(file.stat().st_size for file in out.glob("checkpoints/*/*"))
    unseen = [rank for rank in range(num_ranks) if not (folder / f"{rank}").exists()]
    return shutil.disk_usage(folder).free + _TEST_BYTES, in_use, rate, unseen
