"""Writes records as image files in folders named after their classes, with a list of them."""

import csv
import os
import re

from data_tools.exports.suffixes import suffix_of
from data_tools.sources.names import is_never_data
from data_tools.sources.splits import split_and_rest, split_of

LIST = "list.csv"
MAX_FOLDER, MAX_NAME = 200, 3000  # bytes of a folder's name, and of a class name; Linux takes 255 and 4,095
MAX_FOLDERS = 100  # of a class name: what makes and removes them recurses into each
RESERVED = re.compile(rf"[0-9]{{9,}}\.[a-z]+|{re.escape(LIST)}|\..*", re.DOTALL)  # images and the list here; hidden


def folder_of(name, label, shunned=()):
    """A relative path below which the images of a class lie: its name where that is a safe path, else %<label>.

    label    of the class; no two classes get the same path
    shunned  names that are not safe here, as taken_for_splits finds them

    ValueError for an empty name, which list.csv cannot have.
    """
    if not name:
        raise ValueError("an empty name, which no folder can have")
    parts = name.split("/")
    is_safe = (name not in shunned and len(name.encode()) <= MAX_NAME and len(parts) <= MAX_FOLDERS
               and not name.startswith("%") and not re.search(r"[\x00-\x1f\x7f]", name)
               and not any(map(_is_unsafe, parts)))
    return name if is_safe else f"%{label}"


def _is_unsafe(part):
    """Whether a reader would not take a folder of this name for a class, or files here have it."""
    return (len(part.encode()) > MAX_FOLDER or not part or RESERVED.fullmatch(part)
            or is_never_data(part, is_folder=True))


def taken_for_splits(names):
    """The set of those class names that the reader of a tree of all of them would take for splits, or refuse.

    A single class train beside others is none of them.
    """
    named, pairs, total = [], {}, 0
    for name in names:
        total += 1
        parts = name.split("/")
        if any(map(split_of, parts)):
            named.append(name)
        split, rest = split_and_rest(parts[0])
        if split:
            pairs.setdefault(rest, {}).setdefault(split, []).append(name)
    if len(named) == 1 < total and "/" not in named[0]:
        named = []
    return {*named, *(name for of_split in pairs.values() if len(of_split) > 1
                      for names in of_split.values() for name in names)}


class Folders:
    """Writes records as image files below a folder."""

    def __init__(self, out, is_split, shunned, has_weights):
        self.out, self.is_split, self.shunned, self.has_weights = out, is_split, shunned, has_weights
        self.file = open(os.path.join(out, LIST), "w", encoding="utf-8", newline="")
        self.list = csv.writer(self.file)
        self.list.writerow(["path", "label"] + ["split"] * is_split + ["weight"] * has_weights)

    def add(self, split, number, image, label, pack):
        name = pack.class_name(label)
        folder = os.path.join(split if self.is_split else "", folder_of(name, label, self.shunned))
        path = os.path.join(folder, f"{number:09}.{suffix_of(image)}")
        try:
            file = open(os.path.join(self.out, path), "xb")
        except FileNotFoundError:
            os.makedirs(os.path.join(self.out, folder))
            file = open(os.path.join(self.out, path), "xb")
        with file:
            file.write(image)
        weight = pack.weights(number, number + 1).tolist() if self.has_weights else []
        self.list.writerow([path, name] + [split] * self.is_split + weight)

    def end_split(self):
        pass

    def close(self):
        self.file.close()
