"""Merges the parts that several processes wrote into one pack."""

import os
import shutil

import numpy as np

from data_tools.common.atomic import atomic_path
from data_tools.packing.catalogue import zeros_file
from data_tools.packing.skipped import HEADER
from data_tools.packing.writer import labels_of, renumber, write_index
from xc.data import pack as layout
from xc.data.pack import PackError
from xc.files import sync, sync_tree


def merge(folder, out, catalogue, journals, tally, **attributes):
    """Moves the shards of all parts into one new folder out, with an index for each split.

    folder      the work folder
    catalogue   Catalogue of the pack
    journals    [Journal] of every part; all are done
    tally       Tally of all images that could not be packed
    attributes  source, seed for the index

    returns     {split: ([Shard], (C,) int64 images of each class)}

    It may be interrupted and called again: every step can be done twice.
    """
    pack, merged = os.path.join(folder, "pack"), {}
    for split in catalogue.splits:
        if not any(split in journal.shards for journal in journals):
            raise PackError(f"no image{split and ' of ' + split} can be used: {tally}")
    for split in catalogue.splits:
        os.makedirs(os.path.join(pack, split), exist_ok=True)
        counts = zeros_file(os.path.join(folder, f"written-{split}"), len(catalogue.table))
        merged[split] = shards, _ = [], counts
        for journal in journals:
            for number, shard in enumerate(journal.shards.get(split, ())):
                path = os.path.join(pack, split, layout.SHARD_FILE.format(len(shards)))
                _move(os.path.join(journal.folder, split, layout.SHARD_FILE.format(number)), path, len(shards))
                np.add.at(counts, labels_of(path), 1)
                shards.append(shard)
    for split, (shards, counts) in merged.items():  # last: a folder without an index is not a pack
        with atomic_path(os.path.join(pack, split, layout.INDEX_FILE), replace=True, folder=folder) as path:
            write_index(path, shards, counts, catalogue.table, catalogue.has_weights, skipped=tally.of_split[split],
                        **attributes)
    listing = os.path.join(folder, "listing")
    with atomic_path(os.path.join(pack, "skipped.tsv"), replace=True, folder=folder) as path:
        _join(path, [os.path.join(place, "skipped.tsv") for place in (listing, *(one.folder for one in journals))])
    if os.path.exists(left_out := os.path.join(listing, "left-out.tsv")):
        with atomic_path(os.path.join(pack, "left_out.tsv"), replace=True, folder=folder) as path:
            _join(path, [left_out])
    if os.path.exists(duplicates := os.path.join(listing, "duplicates.tsv")):
        with atomic_path(os.path.join(pack, "duplicates.tsv"), replace=True, folder=folder) as path:
            shutil.copyfile(duplicates, path)
    sync_tree(pack)
    os.rename(pack, out)
    sync(os.path.dirname(out))
    return merged


def _move(source, path, number):
    try:
        renumber(source, number)
        os.rename(source, path)
    except FileNotFoundError:
        if not os.path.exists(path):  # otherwise it was moved before
            raise PackError(f"{source} is missing, as after it went into a pack; begin anew with --restart") from None


def _join(path, lists):
    with open(path, "wb") as file:
        file.write(HEADER.encode())
        for one in lists:
            with open(one, "rb") as rows:
                shutil.copyfileobj(rows, file)
