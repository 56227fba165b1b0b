"""The catalogue of a pack: its images in random order and the classes they name, as a table in a SQLite file."""

import json
import math
import os
from bisect import bisect_left
from collections import Counter
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from data_tools.packing import database
from data_tools.packing.class_table import ClassTable, is_number, name_hash
from data_tools.packing.image_file import ImageFileWriter, read_image
from data_tools.packing.skipped import Tally
from xc.data import pack as layout
from xc.data.pack import PackError

SPLITS = ("", *layout.SPLITS)  # "" of sources without splits
CLASS_SPLITS = {"", "train"}  # those whose names are the classes
ROWS = 2**16  # read at once
ADDED = 2**9  # rows, inserted at once
MAX_NAME_BYTES = 4096  # of a class
NAME_BYTES = 250  # that Python needs for a name besides its bytes, with its entry in a dictionary
TABLE_FILE, IMAGES_FILE = "images.sqlite", "images"

# What is listed, while it is listed: `number` counts the images in the order of the sources. Keys and hashes of class
# names are moved by 2**63: SQLite's integers have a sign, and their order must be that of the hashes.
LISTED = """
    CREATE TABLE listed (number INTEGER PRIMARY KEY, split, key, class, root, may_repeat, weight, path, offset, size);
    CREATE TABLE named (class, split, name);
    CREATE TABLE names (class INTEGER PRIMARY KEY, splits, name);
    CREATE TABLE left_out (number INTEGER PRIMARY KEY, reason);
"""
# What is packed, by its place in the order of the pack. Rows are written in that order, so they need no index.
PACKED = """
    CREATE TABLE packed.images (place INTEGER PRIMARY KEY, split, key, label, root, weight, path, offset, size);
"""


class Record(NamedTuple):
    """One image to be packed."""

    split: str
    path: str  # below the root of its source; for an image that came as bytes, a name for messages
    root: int  # number of its source's root
    label: int
    data: bytes | None  # None: read it from its path
    weight: float = math.nan  # relative frequency of drawing it; NaN: it has none
    place: int = 0  # in the order of the pack


class Entry(NamedTuple):
    """A record that the catalogue took."""

    number: int  # from 0 up, in the order of the sources
    split: str
    name: int  # hash of its class, as it is in the table


class CatalogueWriter:
    """Takes all images of the sources, and sorts them by a hash of their number and the seed; also their class names.

    The order depends neither on the memory for sorting nor on the number of parts. Bytes of images are not sorted: they
    go to a file of their own, at places that suit that order.

    db  connection to the tables LISTED, for those who choose what is packed; complete after `end_of_images`
    """

    def __init__(self, folder, memory_bytes, seed, wanted=None, held_out=None, by="image"):
        """
        wanted    sorted array of name_hash of the classes to take; None: all
        held_out  (split, share that goes there at random); the rest is train. None: the source gives the splits
        by        "image" or "class": what the share counts
        """
        self._folder, self._seed, self._wanted = folder, seed.to_bytes(8, "little"), wanted
        self._held_out, self._by = held_out, by
        self.db = database.create(os.path.join(folder, "listed.sqlite"), memory_bytes // 4)
        self.db.executescript(LISTED)
        self._images = ImageFileWriter(os.path.join(folder, IMAGES_FILE), memory_bytes // 8)
        self._rows, self._names, self._total = [], [], 0
        self._seen, self._name_bytes = {}, memory_bytes // 4  # {(name, split): its class}; what it may still take
        self._memory_bytes = memory_bytes
        self.are_numbers = True  # all names of classes
        self._taken = Counter()  # {(split, whether they have no weight): images}

    def __len__(self):
        return self._total

    @property
    def splits(self):
        return [split for split in SPLITS if any((split, is_bare) in self._taken for is_bare in (False, True))]

    @property
    def has_weights(self):
        """PackError where only some records have a weight."""
        bare = sum(count for (_, is_bare), count in self._taken.items() if is_bare)
        if 0 < bare < self._total:
            raise PackError(f"{self._total - bare} images have a weight and {bare} have none; give all one, or none")
        return bare == 0

    def add(self, root, split, path, name, data, weight=math.nan, *, may_repeat=False):
        """Takes a record and returns its Entry; None where its class is not wanted.

        may_repeat  whether check_paths checks this path
        """
        # Whatever the draw of held_out, the name counts for train, so that train knows every class.
        owner = split if self._held_out is None else "train"
        number = self._seen.get((name, owner))
        if number is None and (number := self._add_name(path, name, owner)) is None:
            return None
        key = int.from_bytes(self._hash(self._total.to_bytes(8, "little")), "big")
        if self._held_out is not None:
            if split:
                raise PackError(f"{path}: has split {split} already; leave out --split")
            held_out, share = self._held_out
            drawn = key if self._by == "image" else int.from_bytes(self._hash(name.encode()), "big")
            split = held_out if drawn < share * 2**64 else "train"
        self._taken[split, math.isnan(weight)] += 1
        offset, size = (None, None) if data is None else (self._images.add(key, data), len(data))
        self._rows.append((self._total, SPLITS.index(split), key - 2**63, number, root, may_repeat and data is None,
                           weight, path.encode(errors="surrogateescape"), offset, size))
        if len(self._rows) == ADDED:
            self._insert()
        self._total += 1
        return Entry(self._total - 1, split, number)

    def _hash(self, data):
        return blake2b(data, key=self._seed, digest_size=8).digest()

    def _add_name(self, path, name, split):
        """Hash of a name, as it is in the table, or None; the name of a split may come several times."""
        try:
            encoded = name.encode()
        except UnicodeEncodeError as error:
            raise PackError(f"class name {name!r} is not valid UTF-8; rename the class") from error
        if len(encoded) > MAX_NAME_BYTES:
            raise PackError(f"{path}: class name {encoded[:40].decode(errors='ignore')}… has {len(encoded)} bytes, "
                            f"more than {MAX_NAME_BYTES}; shorten it")
        number = name_hash(encoded)
        if self._wanted is not None:
            found = bisect_left(self._wanted, number)
            if found == len(self._wanted) or self._wanted[found] != number:
                return None
        if split in CLASS_SPLITS:
            self.are_numbers = self.are_numbers and is_number(encoded)
        self._name_bytes -= len(encoded) + NAME_BYTES
        if self._name_bytes < 0:
            self._seen, self._name_bytes = {}, self._memory_bytes // 4
        self._seen[name, split] = number - 2**63
        self._names.append((number - 2**63, SPLITS.index(split), encoded))
        return number - 2**63

    def _insert(self):
        self.db.execute("BEGIN")
        self.db.executemany("INSERT INTO listed VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", self._rows)
        self.db.executemany("INSERT INTO named VALUES (?, ?, ?)", self._names)
        self.db.execute("COMMIT")
        self._rows, self._names = [], []

    def end_of_images(self):
        """No record can be added then. PackError where two class names have the same hash."""
        self._insert()
        self._images.close()
        self._seen = {}
        try:
            self.db.execute("INSERT INTO names SELECT class, sum(DISTINCT 1 << split), name FROM named "
                            "GROUP BY class, name ORDER BY class")
        except self.db.IntegrityError as error:
            raise PackError("two class names have the same hash of 64 bits; rename one of the classes") from error
        self.db.execute("DROP TABLE named")

    def check_paths(self):
        """Number of paths that came before. PackError where a path has several labels."""
        groups = ("FROM (SELECT path, count(*) AS times, min(class) AS one, max(class) AS other FROM listed WHERE "
                  "may_repeat GROUP BY path, root HAVING times > 1)")
        repeats, conflicts = self.db.execute(f"SELECT sum(times - 1), sum(one <> other) {groups}").fetchone()
        if conflicts:
            path, *labels = self.db.execute(
                f"SELECT path, a.name, b.name {groups} JOIN names a ON a.class = one JOIN names b ON b.class = other "
                "WHERE one <> other ORDER BY path LIMIT 1").fetchone()
            one, other = sorted(labels)
            raise PackError(f"path {os.fsdecode(path)!r} has the labels {one.decode()!r} and {other.decode()!r} "
                            f"({conflicts} such paths); give every path one label")
        return repeats or 0

    def left_out(self):
        """Yields (path, root, whether it is a file, reason) of the images that are left out."""
        for path, *rest in self.db.execute("SELECT path, root, offset IS NULL, reason FROM left_out JOIN listed USING "
                                           "(number) ORDER BY number"):
            yield os.fsdecode(path), *rest

    def finish(self, choice, has_weights, skipped):
        """Leaves in the folder what Catalogue opens. No method may be called after it.

        choice   Choice of classes and images
        skipped  Tally of the images that could not be listed
        """
        facts = {"splits": self.splits, "has_weights": has_weights, "left_out": choice.left_out,
                 "skipped": skipped.as_json()}
        self.db.close()
        os.unlink(os.path.join(self._folder, "listed.sqlite"))
        with open(os.path.join(self._folder, "facts.json"), "w") as file:
            json.dump(facts, file)


class Catalogue:
    """A finished catalogue in a folder, which several processes may read.

    splits       that have records
    num_images   that are to be packed
    table        ClassTable
    counts       {split: (C,) int64}: images of each class that are to be packed
    has_weights  whether the records have weights
    left_out     {reason: images}
    skipped      Tally of images that could not be listed
    """

    def __init__(self, folder):
        with open(os.path.join(folder, "facts.json")) as file:
            facts = json.load(file)
        self._folder = folder
        self.splits, self.has_weights, self.left_out = facts["splits"], facts["has_weights"], facts["left_out"]
        self.skipped, self.table = Tally(**facts["skipped"]), ClassTable.open(os.path.join(folder, "classes"))
        self.counts = {split: np.memmap(os.path.join(folder, f"listed-{split}"), np.int64, "r")
                       for split in self.splits}
        self._db = database.open_complete(os.path.join(folder, TABLE_FILE))
        (self.num_images,) = self._db.execute("SELECT count(*) FROM images").fetchone()

    @property
    def total(self):
        """Number of images that are to be packed or could not be listed."""
        return self.num_images + self.skipped.count

    def expected(self, part, parts):
        """Number of images of a part that are to be packed."""
        return sum(map(len, self._ranges(part, parts)))

    def chunks(self, part, parts, most_records, most_bytes, start=0):
        """Yields lists of Record of a part, all of one split.

        most_records, most_bytes  of one list; it ends before the record that would exceed them
        start                     place of the first record
        """
        with open(os.path.join(self._folder, IMAGES_FILE), "rb", buffering=0) as images:
            for places in self._ranges(part, parts):
                rows = self._db.execute(
                    "SELECT split, path, root, label, offset, size, weight, place FROM images WHERE place >= ? AND "
                    "place < ?", (max(start, places.start), places.stop))
                chunk, num_bytes = [], 0
                for row in rows:
                    size = row[5] or 0
                    if len(chunk) == most_records or chunk and num_bytes + size > most_bytes:
                        yield _records(chunk, images)
                        chunk, num_bytes = [], 0
                    chunk.append(row)
                    num_bytes += size
                if chunk:
                    yield _records(chunk, images)

    def _ranges(self, part, parts):
        """The places of a part, a range for each split: its keys are those with part <= key * parts / 2**64 < part + 1.

        A part is a contiguous range of the order in every split.
        """
        for split in map(SPLITS.index, self.splits):
            bounds = [(split, -(-number * 2**64 // parts) - 2**63) for number in (part, part + 1)]
            yield range(*(1 + bisect_left(range(1, self.num_images + 1), bound, key=self._key) for bound in bounds))

    def _key(self, place):
        return self._db.execute("SELECT split, key FROM images WHERE place = ?", [place]).fetchone()


def _records(rows, images):
    return [Record(SPLITS[split], os.fsdecode(path), root, label,
                   None if offset is None else read_image(images, offset, size),
                   math.nan if weight is None else weight, place)
            for split, path, root, label, offset, size, weight, place in rows]


def zeros_file(path, length):
    """(length,) int64 zeros in a memory-mapped file, because memory may not hold a number for every class."""
    with open(path, "wb") as file:  # find out here whether there is room: a page without it would kill the process
        os.posix_fallocate(file.fileno(), 0, length * 8)
    return np.memmap(path, np.int64, "r+", shape=length)
