"""Selects the images that are packed and the classes that get labels."""

import codecs
import itertools
import os
import struct
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np

from data_tools.packing.catalogue import CLASS_SPLITS, MAX_NAME_BYTES, SPLITS, Decision
from data_tools.packing.class_table import BLOCK, ClassTable, name_hash
from data_tools.packing.external_sort import Sorter
from xc.pack import PackError

PLACE = struct.Struct(">Q8sQ")  # label, sort key, number


class Choice(NamedTuple):
    table: ClassTable
    counts: dict  # {split: (C,) int64, in a file}: images of each class that are to be packed
    left_out: Counter  # {reason: images}
    num_few: int  # classes with too few images


def choose(catalogue, names, owner, decisions, folder, memory_bytes, min_images, max_images, whole_classes):
    """Selects images and classes; writes the selection into decisions.

    returns        Choice

    names          class names (bytes) in the order of their labels
    owner          whose names they are, for messages
    decisions          (number of records,) uint8, Decision of each
    folder         for the files of the tables
    min_images     a class with fewer in train (without splits: at all) gets no label; None: all get one
    max_images     of each class in train; the first in the order of packing stay; None: all
    whole_classes  whether splits have whole classes, so that min_images counts the images of all splits

    PackError where an image has no class of the table, or nothing is left.
    """
    table = ClassTable(os.path.join(folder, "classes"), names, memory_bytes // 4)
    counts, unknown = catalogue.class_counts(table, decisions, table.folder)
    num_few = 0
    if min_images is None:
        catalogue.refuse_unknown(unknown, table, owner)
    else:
        counted = [counts[split] for split in counts if whole_classes or split in CLASS_SPLITS]
        largest = max(int(sums.max()) for _, sums in _sums(counted))
        if largest < min_images:
            raise PackError(f"--min-images {min_images}: no class has that many images; the largest has {largest}")
        every = table
        frequent = (every.bytes_of(label) for first, sums in _sums(counted)
                    for label in first + np.flatnonzero(sums >= min_images))
        table = ClassTable(os.path.join(folder, "frequent"), frequent, memory_bytes // 4)
        counts, unknown = catalogue.class_counts(table, decisions, table.folder)
        num_few = len(every) - len(table)
    left_out = Counter(few=sum(unknown.values()))
    if max_images is not None:
        for split in CLASS_SPLITS & counts.keys():
            left_out["many"] += _limit(catalogue, split, table, counts[split], max_images, decisions,
                                       Sorter(os.path.join(folder, "by-class"), memory_bytes // 8))
    for split, of_split in counts.items():
        if not of_split.any():
            raise PackError(f"no image{split and ' of ' + split} is left of those that were listed; choose less "
                            "strictly, or leave that split out")
    for mapped in (decisions, *counts.values()):
        if isinstance(mapped, np.memmap):
            mapped.flush()  # parts on other nodes read it
    return Choice(table, counts, +left_out, num_few)


def _sums(counts):
    """Yields (first label, sums over a list of (C,) arrays) for one block of labels after the other."""
    for first in range(0, len(counts[0]), BLOCK):
        yield first, sum(of_split[first : first + BLOCK] for of_split in counts)


def _limit(catalogue, split, table, counts, most, decisions, by_class):
    """Marks all but `most` images of each class of a split, lowers counts to it, and returns how many were marked."""
    for first, rows in catalogue.rows():
        is_kept = decisions[first : first + len(rows)] == Decision.KEPT
        chosen = np.flatnonzero(is_kept & (rows["split"] == SPLITS.index(split)))
        labels = table.labels(rows["name"][chosen])
        many = (labels >= 0) & (counts[labels] > most)
        for label, number in zip(labels[many].tolist(), (first + chosen[many]).tolist(), strict=True):
            by_class.add(PLACE.pack(label, catalogue.sort_key(number), number))
    marked = 0
    for _, group in itertools.groupby(map(PLACE.unpack, by_class), lambda item: item[0]):
        for _, _, number in itertools.islice(group, most, None):
            decisions[number] = Decision.MANY
            marked += 1
    np.minimum(counts, most, out=counts)
    return marked


def names_in(path):
    """Sorted array of the hashes of the class names in a text file with one name on each line."""
    hashes = array("Q")
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while line := file.readline(MAX_NAME_BYTES + 3):
            if name := line.rstrip(b"\r\n"):
                hashes.append(name_hash(name))
    return array("Q", np.unique(np.frombuffer(hashes, np.uint64)).tobytes())
