"""The list of what is packed: records in an order drawn at random, and the classes they name, bounded in memory."""

import itertools
import math
import os
import struct
from bisect import bisect_left
from collections import Counter
from enum import IntEnum
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from data_tools.class_table import name_hash
from data_tools.external_sort import Sorter
from xc import pack as layout
from xc.pack import PackError

SPLITS = ("", *layout.SPLITS)  # "" of sources without splits
CLASS_SPLITS = {"", "train"}  # those whose names are the classes
ROWS = 2**16  # looked at at once
MAX_NAME_BYTES = 4096  # of a class


class Fate(IntEnum):
    """What becomes of a record: it is packed, or left out for one of the other reasons."""

    KEPT = 0
    REPEAT = 1  # the same image is there again with the same label
    LEAK = 2  # an image of train that is in val or test too
    CONFLICT = 3  # the same image has other labels
    MANY = 4  # beyond --max-images-per-class


class Record(NamedTuple):
    """One image to be packed."""

    split: str
    path: str  # below the root of its source; of an image that came as bytes, what messages call it
    root: int  # the place of its source's root
    label: int
    data: bytes | None  # None: to be read from its path
    weight: float = math.nan  # how often to draw it, in proportion; NaN: it has none


class Entry(NamedTuple):
    """What the listing says of a record that it took."""

    number: int  # it is the n-th, from 0 up
    split: str
    name: int  # name_hash of its class


class Listing:
    """All records of the sources, sorted by a hash of their number and the seed, and the class names they carry.

    The order does not depend on the memory that sorting takes. What does not fit into it goes to files in `folder`.
    """

    # Split, place in the order, number, hash of the class, root, length of the path, weight, whether bytes follow it.
    HEAD = struct.Struct(">B8sQQHIf?")
    ROW = np.dtype([("split", "u1"), ("name", "<u8")])  # of each record, in the order of their numbers
    _ROW = struct.Struct("<BQ")

    def __init__(self, folder, memory_bytes, seed, wanted=None, held_out=None, by="image"):
        """
        wanted    sorted array of name_hash of the classes to take; None: all
        held_out  (split, share that goes there at random); the others are train. None: as the source says
        by        image or class: what that is a share of
        """
        self._folder, self._seed = folder, seed.to_bytes(8, "little")
        self._records = Sorter(os.path.join(folder, "records"), memory_bytes // 2)
        self._memory_bytes, self._total = memory_bytes // 4, 0  # of what is sorted beside
        self._paths, self._wanted = Sorter(os.path.join(folder, "paths"), memory_bytes // 8), wanted
        self._held_out, self._by = held_out, by
        self._names, self._numbers = {}, True  # by split; whether all names are numbers
        self._of_split, self._weighted = Counter(), Counter()
        self._rows = open(os.path.join(folder, "rows"), "wb", buffering=2**20)
        self.has_gaps = False  # between the numbers; known when class_names has ended

    def __len__(self):
        return self._total

    @property
    def splits(self):
        return [split for split in SPLITS if split in self._of_split]

    @property
    def has_weights(self):
        """PackError where only some records have a weight."""
        if len(self._weighted) > 1:
            raise PackError(f"{self._weighted[True]} images have a weight and {self._weighted[False]} have none; give "
                            "all one, or none")
        return self._weighted[True] > 0

    def add(self, root, split, path, name, data, weight=math.nan, *, may_repeat=False):
        """Takes a record and returns its Entry, None where its class is not wanted.

        may_repeat  check_paths looks at this path
        """
        try:
            name = name.encode()
        except UnicodeEncodeError as error:
            raise PackError(f"class name {name!r} is not valid UTF-8; rename the class") from error
        if len(name) > MAX_NAME_BYTES:
            raise PackError(f"{path}: class name {name[:40].decode(errors='ignore')}… has {len(name)} bytes, more than "
                            f"{MAX_NAME_BYTES}; shorten it")
        number = name_hash(name)
        if self._wanted is not None:
            found = bisect_left(self._wanted, number)
            if found == len(self._wanted) or self._wanted[found] != number:
                return None
        place, owner = self.place(self._total), split
        if self._held_out is not None:
            if split:
                raise PackError(f"{path}: is of split {split} already; leave out --split")
            # Names are those of train whatever the draw, so that no class is unknown to it.
            owner, (held_out, share) = "train", self._held_out
            drawn = place if self._by == "image" else blake2b(name, key=self._seed, digest_size=8).digest()
            split = held_out if int.from_bytes(drawn, "big") < share * 2**64 else "train"
        if owner not in self._names:
            share = self._memory_bytes if owner in CLASS_SPLITS else self._memory_bytes // 4
            self._names[owner] = Sorter(os.path.join(self._folder, f"names-{owner}"), share, unique=True)
        self._names[owner].add(name)
        self._rows.write(self._ROW.pack(SPLITS.index(split), number))
        self._of_split[split] += 1
        self._weighted[not math.isnan(weight)] += 1
        if owner in CLASS_SPLITS:
            self._numbers = self._numbers and name.isdigit()  # of bytes: ASCII digits
        path = os.fsencode(path)
        if may_repeat and data is None:
            self._paths.add(b"\0".join((path, b"%d" % root, name)))
        head = self.HEAD.pack(SPLITS.index(split), place, self._total, number, root, len(path), weight,
                              data is not None)
        self._records.add(b"".join((head, path, data or b"")))
        self._total += 1
        return Entry(self._total - 1, split, number)

    def place(self, number):
        """8 bytes, by which the records are sorted."""
        return blake2b(number.to_bytes(8, "little"), key=self._seed, digest_size=8).digest()

    def check_paths(self):
        """How often paths that may repeat do so. PackError where one has several labels. Once."""
        last, repeats, conflicts, first = [None, None, None], 0, 0, ""
        for item in self._paths:
            path_root_name = item.split(b"\0", 2)
            if path_root_name[:2] == last[:2]:
                repeats += 1
                if path_root_name != last:
                    conflicts += 1
                    path, _, one = last
                    first = first or (f"path {os.fsdecode(path)!r} has the labels {one.decode()!r} and "
                                      f"{path_root_name[2].decode()!r}")
            last = path_root_name
        if conflicts:
            raise PackError(f"{first} ({conflicts} such cases); give every path one label")
        return repeats

    def class_names(self):
        """The names (bytes) of train, or of all where there are no splits, in the order of their labels. Once."""
        names = self._names["train" if "train" in self._names else ""]
        return self._by_value(names) if self._numbers else iter(names)

    def _by_value(self, names):
        """Numbers in the order of their values, of any length."""
        by_value = Sorter(os.path.join(self._folder, "by-value"), self._memory_bytes)
        for name in names:
            digits = name.lstrip(b"0")
            by_value.add(len(digits).to_bytes(4, "big") + digits + name)
        for label, item in enumerate(by_value):
            end = 4 + int.from_bytes(item[:4], "big")
            self.has_gaps = self.has_gaps or item[4:end] != (b"%d" % label).lstrip(b"0")
            yield item[end:]

    def rows(self):
        """Yields (number of the first, array of ROW) of all records in the order of their numbers. Ends the adding."""
        self._rows.close()
        with open(self._rows.name, "rb") as file:
            for first in range(0, self._total, ROWS):
                yield first, np.frombuffer(file.read(ROWS * self.ROW.itemsize), self.ROW)

    def class_counts(self, table, fates, folder):
        """{split: (C,) int64} kept images of each class, in files of the folder, and {split: those of no class}.

        fates  (number of records,) uint8, Fate of each
        """
        counts = {split: zeros_file(os.path.join(folder, f"listed-{split}"), len(table)) for split in self.splits}
        unknown = Counter()
        for first, rows in self.rows():
            rows = rows[fates[first : first + len(rows)] == Fate.KEPT]
            for split in self.splits:
                labels = table.labels(rows["name"][rows["split"] == SPLITS.index(split)])
                unknown[split] += np.count_nonzero(labels < 0)
                np.add.at(counts[split], labels[labels >= 0], 1)
        return counts, unknown

    def refuse_unknown(self, unknown, table, owner):
        """PackError that names a class where images, {split: number}, are of none in the table, which is owner's."""
        for split, count in unknown.items():
            if count:
                name = next(name for name in self._names[split] if table.labels(np.uint64([name_hash(name)]))[0] < 0)
                raise PackError(f"class {name.decode()!r}{split and ' of ' + split} is not one of {owner} ({count} "
                                "images are of such classes); add it there or leave it out here")

    def chunks(self, table, fates, most_records, most_bytes):
        """Yields the records that are kept and of a class, in lists of one split and up to so many records.

        A list ends with the record that reaches most_bytes. Once.
        """
        for _, items in itertools.groupby(self._records, key=lambda item: item[0]):
            chunk, num_bytes = [], 0
            for item in items:
                chunk.append(item)
                num_bytes += len(item)
                if len(chunk) >= most_records or num_bytes >= most_bytes:
                    yield from self._decoded(chunk, table, fates)
                    chunk, num_bytes = [], 0
            yield from self._decoded(chunk, table, fates)

    def _decoded(self, items, table, fates):
        """Yields the list of Records that are packed, or nothing."""
        heads = [self.HEAD.unpack_from(item) for item in items]
        labels = table.labels(np.array([name for _, _, _, name, *_ in heads], np.uint64))
        is_kept = (labels >= 0) & (fates[[number for _, _, number, *_ in heads]] == Fate.KEPT)
        records = []
        for place in np.flatnonzero(is_kept):
            split, _, _, _, root, length, weight, has_data = heads[place]
            item, end = items[place], self.HEAD.size + length
            path, data = os.fsdecode(item[self.HEAD.size : end]), item[end:] if has_data else None
            records.append(Record(SPLITS[split], path, root, int(labels[place]), data, weight))
        if records:
            yield records


def zeros_file(path, length, dtype=np.int64):
    """(length,) zeros that live in a file: memory is not enough for a number of every class."""
    with open(path, "wb") as file:  # find out here whether there is room: a page without it would kill the process
        os.posix_fallocate(file.fileno(), 0, length * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, "r+", shape=length)
