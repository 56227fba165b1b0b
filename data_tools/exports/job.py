"""Exports a pack: reads its records and gives them to the writer of a format."""

import contextlib
import itertools
import os
import time

import numpy as np

from data_tools.common.atomic import atomic_folder
from data_tools.common.class_ids import intervals_of
from data_tools.common.command import check_paths
from data_tools.common.progress import Progress
from data_tools.exports.folder import Folders, taken_for_splits
from data_tools.exports.webdataset import TarShards
from data_tools.packing.class_table import names_of
from xc.data.pack import INDEX_FILE, PackError, open_splits


def record_numbers(pack, classes):
    """Yields record numbers (n,) in order, a block at a time.

    classes  (C,) bool: whose records; None: all
    """
    for start, stop in pack.ranges():
        records = np.arange(start, stop)
        yield records if classes is None else records[classes[pack.labels(start, stop)]]


def export(src, out, *, to, split, classes, shard_mb):
    """Writes the pack src, or folder of packs, as the new folder out; the parameters are the flags of the command.

    returns  dict of totals: records, classes, bytes, seconds, and records of each split

    ValueError or OSError, with nothing left at out, for whatever the user can fix.
    """
    started = time.monotonic()
    out = os.path.abspath(out)
    packs = open_splits(src)
    check_paths([src], out, None)
    is_split = not os.path.exists(os.path.join(src, INDEX_FILE))
    if split is not None:
        if split not in packs or not is_split:
            raise PackError(f"--split {split}: {src} has {', '.join(packs) if is_split else 'no splits'}")
        packs = {split: packs[split]}
    first = next(iter(packs.values()))
    mask = None if classes is None else mask_of(classes, first.num_classes)
    counts = {split: pack.class_counts if mask is None else pack.class_counts * mask for split, pack in packs.items()}
    totals = {split: int(of_split.sum()) for split, of_split in counts.items()}
    labels = np.flatnonzero(sum(counts.values()))
    if not len(labels):
        raise PackError(f"--classes {classes}: {src} has no images of these classes; name others")
    num_bytes = 0
    with atomic_folder(out) as partial:
        if to == "folder":
            names = itertools.compress(names_of(first), sum(counts.values()) > 0)
            shunned = taken_for_splits(name.decode() for name in names)
            writer = Folders(partial, is_split, shunned, first.has_weights)
        else:
            writer = TarShards(partial, is_split, first, shard_mb * 1e6)
        with contextlib.closing(writer), Progress("exporting", sum(totals.values())) as progress:
            for split, pack in packs.items():
                for records in record_numbers(pack, mask):
                    for number, image, label in zip(records, *pack.read(records), strict=True):
                        try:
                            writer.add(split, number, image, label, pack)
                        except PackError:
                            raise
                        except ValueError as error:
                            raise PackError(f"{pack.path}: record {number} of class {label}: {error}") from error
                        num_bytes += len(image)
                    progress.add(len(records))
                writer.end_split()
    return {"records": sum(totals.values()), "classes": len(labels), "bytes": num_bytes,
            "splits": totals if is_split else {}, "seconds": round(time.monotonic() - started, 3)}


def mask_of(classes, num_classes):
    """(C,) bool: the classes that a list such as 5-9,17,@file names; ValueError where it names classes beyond C."""
    mask = np.zeros(num_classes, bool)
    for first, last in intervals_of(classes):
        if last >= num_classes:
            raise PackError(f"--classes names {last}, but the pack has the classes 0 to {num_classes - 1}")
        mask[first : last + 1] = True
    return mask
