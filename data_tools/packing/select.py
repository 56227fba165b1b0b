"""Selects the images that are packed and the classes that get labels."""

import codecs
import os
import unicodedata
from array import array
from collections import Counter
from typing import NamedTuple

import numpy as np

from data_tools.packing import database
from data_tools.packing.catalogue import CLASS_SPLITS, MAX_NAME_BYTES, PACKED, ROWS, SPLITS, TABLE_FILE, zeros_file
from data_tools.packing.class_table import ClassTable, name_hash, names_of, number_key
from data_tools.packing.skipped import NAMED
from xc.data.pack import PackError

# Images that are not left out yet, with the label of their class, if it has one.
LABELLED = "listed LEFT JOIN labels USING (class) LEFT JOIN left_out USING (number) WHERE reason IS NULL"
KEPT = f"FROM {LABELLED} AND label IS NOT NULL"
UNLABELLED = f"FROM {LABELLED} AND label IS NULL"


class Choice(NamedTuple):
    table: ClassTable
    counts: dict  # {split: (C,) int64, in a file}: images of each class that are to be packed
    left_out: Counter  # {reason: images}
    num_few: int  # classes with too few images
    has_gaps: bool  # between class names that are numbers
    spellings: list  # [(name, name)]: classes whose names are the same text in two spellings of Unicode; the first
    num_spellings: int


def choose(catalogue, table_of, folder, min_images, max_images, whole_classes):
    """Selects images and classes, and writes the table of what is packed.

    returns        Choice

    table_of       Pack whose class table is used; None: the class names of train (without splits: all) make it
    folder         for the files of the tables
    min_images     a class with fewer in train (without splits: at all) gets no label; None: all get one
    max_images     of each class in train; the first in the order of packing stay; None: all
    whole_classes  whether splits have whole classes, so that min_images counts the images of all splits

    PackError where an image has no class of the table, or nothing is left.
    """
    db, num_few = catalogue.db, 0
    db.executescript("CREATE TABLE classes (label INTEGER PRIMARY KEY, class, name); "
                     "CREATE TABLE labels (class INTEGER PRIMARY KEY, label)")
    if table_of is not None:
        db.execute("BEGIN")
        db.executemany("INSERT INTO classes (class, name) VALUES (?, ?)",
                       ((name_hash(name) - 2**63, name) for name in names_of(table_of)))
        db.execute("COMMIT")
    else:
        if min_images is not None:
            num_few = _drop_small_classes(db, _ids(catalogue, whole_classes), min_images)
        _sort_names(catalogue)
    _number_classes(db)
    table = ClassTable(os.path.join(folder, "classes"),
                       (name for (name,) in db.execute("SELECT name FROM classes ORDER BY label")))
    if min_images is None:
        _refuse_unknown(db, "train" if table_of is None else "the pack of --classes")
    else:
        db.execute(f"INSERT INTO left_out SELECT number, 'few' {UNLABELLED} ORDER BY number")
    if max_images is not None:
        db.execute(f"INSERT INTO left_out SELECT number, 'many' FROM (SELECT number, row_number() OVER (PARTITION BY "
                   f"split, label ORDER BY key, number) AS place {KEPT} AND split IN ({_ids(catalogue, False)})) "
                   "WHERE place > ? ORDER BY number", [max_images])
    counts = _write_table(catalogue, folder, len(table))
    for split, of_split in counts.items():
        if not of_split.any():
            raise PackError(f"no image{split and ' of ' + split} is left of those that were listed; choose less "
                            "strictly, or leave that split out")
        of_split.flush()  # parts on other nodes read it
    left_out = Counter(dict(db.execute("SELECT reason, count(*) FROM left_out GROUP BY reason")))
    has_gaps = table_of is None and not num_few and catalogue.are_numbers and _has_gaps(db)
    return Choice(table, counts, left_out, num_few, has_gaps, *(([], 0) if table_of is not None else _spellings(db)))


def _ids(catalogue, whole_classes):
    """SQL list of the splits that count: those that give the classes, or all."""
    return ", ".join(str(SPLITS.index(split)) for split in catalogue.splits if whole_classes or split in CLASS_SPLITS)


def _class_names():
    """SQL that is true for names of train, or of all without splits."""
    return f"splits & {sum(1 << SPLITS.index(split) for split in CLASS_SPLITS)}"


def _drop_small_classes(db, splits, least):
    """Takes the names of classes with fewer images out of the classes, and returns how many."""
    db.execute("CREATE TABLE sizes (class INTEGER PRIMARY KEY, size)")
    db.execute("INSERT INTO sizes SELECT class, count(*) FROM listed LEFT JOIN left_out USING (number) WHERE reason IS "
               f"NULL AND split IN ({splits}) GROUP BY class ORDER BY class")
    (largest,) = db.execute(
        f"SELECT max(size) FROM names JOIN sizes USING (class) WHERE {_class_names()}").fetchone()
    if (largest or 0) < least:
        raise PackError(f"--min-images {least}: no class has that many images; the largest has {largest or 0}")
    small = f"{_class_names()} AND coalesce((SELECT size FROM sizes WHERE sizes.class = names.class), 0) < ?"
    return db.execute(f"UPDATE names SET splits = 0 WHERE {small}", [least]).rowcount


def _sort_names(catalogue):
    """Fills the table of classes with names in the order of their labels; numbers are sorted by their values."""
    db, names = catalogue.db, f"FROM names WHERE {_class_names()}"
    if not catalogue.are_numbers:
        db.execute(f"INSERT INTO classes (class, name) SELECT class, name {names} ORDER BY name")
        return
    db.execute("CREATE TABLE numbers (key, class, name)")
    db.execute("BEGIN")
    db.executemany("INSERT INTO numbers VALUES (?, ?, ?)",
                   ((number_key(name), number, name) for number, name in db.execute(f"SELECT class, name {names}")))
    db.execute("COMMIT")
    db.execute("INSERT INTO classes (class, name) SELECT class, name FROM numbers ORDER BY key, name")
    db.execute("DROP TABLE numbers")


def _number_classes(db):
    try:
        db.execute("INSERT INTO labels SELECT class, label - 1 FROM classes ORDER BY class")  # SQLite counts from 1
    except db.IntegrityError as error:
        raise PackError("two class names have the same hash of 64 bits; rename one of the classes") from error


def _refuse_unknown(db, owner):
    """PackError that names a class where images have none of the table, which is the owner's."""
    if not db.execute("SELECT 1 FROM names LEFT JOIN labels USING (class) WHERE label IS NULL LIMIT 1").fetchone():
        return
    for split, count in db.execute(f"SELECT split, count(*) {UNLABELLED} GROUP BY split ORDER BY split"):
        (name,) = db.execute(f"SELECT min(name) FROM names WHERE class IN (SELECT class {UNLABELLED} AND split = ?)",
                             [split]).fetchone()
        raise PackError(f"class {name.decode()!r}{split and ' of ' + SPLITS[split] or ''} is not one of {owner} "
                        f"({count} images are of such classes); add it there or leave it out here")


def _write_table(catalogue, folder, num_classes):
    """Writes the table of the images that are packed; their numbers {split: (C,) int64}, in files of the folder."""
    db = catalogue.db
    database.attach(db, os.path.join(folder, TABLE_FILE), "packed")
    db.executescript(PACKED)
    columns = "split, key, label, root, weight, path, offset, size"
    db.execute(f"INSERT INTO packed.images ({columns}) SELECT {columns} {KEPT} ORDER BY split, key, number")
    counts = {split: zeros_file(os.path.join(folder, f"listed-{split}"), num_classes) for split in catalogue.splits}
    for split, of_split in counts.items():
        labels = db.execute("SELECT label FROM packed.images WHERE split = ?", [SPLITS.index(split)])
        while rows := labels.fetchmany(ROWS):
            np.add.at(of_split, np.array(rows)[:, 0], 1)
    return counts


def _has_gaps(db):
    """Whether class names that are numbers are others than 0, 1, 2 …"""
    for label, name in db.execute("SELECT label - 1, name FROM classes ORDER BY label"):
        if number_key(name) != number_key(b"%d" % label):
            return True
    return False


def _spellings(db):
    """([(name, name)], number of pairs) of classes whose names are equal in Unicode's form NFC."""
    db.execute("CREATE TABLE composed (class, label)")
    names = ((label, name.decode()) for label, name in db.execute("SELECT label, name FROM classes"))
    # A name in the form NFC can only be equal to one that is not.
    db.executemany("INSERT INTO composed VALUES (?, ?)", (
        (name_hash(unicodedata.normalize("NFC", name).encode()) - 2**63, label)
        for label, name in names if not (name.isascii() or unicodedata.is_normalized("NFC", name))))
    db.execute("INSERT INTO composed SELECT class, label + 1 FROM labels WHERE class IN (SELECT class FROM composed)")
    pairs = "FROM (SELECT min(label) AS one, max(label) AS other FROM composed GROUP BY class HAVING count(*) > 1)"
    named = db.execute(f"SELECT a.name, b.name {pairs} JOIN classes a ON a.label = one JOIN classes b ON b.label = "
                       f"other ORDER BY one LIMIT {NAMED}").fetchall()
    (count,) = db.execute(f"SELECT count(*) {pairs}").fetchone()
    return [(one.decode(), other.decode()) for one, other in named], count


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
