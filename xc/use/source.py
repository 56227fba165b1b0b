"""The images of a source, without their classes: anything that packing reads, a folder of images, or one image."""

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from data_tools.packing.workers import read_file
from data_tools.sources.base import Reading, walk
from data_tools.sources.detect import kind_of, open_source
from data_tools.sources.folder import images_in
from data_tools.sources.names import claims_image, content_is_image
from data_tools.sources.packs import is_pack
from data_tools.sources.splits import SplitNames
from xc.data.pack import open_splits

_RUN_RECORDS = 64


@dataclass
class Image:
    """An image of a source, or what the source names and cannot give.

    name    path of the file, or file and place in it
    load    returns its bytes; OSError or ValueError where there are none. None: there is nothing to load
    reason  why it has no result; None: it has one
    """

    name: str
    load: Callable | None = None
    reason: str | None = None


class _NoClass(SplitNames):
    """Takes every split for one that is left out: sources give the images of such splits without asking for a class."""

    def leaves_out(self, split):
        return True


def images_of(path):
    """(function that yields the Images in a fixed order, their number or None where only reading all would tell).

    PackError where it is no source.
    """
    if os.path.isfile(path) and (claims_image(path) or content_is_image(path)):
        return lambda: iter([_of_file(path)]), 1
    if os.path.isdir(path) and is_pack(path):
        packs = list(open_splits(path).values())
        return lambda: _of_packs(packs), sum(map(len, packs))
    kind = kind_of(path)
    if kind == "folder":
        return lambda: _below(path), sum(1 for _ in _below(path))
    # Reading a table twice takes little beside its images; a tar file or a .rec would be read whole.
    source = open_source(path, kind, Reading(columns={"split": "", "weight": ""}, splits=_NoClass()))
    images = partial(_of_source, source)
    return images, sum(1 for _ in images()) if kind in ("manifest", "jsonlines", "list") else None


def _of_file(path):
    return Image(path, partial(read_file, path))


def _of_packs(packs):
    for pack in packs:
        yield from of_records(pack, range(len(pack)))


def of_records(pack, numbers):
    """Yields the Images of these records of a Pack, in their order.

    numbers  range, or (n,) int
    """
    for start in range(0, len(numbers), _RUN_RECORDS):
        run = _Run(pack, numbers[start : start + _RUN_RECORDS])
        for place, number in enumerate(run.numbers):
            yield Image(f"{pack.path}: record {number}", partial(run.load, place))


class _Run:
    """Some records of a pack, read together by the first that is loaded.

    One by one, neighbours take 20 times as long.
    """

    def __init__(self, pack, numbers):
        self._pack, self.numbers = pack, numbers
        self._lock, self._images = threading.Lock(), None

    def load(self, place):
        with self._lock:
            if self._images is None:
                try:
                    self._images, _ = self._pack.read(np.asarray(self.numbers))
                except ValueError:  # one of them is damaged, perhaps another one
                    self._images = []
        return self._images[place] if self._images else self._pack.read([self.numbers[place]])[0][0]


class _Reports(list):
    """Images that a source reports: they wait here until the next one that it yields."""

    def __init__(self, root):
        self._root = root

    def add(self, split, path, reason):
        self.append(Image(os.path.join(self._root, path), reason=reason))

    def taken(self):
        while self:
            yield self.pop(0)


def _below(root):
    """The images of a tree. The names of its folders mean nothing, so they may lie at its top."""
    reports = _Reports(root)
    for folder, _, names in walk(root, reports):
        hidden = any(part.startswith(".") for part in folder.split("/"))
        for path in images_in(root, folder, names, "", reports):
            yield from reports.taken()
            if hidden:
                yield Image(os.path.join(root, path), reason="its folder is hidden: the name begins with a dot")
            else:
                yield _of_file(os.path.join(root, path))
    yield from reports.taken()


def _of_source(source):
    reports = _Reports("")
    for _, name, _, data, *_ in source.records(reports):
        yield from reports.taken()
        yield _of_file(os.path.join(source.root, name)) if data is None else Image(name, partial(bytes, data))
    yield from reports.taken()
