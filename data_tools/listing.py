"""The list of what is packed: records in an order drawn at random, and the classes they name, bounded in memory."""

import itertools
import json
import os
import shutil
import struct
import sys
from bisect import bisect_left
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from data_tools.class_table import ClassTable, name_hash
from data_tools.external_sort import Sorter, merged
from data_tools.skipped import Tally
from xc import pack as layout
from xc.pack import PackError

SPLITS = ("", *layout.SPLITS)  # "" of sources without splits
CLASS_SPLITS = {"", "train"}  # those whose names are the classes
MAX_NAME_BYTES = 4096  # of a class


class Record(NamedTuple):
    """One image to be packed."""

    split: str
    path: str  # below the root of its source; of an image that came as bytes, what messages call it
    root: int  # the place of its source's root
    label: int
    data: bytes | None  # None: to be read from its path
    key: bytes = b""  # its place in the order of a listing


HEAD = struct.Struct(">B8sQHI?")  # split, place in the order, hash of the class, root, length of the path, bytes?


class Listing:
    """All records of the sources, sorted by a hash of their number and the seed, and the class names they carry.

    The order depends neither on the memory that sorting takes nor on the number of parts, which are stretches of it
    in every split. The records go to files in `folder`, the rest does where memory does not hold it.
    """

    def __init__(self, folder, memory_bytes, seed, wanted=None, held_out=None, parts=1):
        """
        wanted    sorted array of name_hash of the classes to take; None: all
        held_out  (split, share of the images that go there at random); the others are train. None: as the source says
        """
        self._folder, self._seed = folder, seed.to_bytes(8, "little")
        self._records = [Sorter(os.path.join(folder, f"records-{part}"), memory_bytes // 2 // parts)
                         for part in range(parts)]
        self._num_records = [0] * parts
        self._memory_bytes, self._total = memory_bytes // 4, 0  # of what is sorted beside
        self._paths, self._wanted = Sorter(os.path.join(folder, "paths"), memory_bytes // 8), wanted
        self._held_out = held_out
        self._names, self._hashes, self._numbers = {}, {}, True  # by split; whether all names are numbers
        self.has_gaps = False  # between the numbers; known when class_names has ended

    @property
    def splits(self):
        return [split for split in SPLITS if split in self._hashes]

    def add(self, root, split, path, name, data, may_repeat=False):
        """Takes a record, and says whether its class is wanted. may_repeat: check_paths looks at this path."""
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
                return False
        place = blake2b(self._total.to_bytes(8, "little"), key=self._seed, digest_size=8).digest()
        owner = split
        if self._held_out is not None:
            if split:
                raise PackError(f"{path}: is of split {split} already; leave out --split")
            # Names are those of train whatever the draw, so that no class is unknown to it.
            owner, (held_out, share) = "train", self._held_out
            split = held_out if int.from_bytes(place, "big") < share * 2**64 else "train"
        if owner not in self._names:
            share = self._memory_bytes if owner in CLASS_SPLITS else self._memory_bytes // 4
            self._names[owner] = Sorter(os.path.join(self._folder, f"names-{owner}"), share, unique=True)
        if split not in self._hashes:
            self._hashes[split] = open(os.path.join(self._folder, f"hashes-{split}"), "w+b", buffering=2**16)
        self._names[owner].add(name)
        self._hashes[split].write(number.to_bytes(8, sys.byteorder))
        if owner in CLASS_SPLITS:
            self._numbers = self._numbers and name.isdigit()  # of bytes: ASCII digits
        path = os.fsencode(path)
        if may_repeat and data is None:
            self._paths.add(b"\0".join((path, b"%d" % root, name)))
        head = HEAD.pack(SPLITS.index(split), place, number, root, len(path), data is not None)
        part = int.from_bytes(place, "big") * len(self._records) >> 64
        self._records[part].add(b"".join((head, path, data or b"")))
        self._num_records[part] += 1
        self._total += 1
        return True

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

    def class_counts(self, split, table, owner):
        """(C,) int64, in a file: images of each class. PackError where one is not of the table, which is owner's."""
        counts, unknown = counts_file(os.path.join(self._folder, f"listed-{split}"), len(table)), 0
        with self._hashes[split] as file:
            file.seek(0)
            while len(hashes := np.frombuffer(file.read(2**19), np.uint64)):
                labels = table.labels(hashes)
                unknown += np.count_nonzero(labels < 0)
                np.add.at(counts, labels[labels >= 0], 1)
        if unknown:
            name = next(name for name in self._names[split] if table.labels(np.uint64([name_hash(name)]))[0] < 0)
            raise PackError(f"class {name.decode()!r}{split and ' of ' + split} is not one of {owner} ({unknown} "
                            "images are of such classes); add it there or leave it out here")
        return counts

    def finish(self, skipped):
        """Leaves in the folder what `Listed` opens, and nothing else. After class_names and class_counts.

        skipped  Tally of the images that were left out of the list
        """
        facts = {"splits": self.splits, "num_records": self._num_records, "skipped": skipped.as_json(), "runs": [
            [os.path.relpath(path, self._folder) for path in records.runs()] for records in self._records]}
        for split in self._hashes:
            os.unlink(os.path.join(self._folder, f"hashes-{split}"))
        for name in ("paths", "by-value", *(f"names-{split}" for split in self._names)):
            shutil.rmtree(os.path.join(self._folder, name), ignore_errors=True)  # where there were any
        with open(os.path.join(self._folder, "facts.json"), "w") as file:
            json.dump(facts, file)


class Listed:
    """The finished listing in a folder, which several processes may read.

    splits  its splits; table  ClassTable; skipped  Tally; num_records  of each part
    """

    def __init__(self, folder):
        with open(os.path.join(folder, "facts.json")) as file:
            facts = json.load(file)
        self._folder, self._runs = folder, facts["runs"]
        self.splits, self.num_records = facts["splits"], facts["num_records"]
        self.skipped, self.table = Tally(**facts["skipped"]), ClassTable.open(os.path.join(folder, "classes"))

    @property
    def total(self):
        """Images that the sources have, those that were left out among them."""
        return sum(self.num_records) + self.skipped.count

    def class_counts(self, split):
        """(C,) int64: images of each class that were listed."""
        return np.memmap(os.path.join(self._folder, f"listed-{split}"), np.int64, "r")

    def chunks(self, part, memory_bytes, most_records, most_bytes, start=b""):
        """Yields the records of a part from that with the key `start` on, in lists of one split, which end when they
        have so many records or bytes."""
        items = merged([os.path.join(self._folder, path) for path in self._runs[part]], memory_bytes, start)
        for _, of_split in itertools.groupby(items, key=lambda item: item[0]):
            chunk, num_bytes = [], 0
            for item in of_split:
                chunk.append(item)
                num_bytes += len(item)
                if len(chunk) >= most_records or num_bytes >= most_bytes:
                    yield self._decoded(chunk)
                    chunk, num_bytes = [], 0
            if chunk:
                yield self._decoded(chunk)

    def _decoded(self, items):
        heads = [HEAD.unpack_from(item) for item in items]
        labels = self.table.labels(np.array([number for _, _, number, *_ in heads], np.uint64)).tolist()
        records = []
        for item, label, (split, _, _, root, length, has_data) in zip(items, labels, heads, strict=True):
            key = item[: HEAD.size + length]
            path, data = os.fsdecode(key[HEAD.size :]), item[len(key) :] if has_data else None
            records.append(Record(SPLITS[split], path, root, label, data, key))
        return records


def counts_file(path, num_classes):
    """(C,) int64 zeros that live in a file: memory is not enough for those of every class."""
    with open(path, "wb") as file:  # or a full disk would kill the process when it counts
        os.posix_fallocate(file.fileno(), 0, 8 * num_classes)
    return np.memmap(path, np.int64, "r+", shape=num_classes)
