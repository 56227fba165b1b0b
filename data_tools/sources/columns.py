"""Columns of a table with a row for every image: which hold what, and what a row of them says."""

import math
import os
import re

import numpy as np

from data_tools.sources.base import stays_below
from data_tools.sources.splits import SPLIT_OF
from xc.data.pack import PackError

MAX_PATH_BYTES = 4096  # of a path, which Linux takes to 4,095
MAX_WEIGHT = float(np.finfo(np.float32).max)
# Names of columns, in the order in which they are tried. Case and spaces at the ends do not matter.
USUAL = {"path": ("path", "file", "file_name", "filename", "filepath", "file_path", "image_path", "image", "img"),
         "label": ("label", "labels", "class", "category", "class_name", "target", "sku", "product_id"),
         "split": ("split",), "weight": ("weight",)}
# A column of flags or small numbers with one of these words in its name may hold the splits: is_train, partition, fold.
_SPLIT_WORDS = {*SPLIT_OF, "holdout", "heldout", "eval", "dev", "partition", "fold", "split", "subset", "phase",
                "usage"}
_FLAG = re.compile(r"\d{1,2}|true|false|yes|no|", re.IGNORECASE)
_FEW = 16  # most different values of a column that is looked at for splits
_MISSING = {"nan", "none", "null", "na", "n/a", "-1"}
_PLACE_ELSEWHERE = re.compile(r"[A-Za-z]:[\\/]|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_FLOAT = re.compile(r"([+-]?\d+)\.0*")


class Columns:
    """The columns of a table that are used.

    file   for messages
    names  of all columns, as they stand in the table
    how    Reading

    place  {"path", "label" and, where there are such columns, "split", "weight": index of the column}

    PackError where a column is missing or not clear.
    """

    def __init__(self, file, names, how):
        self.file, self._how = file, how
        self._names = [name.strip().lower() for name in names]
        self.place = {what: index for what in USUAL if (index := self._find(what)) is not None}
        if missing := [what for what in ("path", "label") if what not in self.place]:
            raise PackError(f"{file}: no column of the {' and the '.join(missing)}; it has {self._all_names()}; name "
                            f"{'them' if missing[1:] else 'it'} by "
                            f"{' and '.join(f'--{what}-column' for what in missing)}")
        said = ", ".join(f"{what} = {self._names[index]}" for what, index in self.place.items())
        if len(set(self.place.values())) < len(self.place):
            raise PackError(f"{file}: one column is taken for two things ({said}); name others by --path-column and "
                            "--label-column")
        if how.header and any(self._names[index] not in (what, "image") for what, index in self.place.items()):
            how.note_once(f"columns: {said}")
        self._values = {}  # {index of another column: its values, while they are few}
        if "split" not in self.place and "split" not in how.columns:
            self._values = {index: set() for index, name in enumerate(self._names)
                            if name and index not in self.place.values()}

    def _all_names(self):
        return f"the columns {', '.join(map(repr, self._names))[:400]}" if any(self._names) else "no columns"

    def _find(self, what):
        told = self._how.columns.get(what)
        if told == "":  # the user says that there is none
            return None
        found = [name for name in (USUAL[what] if told is None else (told.strip().lower(),)) if name in self._names]
        if told is not None and not found:
            raise PackError(f"{self.file}: --{what}-column {told}: no such column; it has {self._all_names()}")
        if not found:
            return None
        if (count := self._names.count(found[0])) > 1:
            raise PackError(f"{self.file}: column {found[0]!r} is there {count} times; rename all but one")
        if what == "label" and found[1:]:
            others = " or ".join(found[1:])
            self._how.note_once(f"column {found[0]} gives the class, not {others}; --label-column names another")
        return self._names.index(found[0])

    def look_for_splits(self, cells):
        """Remembers the values of the other columns while they are few; `end` refuses those that name splits.

        cells  the values of a row, by the index of the column
        """
        for index in self.others():
            self.look_at(index, cells[index])

    def others(self):
        """Indices of the other columns that have had few values so far."""
        return list(self._values)

    def look_at(self, index, value):
        """Whether a column has had few values so far, with this one."""
        values = self._values[index]
        values.add(value.strip() if isinstance(value, str) else str(value))
        if len(values) <= _FEW:
            return True
        del self._values[index]
        return False

    def end(self):
        """PackError where another column seems to have the splits."""
        for index, values in self._values.items():
            named = {split for value in values if (split := self._how.splits.in_name(value))}
            words = set(re.split(r"[\W_]+", self._names[index]))
            is_flag = words & _SPLIT_WORDS and len(values) > 1 and all(map(_FLAG.fullmatch, values))
            if len(named) > 1 or "train" in named and 1 < len(values) < 5 or is_flag:
                name, shown = self._names[index], ", ".join(map(repr, sorted(values)[:4])) + ", …" * (len(values) > 4)
                raise PackError(f"{self.file}: column {name!r} may hold the splits, with {shown}; take them by "
                                f"--split-column {name}, with --rename-split VALUE=SPLIT for each that is not train, "
                                "val or test, or say by --split-column '' that there are none")

    def record(self, where, row, image=None, split=""):
        """(split, path, class name, bytes) and the weight, if any, of a row.

        row    {"path", "label", …: text}
        image  bytes of an image that is in the table, whose name is `where`; None: it is a file below the root
        split  of rows that do not say theirs

        PackError where a text is not allowed.
        """
        if row.get("split") is not None:
            split = self._how.splits.of(row["split"])
            if not split:
                hint = (f"--rename-split {row['split']}=val, for one, says what it means" if row["split"] else
                        "give every row one")
                raise PackError(f"{where}: split {row['split']!r} is none of train, val, test; {hint}")
        path = where if image is not None else path_below(where, row["path"], self._how.root)
        if not row["label"] and not self._how.leaves_out(split):
            hint = f"; --without {split} leaves out that split" if split in ("val", "test") else ""
            raise PackError(f"{where}: no label{hint}")
        if row["label"].lower() in _MISSING:
            self._how.note_once(f"class {row['label']!r} may stand for a missing label")
        return split, path, class_name(row["label"]), image, *weight_of(where, row)


def class_name(text):
    """The name of a class, from the text of a label: a whole number has no decimals, as pandas gives them."""
    match = _FLOAT.fullmatch(text)
    return match[1] if match else text


def path_below(where, path, root):
    """A path relative to root, normalized; absolute ones must lie below root. PackError otherwise."""
    if (num_bytes := len(os.fsencode(path))) > MAX_PATH_BYTES:
        raise PackError(f"{where}: path of {num_bytes} bytes, more than {MAX_PATH_BYTES}")
    if _PLACE_ELSEWHERE.match(path) and not os.path.exists(os.path.join(root, path)):
        raise PackError(f"{where}: path {path!r} is one of Windows or of the network; fetch the images, and give their "
                        "paths here")
    if path.startswith("/") and "\0" not in path:
        for base in (os.path.abspath(root), os.path.realpath(root)):
            if os.path.commonpath([base, normal := os.path.normpath(path)]) == base and normal != base:
                return os.path.relpath(normal, base)
        raise PackError(f"{where}: path {path!r} does not lie below {os.path.abspath(root)}; name the folder above all "
                        "images by --root")
    if not stays_below(path):
        raise PackError(f"{where}: path {path!r} must stay below the root, {os.path.abspath(root)}")
    return os.path.normpath(path)


def weight_of(where, row):
    """(weight,) of a row; () where there is no such column."""
    if "weight" not in row:
        return ()
    text, number = row["weight"], math.nan
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        number = float(text)
    if not 0 <= number <= MAX_WEIGHT:
        raise PackError(f"{where}: weight {text!r} is not a number from 0 to {MAX_WEIGHT:.4g}; give every row one, or "
                        "leave the column out")
    return (number,)
