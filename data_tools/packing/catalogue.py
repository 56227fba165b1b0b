"""The catalogue of a pack: its records in random order and the classes they name, in files and little memory."""

import itertools
import json
import math
import os
import shutil
import struct
from bisect import bisect_left
from collections import Counter
from enum import IntEnum
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from data_tools.packing.class_table import ClassTable, name_hash
from data_tools.packing.external_sort import Sorter, merged
from data_tools.packing.skipped import Tally
from xc import pack as layout
from xc.pack import PackError

SPLITS = ("", *layout.SPLITS)  # "" of sources without splits
CLASS_SPLITS = {"", "train"}  # those whose names are the classes
ROWS = 2**16  # read at once
MAX_NAME_BYTES = 4096  # of a class
LARGE_BYTES, LARGE_SHARE = 2**16, 2**10  # a large image has more than LARGE_BYTES and more than 1/LARGE_SHARE of memory


class Decision(IntEnum):
    """Whether a record is packed (KEPT) or why it is left out."""

    KEPT = 0
    REPEAT = 1  # another image has the same bytes and label
    LEAK = 2  # an image of train that is also in val or test
    CONFLICT = 3  # an image of the same bytes has another label
    MANY = 4  # beyond --max-images-per-class


class Record(NamedTuple):
    """One image to be packed."""

    split: str
    path: str  # below the root of its source; for an image that came as bytes, a name for messages
    root: int  # number of its source's root
    label: int
    data: bytes | None  # None: read it from its path
    weight: float = math.nan  # relative frequency of drawing it; NaN: it has none
    key: bytes = b""  # sorts the records


class Entry(NamedTuple):
    """A record that the catalogue took."""

    number: int  # from 0 up, in the order of the sources
    split: str
    name: int  # name_hash of its class


class Storage(IntEnum):
    """Where the bytes of an image are stored."""

    PATH = 0  # in a file of its own
    RECORD = 1  # after its path, in the record
    LARGE = 2  # in the file of large images, at the SPAN after its path


# Split, sort key, number, hash of the class, root, length of the path, weight, Storage of its bytes.
HEAD = struct.Struct(">B8sQQHIfB")
SPAN = struct.Struct(">QI")  # offset, number of bytes
LARGE_FILE = "large-images"  # in the order of the sources


class CatalogueWriter:
    """Takes all records of the sources and sorts them by a hash of their number and the seed; also their class names.

    The order depends neither on the memory for sorting nor on the number of parts. A part is a contiguous range of the
    order in every split. The records go to files in `folder`; the rest goes there if memory does not hold it. A merge
    holds one record of each run, which may be hundreds, so large images are not sorted: they go to one file as they
    come and are read from there when they are packed. Small images are sorted with their records and read in sequence.
    """

    ROW = np.dtype([("split", "u1"), ("name", "<u8")])  # of each record, by its number
    _ROW = struct.Struct("<BQ")

    def __init__(self, folder, memory_bytes, seed, wanted=None, held_out=None, by="image", parts=1):
        """
        wanted    sorted array of name_hash of the classes to take; None: all
        held_out  (split, share that goes there at random); the rest is train. None: the source gives the splits
        by        "image" or "class": what the share counts
        """
        self._folder, self._seed = folder, seed.to_bytes(8, "little")
        self._records = [Sorter(os.path.join(folder, f"records-{part}"), memory_bytes // 2 // parts)
                         for part in range(parts)]
        self._num_records = [0] * parts
        self._memory_bytes, self._total = memory_bytes // 4, 0  # for sorting names
        self._paths, self._wanted = Sorter(os.path.join(folder, "paths"), memory_bytes // 8), wanted
        self._held_out, self._by = held_out, by
        self._names, self._numbers = {}, True  # by split; whether all names are numbers
        self._of_split, self._weighted = Counter(), Counter()
        self._rows = open(os.path.join(folder, "rows"), "wb", buffering=2**20)
        self._large = open(os.path.join(folder, LARGE_FILE), "wb")
        self._most_sorted = max(LARGE_BYTES, memory_bytes // LARGE_SHARE)
        self.has_gaps = False  # between names that are numbers; known when class_names has ended

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
        """Takes a record and returns its Entry; None where its class is not wanted.

        may_repeat  whether check_paths checks this path
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
        key, owner = self.sort_key(self._total), split
        if self._held_out is not None:
            if split:
                raise PackError(f"{path}: has split {split} already; leave out --split")
            # Whatever the draw, the name counts for train, so that train knows every class.
            owner, (held_out, share) = "train", self._held_out
            drawn = key if self._by == "image" else blake2b(name, key=self._seed, digest_size=8).digest()
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
        storage, rest = (Storage.PATH, b"") if data is None else (Storage.RECORD, data)
        if len(rest) > self._most_sorted:
            storage, rest = Storage.LARGE, SPAN.pack(self._large.tell(), len(data))
            self._large.write(data)
        head = HEAD.pack(SPLITS.index(split), key, self._total, number, root, len(path), weight, storage)
        part = int.from_bytes(key, "big") * len(self._records) >> 64
        self._records[part].add(b"".join((head, path, rest)))
        self._num_records[part] += 1
        self._total += 1
        return Entry(self._total - 1, split, number)

    def sort_key(self, number):
        """8 bytes, by which the records are sorted."""
        return blake2b(number.to_bytes(8, "little"), key=self._seed, digest_size=8).digest()

    def check_paths(self):
        """Number of paths that came before. PackError where a path has several labels. Call it once."""
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
        """Yields the names (bytes) of train, or of all without splits, in the order of their labels. Call it once."""
        names = self._names["train" if "train" in self._names else ""]
        return self._by_value(names) if self._numbers else iter(names)

    def _by_value(self, names):
        """Yields names that are numbers, of any length, by their values."""
        by_value = Sorter(os.path.join(self._folder, "by-value"), self._memory_bytes)
        for name in names:
            digits = name.lstrip(b"0")
            by_value.add(len(digits).to_bytes(4, "big") + digits + name)
        for label, item in enumerate(by_value):
            end = 4 + int.from_bytes(item[:4], "big")
            self.has_gaps = self.has_gaps or item[4:end] != (b"%d" % label).lstrip(b"0")
            yield item[end:]

    def rows(self):
        """Yields (number of the first, array of ROW) of all records by their numbers. No record can be added then."""
        self._rows.close()
        with open(self._rows.name, "rb") as file:
            for first in range(0, self._total, ROWS):
                yield first, np.frombuffer(file.read(ROWS * self.ROW.itemsize), self.ROW)

    def class_counts(self, table, decisions, folder):
        """{split: (C,) int64} kept images of each class, in files of the folder, and {split: images without a class}.

        decisions  (number of records,) uint8, Decision of each
        """
        counts = {split: zeros_file(os.path.join(folder, f"listed-{split}"), len(table)) for split in self.splits}
        unknown = Counter()
        for first, rows in self.rows():
            rows = rows[decisions[first : first + len(rows)] == Decision.KEPT]
            for split in self.splits:
                labels = table.labels(rows["name"][rows["split"] == SPLITS.index(split)])
                unknown[split] += np.count_nonzero(labels < 0)
                np.add.at(counts[split], labels[labels >= 0], 1)
        return counts, unknown

    def refuse_unknown(self, unknown, table, owner):
        """PackError that names a class where images, {split: number}, have none of the table, which is the owner's."""
        for split, count in unknown.items():
            if count:
                name = next(name for name in self._names[split] if table.labels(np.uint64([name_hash(name)]))[0] < 0)
                raise PackError(f"class {name.decode()!r}{split and ' of ' + split} is not one of {owner} ({count} "
                                "images are of such classes); add it there or leave it out here")

    def finish(self, table, has_weights, left_out, skipped):
        """Leaves in the folder what Catalogue opens. No method may be called after it.

        table     ClassTable in a folder below this one, where class_counts has put its files, too
        left_out  {reason: images} whose Decision is not KEPT or that have no class
        skipped   Tally of the images that could not be listed
        """
        facts = {"splits": self.splits, "num_records": self._num_records, "has_weights": has_weights,
                 "table": os.path.basename(table.folder), "left_out": left_out, "skipped": skipped.as_json(), "runs": [
                     [os.path.relpath(path, self._folder) for path in records.runs()] for records in self._records]}
        self._large.close()
        for entry in os.scandir(self._folder):
            if entry.name == "rows":
                os.unlink(entry)
            elif entry.is_dir() and entry.name != facts["table"] and not entry.name.startswith("records-"):
                shutil.rmtree(entry)
        with open(os.path.join(self._folder, "facts.json"), "w") as file:
            json.dump(facts, file)


class Catalogue:
    """A finished catalogue in a folder, which several processes may read.

    splits       that have records
    table        ClassTable
    counts       {split: (C,) int64}: images of each class that are to be packed
    has_weights  whether the records have weights
    left_out     {reason: images}
    skipped      Tally of images that could not be listed
    """

    def __init__(self, folder):
        with open(os.path.join(folder, "facts.json")) as file:
            facts = json.load(file)
        self._folder, self._runs, self._num_records = folder, facts["runs"], facts["num_records"]
        self.splits, self.has_weights, self.left_out = facts["splits"], facts["has_weights"], facts["left_out"]
        self.skipped, self.table = Tally(**facts["skipped"]), ClassTable.open(os.path.join(folder, facts["table"]))
        self.counts = {split: np.memmap(os.path.join(self.table.folder, f"listed-{split}"), np.int64, "r")
                       for split in self.splits}
        self._decisions = np.broadcast_to(np.uint8(Decision.KEPT), sum(self._num_records))  # takes no memory
        if os.path.exists(path := os.path.join(folder, "decisions")):
            self._decisions = np.memmap(path, np.uint8, "r")

    @property
    def total(self):
        """Number of images that are to be packed or could not be listed."""
        return sum(int(counts.sum()) for counts in self.counts.values()) + self.skipped.count

    def expected(self, part):
        """Number of images of a part that are to be packed; an estimate where there are parts and some are left out."""
        return round(self._num_records[part] * (self.total - self.skipped.count) / sum(self._num_records))

    def chunks(self, part, memory_bytes, most_records, most_bytes, start=b""):
        """Yields lists of Record of a part: those that are kept and have a class, all of one split.

        most_records, most_bytes  of one list; it ends before the record that would exceed them
        start                     key of the first record
        """
        records = merged([os.path.join(self._folder, path) for path in self._runs[part]], memory_bytes, start)
        with open(os.path.join(self._folder, LARGE_FILE), "rb", buffering=0) as large:
            for _, items in itertools.groupby(records, key=lambda item: item[0]):
                chunk, num_bytes = [], 0
                for item in items:
                    item_bytes = _num_bytes(item)
                    if len(chunk) == most_records or chunk and num_bytes + item_bytes > most_bytes:
                        yield from self._decoded(chunk, large)
                        chunk, num_bytes = [], 0
                    chunk.append(item)
                    num_bytes += item_bytes
                yield from self._decoded(chunk, large)

    def _decoded(self, items, large):
        """Yields the list of those Records of some items that are packed, if there are any."""
        heads = [HEAD.unpack_from(item) for item in items]
        labels = self.table.labels(np.array([name for _, _, _, name, *_ in heads], np.uint64))
        is_kept = (labels >= 0) & (self._decisions[[number for _, _, number, *_ in heads]] == Decision.KEPT)
        records = []
        for place in np.flatnonzero(is_kept):
            split, _, _, _, root, length, weight, storage = heads[place]
            item, end = items[place], HEAD.size + length
            path, data = os.fsdecode(item[HEAD.size : end]), None if storage == Storage.PATH else item[end:]
            if storage == Storage.LARGE:
                data = _span(large, *SPAN.unpack(data))
            records.append(Record(SPLITS[split], path, root, int(labels[place]), data, weight, item[:end]))
        if records:
            yield records


def _num_bytes(item):
    """Memory that a record takes when it is read, with its image if the catalogue has that."""
    is_large = item[HEAD.size - 1] == Storage.LARGE
    return SPAN.unpack(item[-SPAN.size :])[1] if is_large else len(item)


def _span(file, offset, num_bytes):
    """Bytes of a file; PackError where it does not have all of them."""
    data = os.pread(file.fileno(), num_bytes, offset)
    if len(data) != num_bytes:
        raise PackError(f"{file.name}: ends at byte {offset + len(data)}, inside an image; begin anew with --restart")
    return data


def zeros_file(path, length, dtype=np.int64):
    """(length,) zeros in a memory-mapped file, because memory may not hold a number for every class."""
    with open(path, "wb") as file:  # find out here whether there is room: a page without it would kill the process
        os.posix_fallocate(file.fileno(), 0, length * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, "r+", shape=length)
