"""Processes that pack, in parts or alone, and are stopped."""

import itertools

import numpy as np

import data_tools.packing.image_file
from tests.support.commands import run_pack, start
from tests.support.images import picture
from tests.support.sources import write_tar
from xc.data.pack import open_splits

LARGE_EXTENT = 330  # two of five images have more than half of it
FLAGS = ["--shard-mb", 5e-4, "--max-skipped", 3, "--memory-mb", 0.002, "--workers", 0]  # three images a shard


def write_source(kind, folder):
    """Two splits and three classes, images of 125 to 201 bytes; 3 of 96 are bad."""
    files = {f"{split}/c{i % 3}/{i}.png":
             b"bad" if i % 40 == 7 else picture(i + 1000 * len(split), size=(6, 3 + i % 5))
             for split, count in (("train", 71), ("test", 25)) for i in range(count)}
    if kind == "folder":
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    else:
        folder.mkdir()
        for split in "train", "test":
            members = [(name.replace("/", "-"), data) for name, data in files.items() if name.startswith(split)]
            write_tar(folder / f"{split}.tar", itertools.chain.from_iterable(
                ((name, data), (name.replace("png", "cls"), name.split("-")[1].encode())) for name, data in members))
    return folder


def stages(parts):
    """What --part is for one process after the other."""
    return [f"list/{parts}", *(f"{i}/{parts}" for i in range(parts)), f"merge/{parts}"]


def run_parts(parts, *args):
    """Make a pack by so many parts, one after the other."""
    for stage in stages(parts):
        run_pack(*args, "--part", stage)


def start_pack(*args, seconds=0.0):
    """Start a process that packs and whose fsync takes so many seconds."""
    return start(
        "import os, runpy, time, data_tools.packing.image_file; "
        f"os.fsync = lambda fd: time.sleep({seconds}); "
        f"data_tools.packing.image_file.MOST_EXTENT = {data_tools.packing.image_file.MOST_EXTENT}; "
        "runpy.run_module('data_tools.pack', run_name='__main__', alter_sys=True)", *args, *FLAGS)


def ordered_records(folder):
    """{split: [(image, class name)] in their order}; every record is checked."""
    found = {}
    for split, pack in open_splits(folder).items():
        assert pack.verify() == len(pack)
        images, labels = pack.read(np.arange(len(pack)))
        found[split] = [(image, pack.class_name(label)) for image, label in zip(images, labels, strict=True)]
    return found


def kept(out):
    """The folder that keeps what was done of a pack."""
    return out.with_name(f".{out.name}.partial-pack")


def entries(out):
    """Whole shards in the journals of a pack that is being made."""
    count = 0
    for journal in kept(out).glob("part-*/journal"):
        try:
            count += journal.read_bytes().count(b"\n")
        except FileNotFoundError:  # just then it was done
            pass
    return count
