"""Writes packs; xc/data/pack.py documents their layout and reads them."""

import math
import os
from array import array
from typing import NamedTuple

import h5py
import numpy as np

from xc.data import pack as layout
from xc.files import sync


class Shard(NamedTuple):
    """What the index and a resumed process must know about a shard."""

    records: int
    num_bytes: int  # of its images
    file_bytes: int


class ShardWriter:
    """Collects records and writes them as one shard after the other.

    number       of the next shard
    has_weights  whether weights are written
    """

    def __init__(self, folder, shard_bytes, has_weights=False, number=0):
        self.number, self._folder, self._shard_bytes = number, folder, shard_bytes
        self._tables = layout.SHARD_TABLES | (layout.WEIGHT_TABLES if has_weights else {})
        os.makedirs(folder, exist_ok=True)
        self._clear()

    def fits(self, data):
        """Whether the next shard has room for this record; it always has room for the first."""
        return not self._labels or len(self._bytes) + len(data) <= self._shard_bytes

    def add(self, data, crc, label, weight=math.nan):
        self._bytes += data
        self._ends.append(len(self._bytes))
        self._labels.append(label)
        self._crcs.append(crc)
        self._weights.append(weight)

    def write(self):
        """Writes the collected records and returns the Shard."""
        tables = {"bytes": np.frombuffer(self._bytes, np.uint8), "offsets": self._ends, "labels": self._labels,
                  "crc32": self._crcs, "weights": self._weights}
        size = _write(os.path.join(self._folder, layout.SHARD_FILE.format(self.number)), self._tables, tables,
                      num_records=len(self._labels), shard=self.number)
        shard = Shard(len(self._labels), len(self._bytes), size)
        self.number += 1
        self._clear()
        return shard

    def _clear(self):
        self._bytes, self._ends, self._labels, self._crcs = bytearray(), array("q", [0]), array("q"), array("I")
        self._weights = array("f")


class PackWriter:
    """Writes the shards of one pack, then its index. A shard ends before the record that would exceed shard_bytes."""

    def __init__(self, folder, shard_bytes, class_counts, has_weights=False):
        """class_counts  (C,) int64 zeros, in which the writer counts the records of each class"""
        self.class_counts, self.shards, self._folder, self._has_weights = class_counts, [], folder, has_weights
        self._writer = ShardWriter(folder, shard_bytes, has_weights)

    def add(self, data, crc, label, weight=math.nan):
        """Takes a record; its weight is ignored if the pack has no weights."""
        if not self._writer.fits(data):
            self.end_shard()
        self._writer.add(data, crc, label, weight)
        self.class_counts[label] += 1

    def end_shard(self):
        self.shards.append(self._writer.write())

    def write_index(self, table, **attributes):
        write_index(os.path.join(self._folder, layout.INDEX_FILE), self.shards, self.class_counts, table,
                    self._has_weights, **attributes)


def write_index(path, shards, class_counts, table, has_weights, **attributes):
    """Writes the index of a pack.

    shards        [Shard] by their numbers
    class_counts  (C,) int64
    table         ClassTable
    attributes    source, seed, skipped
    """
    tables = {"shard_records": [shard.records for shard in shards],
              "shard_file_bytes": [shard.file_bytes for shard in shards], "class_names": table.names,
              "class_name_offsets": table.ends, "class_counts": class_counts}
    if has_weights:
        attributes["has_weights"] = 1
    _write(path, layout.INDEX_TABLES, tables, num_records=sum(shard.records for shard in shards),
           num_classes=len(table), num_bytes=sum(shard.num_bytes for shard in shards),
           classes_digest=layout.classes_digest([table.ends], [table.names]), **attributes)


def renumber(path, number):
    """Changes the number of a shard, and nothing else."""
    with h5py.File(path, "r", locking=False) as file:
        if file.attrs["shard"] == number:
            return
    with h5py.File(path, "r+", locking=False) as file:
        file.attrs.modify("shard", np.int64(number))
    sync(path)


def labels_of(path):
    """(n,) int64: labels of the records of a shard."""
    with h5py.File(path, "r", locking=False) as file:
        return file["labels"][:]


def _write(path, kinds, tables, **attributes):
    """Writes an HDF5 file of flat tables, kinds {name: dtype}, tables {name: array}; returns its size in bytes."""
    arrays = {name: np.asarray(tables[name], dtype) for name, dtype in kinds.items()}
    with open(path, "wb") as file:  # fails here if the disk is full: HDF5 fails later, with pages of text
        os.posix_fallocate(file.fileno(), 0, sum(array.nbytes for array in arrays.values()) + 2**16)
    with h5py.File(path, "w", locking=False) as file:  # nobody else knows the file yet
        for name, value in {"format": layout.FORMAT, "version": layout.VERSION, **attributes}.items():
            file.attrs[name] = np.int64(value) if isinstance(value, int) else np.bytes_(os.fsencode(value))
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)
    sync(path)  # a network file system may fail only now
    return os.path.getsize(path)
