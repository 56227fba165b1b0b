"""Splits a pack into packs of training, validation and test data. data_tools/split.py says by which rules."""

import itertools
import math
import os
import shutil
import time
import zlib

import numpy as np

from data_tools.common.atomic import atomic_folder
from data_tools.common.command import check_paths
from data_tools.common.progress import Progress
from data_tools.packing.class_table import ClassTable, names_of
from data_tools.packing.writer import PackWriter
from xc.data.pack import INDEX_FILE, SPLITS, Pack, PackError


def rounded(counts, share, random):
    """(C,) int64: a share of each count (C,), rounded down or up at random; the sum is within 1 of the share of all."""
    order = random.permutation(len(counts))  # otherwise neighbours in the class table would alternate
    result = np.empty(len(counts), np.int64)
    result[order] = np.diff(np.floor(np.cumsum(counts[order]) * share + random.random()), prepend=0)
    return result


def by_image(counts, shares, random):
    """{split: (C,) int64 images that go there} for shares {split: 0 … 1}; counts (C,) are the images of each class."""
    most, result = np.maximum(counts - 1, 0), {}  # one image stays in train
    for split, share in shares.items():
        result[split] = np.minimum(rounded(np.where(counts > 1, counts, 0), share, random), most)
        most = most - result[split]
    return result


def by_class(counts, shares, random):
    """As by_image, but whole classes: the shares count classes that have images."""
    classes, result = random.permutation(np.flatnonzero(counts)), {}
    sizes = [round(share * len(classes)) for share in shares.values()]
    for split, chosen in zip(shares, np.split(classes, np.cumsum(sizes)), strict=False):
        result[split] = np.zeros_like(counts)
        result[split][chosen] = counts[chosen]
    return result


def drawn(left, label, place):
    """The split of an image of a class.

    left   {split: (C,) images that the split still needs}; it is counted down, and other images go to train
    place  uniform random number from 0 to the number of images of the class that are left: all have the same chance
    """
    for split, of_split in left.items():
        if place < of_split[label]:
            of_split[label] -= 1
            return split
        place -= of_split[label]
    return "train"


def split(src, out, *, test, val, by, seed, shard_mb):
    """Splits the pack src into the new folder out; the parameters are the flags of the command.

    returns  {split: {"records", "classes", "bytes", "shards"}, "seconds"}

    PackError or OSError, with nothing left at out, for whatever the user can fix.
    """
    started = time.monotonic()
    out = os.path.abspath(out)
    if not os.path.exists(os.path.join(src, INDEX_FILE)) and os.path.isdir(os.path.join(src, "train")):
        raise PackError(f"{src} has splits already; name one of its packs, as {os.path.join(src, 'train')}")
    if not 0 < test + val < 1:
        raise PackError(f"--test {test} and --val {val} must leave something for train and take something from it: "
                        "their sum must lie between 0 and 1")
    pack = Pack(src)
    check_paths([src], out, None)
    random = np.random.default_rng(seed)
    left = images_to_take(pack, {name: share for name, share in (("test", test), ("val", val)) if share}, by, random)
    with atomic_folder(out) as partial:
        writers = {name: PackWriter(os.path.join(partial, name), shard_mb * 1e6, np.zeros_like(pack.class_counts),
                                    pack.has_weights) for name in SPLITS if name == "train" or name in left}
        deal(pack, left, writers, random)
        work = os.path.join(partial, "classes")
        table = ClassTable(work, names_of(pack))
        for writer in writers.values():
            writer.end_shard()
        for writer in writers.values():  # last: a folder without an index is not a pack
            writer.write_index(table, source=pack.source, seed=pack.seed, skipped=0)
        shutil.rmtree(work)
    facts = {name: {"records": sum(shard.records for shard in writer.shards),
                    "classes": int(np.count_nonzero(writer.class_counts)),
                    "bytes": sum(shard.num_bytes for shard in writer.shards), "shards": len(writer.shards)}
             for name, writer in writers.items()}
    return facts | {"seconds": round(time.monotonic() - started, 3)}


def images_to_take(pack, shares, by, random):
    """{split: (C,) int64 images that go there} of the shares {split: 0 … 1}; PackError where a split gets none."""
    counts = pack.class_counts
    num_classes = np.count_nonzero(counts)
    taken = (by_image if by == "image" else by_class)(counts, shares, random)
    for name, of_split in taken.items():
        if not of_split.any():
            raise PackError(f"--{name} {shares[name]} of {pack.num_records} images of {num_classes} classes comes to "
                            f"no {by}; give more")
    if sum(of_split.sum() for of_split in taken.values()) == pack.num_records:
        shares = " and ".join(f"--{name} {share}" for name, share in shares.items())
        raise PackError(f"{shares} of {num_classes} classes leave none for train; give less")
    return taken


def deal(pack, left, writers, random):
    """Gives every record of a pack to the writer of its split; left is counted down to zero."""
    unread = pack.class_counts.copy()
    with Progress("splitting", len(pack)) as progress:
        for start, stop in pack.ranges():
            images, labels = pack.read(np.arange(start, stop))
            weights = pack.weights(start, stop) if pack.has_weights else itertools.repeat(math.nan, stop - start)
            chances = random.random(len(images))
            for image, label, weight, chance in zip(images, labels, weights, chances, strict=True):
                name = drawn(left, label, chance * unread[label])
                unread[label] -= 1
                writers[name].add(image, zlib.crc32(image), label, weight)
            progress.add(len(images))
    if unread.any():
        raise PackError(f"{pack.path}: its class_counts are not those of its records; see data_tools.show --verify")
