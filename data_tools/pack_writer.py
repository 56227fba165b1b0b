"""The writer of packs; xc/pack.py has their layout and the reader."""

import math
import os
from array import array

import h5py
import numpy as np

from xc import pack as layout


class PackWriter:
    """Writes the shards of one pack, then its index. A shard ends before the record that would exceed shard_bytes."""

    def __init__(self, folder, shard_bytes, class_counts, has_weights=False):
        """class_counts  (C,) int64 zeros, which the writer counts up"""
        self.folder, self.shard_bytes, self.class_counts = folder, shard_bytes, class_counts
        self.shard_tables = layout.SHARD_TABLES | (layout.WEIGHT_TABLES if has_weights else {})
        self.shard_records, self.shard_file_bytes, self.num_bytes, self.num_added = [], [], 0, 0
        os.makedirs(folder, exist_ok=True)
        self._clear()

    @property
    def num_records(self):
        return sum(self.shard_records)

    def add(self, data, crc, label, weight=math.nan):
        """weight  is written where the pack has weights"""
        if self._labels and len(self._bytes) + len(data) > self.shard_bytes:
            self.end_shard()
        self._bytes += data
        self._ends.append(len(self._bytes))
        self._labels.append(label)
        self.num_added += 1
        self._crcs.append(crc)
        self._weights.append(weight)
        self.class_counts[label] += 1

    def end_shard(self):
        number = len(self.shard_records)
        tables = {"bytes": np.frombuffer(self._bytes, np.uint8), "offsets": self._ends, "labels": self._labels,
                  "crc32": self._crcs, "weights": self._weights}
        size = _write(os.path.join(self.folder, layout.SHARD_FILE.format(number)), self.shard_tables, tables,
                      num_records=len(self._labels), shard=number)
        self.shard_records.append(len(self._labels))
        self.shard_file_bytes.append(size)
        self.num_bytes += len(self._bytes)
        self._clear()

    def write_index(self, table, **attributes):
        tables = {"shard_records": self.shard_records, "shard_file_bytes": self.shard_file_bytes,
                  "class_names": table.names, "class_name_offsets": table.ends, "class_counts": self.class_counts}
        if self.shard_tables.keys() & layout.WEIGHT_TABLES.keys():
            attributes["has_weights"] = 1
        _write(os.path.join(self.folder, layout.INDEX_FILE), layout.INDEX_TABLES, tables, num_records=self.num_records,
               num_classes=len(table), num_bytes=self.num_bytes,
               classes_digest=layout.classes_digest([table.ends], [table.names]), **attributes)

    def _clear(self):
        self._bytes, self._ends, self._labels, self._crcs = bytearray(), array("q", [0]), array("q"), array("I")
        self._weights = array("f")


def _write(path, kinds, tables, **attributes):
    """Writes an HDF5 file of flat tables, kinds {name: dtype}, tables {name: array}; returns its size in bytes."""
    arrays = {name: np.asarray(tables[name], dtype) for name, dtype in kinds.items()}
    with open(path, "wb") as file:  # find out here whether there is room: HDF5 fails late and in pages of text
        os.posix_fallocate(file.fileno(), 0, sum(array.nbytes for array in arrays.values()) + 2**16)
    with h5py.File(path, "w") as file:
        for name, value in {"format": layout.FORMAT, "version": layout.VERSION, **attributes}.items():
            file.attrs[name] = np.int64(value) if isinstance(value, int) else np.bytes_(os.fsencode(value))
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # a network file system may refuse only now
    return os.path.getsize(path)
