"""Class names and their labels in files, because a hundred million names do not fit into a dictionary."""

import hashlib
import os
import re

import numpy as np

BLOCK = 2**16  # numbers written at once, and names of a pack read at once
NUMBER = re.compile(rb"([+-]?)(\d*)(?:\.(\d*))?(?:[eE]([+-]?\d+))?")


def name_hash(name):
    """64-bit hash of a name (bytes)."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")


def is_number(name):
    """Whether a name (bytes) is a decimal number, as 10, 007, -1, 2.5 or 1e3."""
    if name.isdigit():  # of bytes: ASCII digits
        return True
    found = NUMBER.fullmatch(name)
    return bool(found and (found[2] or found[3]))


def number_key(name):
    """Bytes that sort names that are numbers by their values, however long they are.

    A value is ± 0.DIGITS × 10^EXPONENT without zeros at either end of DIGITS: the sign, the exponent and then the
    digits decide. Of negative numbers all bits are turned, so that a larger size comes first.
    """
    sign, whole, part, exponent = NUMBER.fullmatch(name).groups()
    digits = (whole + (part or b"")).lstrip(b"0")
    if not digits:
        return b"\1"
    exponent = int(exponent or 0) + len(whole) - (len(whole + (part or b"")) - len(digits))
    size = _integer_key(exponent) + digits.rstrip(b"0") + b"\0"  # \0 sorts before every digit
    return b"\0" + _turned(size) if sign == b"-" else b"\2" + size


def _integer_key(value):
    """Bytes that sort integers of any length, none the beginning of another."""
    size = abs(value).to_bytes((abs(value).bit_length() + 7) // 8, "big")
    size = len(size).to_bytes(2, "big") + size
    return b"\0" + _turned(size) if value < 0 else b"\1" + size


def _turned(key):
    return bytes(255 - byte for byte in key)


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

    def __init__(self, folder, names):
        """Makes a table.

        folder  for its files; must be new
        names   iterable of names (bytes), all different, in the order of their labels; at least one
        """
        os.mkdir(folder)
        block, end = [0], 0
        with open(os.path.join(folder, "ends"), "wb") as ends, open(os.path.join(folder, "names"), "wb") as flat:
            for name in names:
                flat.write(name)
                end += len(name)
                block.append(end)
                if len(block) == BLOCK:
                    ends.write(np.array(block, np.int64).tobytes())  # tofile does not report a full disk
                    block = []
            ends.write(np.array(block, np.int64).tobytes())
        self._map(folder)

    @classmethod
    def open(cls, folder):
        """The table that a ClassTable left in this folder."""
        table = cls.__new__(cls)
        table._map(folder)
        return table

    def _map(self, folder):
        self.folder = folder
        self.ends = np.memmap(os.path.join(folder, "ends"), np.int64, "r")
        self.names = np.memmap(os.path.join(folder, "names"), np.uint8, "r")

    def __len__(self):
        return len(self.ends) - 1

    def name(self, label):
        return self.names[self.ends[label] : self.ends[label + 1]].tobytes().decode()
