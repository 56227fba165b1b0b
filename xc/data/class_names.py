"""The names of classes, in the order of their labels, in the index of a pack or in a copy of it; and where a class of
one table is in another one."""

import hashlib
import itertools

import numpy as np

from xc.data.hdf5_tables import TableFile
from xc.run import watchdog

INDEX_TABLES = {"shard_records": "<i8", "shard_file_bytes": "<i8", "class_names": "|u1",
                "class_name_offsets": "<i8", "class_counts": "<i8"}
FORMAT, VERSION = "xc-pack", 2
ATTRIBUTES = ("format", "version", "num_records", "shard", "num_classes", "num_bytes", "source", "seed", "skipped",
              "classes_digest", "has_weights")
_BLOCK = 2**16  # class names that are compared at once
_FEW = 64  # names of a block that are read one by one
NAMES = 2**12  # class names that are read at once: a name can have some kilobytes


class ClassNames:
    """The names of num_classes classes; classes_digest: str, identifies them. Threads may share it. PackError."""

    def __init__(self, index):
        """index: TableFile of INDEX_TABLES"""
        self._index = index
        self.num_classes, self.classes_digest = index.integer("num_classes"), index.text("classes_digest")
        if len(index["class_name_offsets"]) != self.num_classes + 1:
            raise index.error(f"{len(index['class_name_offsets'])} class_name_offsets do not fit {self.num_classes} "
                              "classes")

    @classmethod
    def of_file(cls, path):
        """The names in an index file of a pack, or in a copy of one."""
        return cls(TableFile(path, FORMAT, VERSION, ATTRIBUTES, INDEX_TABLES))

    def class_name(self, label):
        """Name of a label, as str."""
        return self.class_names(label, label + 1)[0]

    def class_names(self, start, stop):
        """Names of the labels start … stop − 1, as a list of str."""
        names = self._bytes(start, stop)
        try:
            return [name.decode() for name in names]
        except UnicodeDecodeError as error:
            raise self._index.error(f"a name of classes {start}:{stop} is not UTF-8") from error

    def keys(self, start, stop):
        """(stop − start,) of 16 bytes: a hash of each of these names; different names have different ones."""
        names = (name for a in range(start, stop, NAMES) for name in self._bytes(a, min(a + NAMES, stop)))
        return _hashes(names, stop - start)

    def _bytes(self, start, stop):
        if not 0 <= start <= stop <= self.num_classes:
            raise IndexError(f"labels {start}:{stop} are outside 0:{self.num_classes}")
        offsets = self._index.offsets("class_name_offsets", "class_names", start, stop)
        names, ends = self._index.read_bytes("class_names", offsets[0], offsets[-1]), (offsets - offsets[0]).tolist()
        return [names[a:b] for a, b in itertools.pairwise(ends)]


class Numbers:
    """The names of synthetic classes, as `ClassNames` has them: their numbers."""

    def __init__(self, num_classes, classes_digest):
        self.num_classes, self.classes_digest = num_classes, classes_digest

    def class_names(self, start, stop):
        return [str(label) for label in range(start, stop)]

    def keys(self, start, stop):
        return _hashes((str(label).encode() for label in range(start, stop)), stop - start)


def _hashes(names, count):
    return np.fromiter((hashlib.blake2b(name, digest_size=16).digest() for name in names), "S16", count)


def labels_in(others, names, shard):
    """(S,) int64: the label in other names of each class of a Shard; -1 where they have no class of that name.

    Its memory grows with the shard alone. Every rank reads all of the other names: at 10^8 of them, for minutes.
    """
    if others.classes_digest == names.classes_digest:
        return np.arange(shard.first, shard.last)
    found, keys = np.full(len(shard), -1), names.keys(shard.first, shard.last)
    order = np.argsort(keys)
    keys = keys[order]
    for start in range(0, others.num_classes if len(shard) else 0, _BLOCK):
        watchdog.heartbeat("comparing class names")
        wanted = others.keys(start, min(start + _BLOCK, others.num_classes))
        places = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
        same = keys[places] == wanted
        found[order[places[same]]] = start + np.flatnonzero(same)
    return found


def names_of(labels, names):
    """{label: name} of labels (any shape); reads the names of these alone, or of blocks where many are near."""
    found = {}
    wanted = labels.unique().cpu()
    for block in (wanted // NAMES).unique().tolist():
        start = block * NAMES
        some = wanted[(wanted >= start) & (wanted < start + NAMES)].tolist()
        pieces = [(label, label + 1) for label in some] if len(some) < _FEW else [(some[0], some[-1] + 1)]
        for first, last in pieces:
            found |= dict(zip(range(first, last), names.class_names(first, last), strict=True))
    return {label: found[label] for label in wanted.tolist()}
