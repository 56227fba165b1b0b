"""Class names and their labels in files, because a hundred million names do not fit into a dictionary."""

import hashlib
import os
import struct

import numpy as np

from data_tools.packing.external_sort import Sorter
from xc.pack import PackError

ENTRY = struct.Struct(">QQ")  # hash of a name, label; sorts by the hash
BLOCK = 2**16  # numbers written at once, and names of a pack read at once


def name_hash(name):
    """64-bit hash of a name (bytes)."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


def names_of(pack):
    """The class names of a pack (bytes), in the order of their labels."""
    for start in range(0, pack.num_classes, BLOCK):
        for name in pack.class_names(start, min(start + BLOCK, pack.num_classes)):
            yield name.encode()


class ClassTable:
    """The names of classes in the order of their labels, in memory-mapped files.

    len(table)  number of classes
    names       uint8: the names one after the other
    ends        int64 (C + 1,): name i is names[ends[i]:ends[i + 1]]
    """

    def __init__(self, folder, names, memory_bytes):
        """Makes a table.

        folder        for its files; must be new
        names         iterable of names (bytes), all different, in the order of their labels; at least one
        memory_bytes  that this may take
        """
        os.mkdir(folder)
        by_hash = Sorter(os.path.join(folder, "runs"), memory_bytes)
        end = 0
        with _Numbers(os.path.join(folder, "ends")) as ends, open(os.path.join(folder, "names"), "wb") as flat:
            ends.add(0)
            for label, name in enumerate(names):
                flat.write(name)
                end += len(name)
                ends.add(end)
                by_hash.add(ENTRY.pack(name_hash(name), label))
        last = None
        with _Numbers(os.path.join(folder, "hashes")) as hashes, _Numbers(os.path.join(folder, "labels")) as labels:
            for number, label in map(ENTRY.unpack, by_hash):
                if number == last:
                    raise PackError(f"two class names have the same hash {number:016x}; rename one of them")
                last = number
                hashes.add(number)
                labels.add(label)
        self._map(folder)

    @classmethod
    def open(cls, folder):
        """The table that a ClassTable left in this folder."""
        table = cls.__new__(cls)
        table._map(folder)
        return table

    def _map(self, folder):
        self.folder = folder
        self.ends = _mapped(folder, "ends", np.int64)
        self.names = _mapped(folder, "names", np.uint8)
        self._hashes, self._labels = _mapped(folder, "hashes", np.uint64), _mapped(folder, "labels", np.int64)

    def __len__(self):
        return len(self.ends) - 1

    def name(self, label):
        return self.bytes_of(label).decode()

    def bytes_of(self, label):
        """The name as it is kept, in UTF-8."""
        return self.names[self.ends[label] : self.ends[label + 1]].tobytes()

    def labels(self, hashes):
        """(n,) int64: labels of the names with these hashes (n,) uint64; −1 where there is none."""
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[places] == hashes, self._labels[places], -1)


class _Numbers:
    """Writes numbers of 64 bits to a file, a block at a time."""

    def __init__(self, path):
        self._file, self._block = open(path, "wb"), []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if error[0] is None:
            self._write()
        self._file.close()

    def add(self, number):
        self._block.append(number)
        if len(self._block) == BLOCK:
            self._write()

    def _write(self):
        self._file.write(np.array(self._block, np.uint64).tobytes())  # tofile does not report a full disk
        self._block = []


def _mapped(folder, name, dtype):
    return np.memmap(os.path.join(folder, name), dtype, "r")
