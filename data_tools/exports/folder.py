"""Writes records as image files in folders named after their classes, with a list of them."""

import csv
import os
import re

from data_tools.exports.suffixes import suffix_of
from data_tools.sources.base import MACOS_FOLDER, SPLIT_OF

LIST = "list.csv"
MAX_FOLDER, MAX_NAME = 200, 3000  # bytes of a folder's name, and of a class name; Linux takes 255 and 4,095
MAX_FOLDERS = 100  # of a class name: what makes and removes them recurses into each
# What a folder of a class must not be called: an image or the list here, or what a reader of the tree would ignore.
RESERVED = re.compile(rf"[0-9]{{9,}}\.[a-z]+|{re.escape(LIST)}|{MACOS_FOLDER}|\..*", re.DOTALL)


def folder_of(name, label, shun_splits=False):
    """A relative path below which the images of a class lie: its name where that is a safe path, else %<label>.

    label        of the class; no two classes get the same path
    shun_splits  whether folders train, val and test at the top would be taken for splits

    ValueError for an empty name, which list.csv cannot have.
    """
    if not name:
        raise ValueError("an empty name, which no folder can have")
    parts = name.split("/")
    is_safe = (len(name.encode()) <= MAX_NAME and len(parts) <= MAX_FOLDERS and not name.startswith("%")
               and not re.search(r"[\x00-\x1f\x7f]", name) and not (shun_splits and parts[0] in SPLIT_OF)
               and not any(len(part.encode()) > MAX_FOLDER or not part or RESERVED.fullmatch(part) for part in parts))
    return name if is_safe else f"%{label}"


class Folders:
    """Writes records as image files below a folder."""

    def __init__(self, out, is_split, shun_splits, has_weights):
        self.out, self.is_split, self.shun_splits, self.has_weights = out, is_split, shun_splits, has_weights
        self.file = open(os.path.join(out, LIST), "w", encoding="utf-8", newline="")
        self.list = csv.writer(self.file)
        self.list.writerow(["path", "label"] + ["split"] * is_split + ["weight"] * has_weights)

    def add(self, split, number, image, label, pack):
        name = pack.class_name(label)
        folder = os.path.join(split if self.is_split else "", folder_of(name, label, self.shun_splits))
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
