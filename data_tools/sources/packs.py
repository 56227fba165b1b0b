"""Packs: what data_tools.pack wrote before."""

import os

import numpy as np

from data_tools.sources.base import Format
from xc.data import pack as layout
from xc.data.pack import open_splits


def is_pack(path):
    """Whether this is a pack, or a folder of packs."""
    return any(os.path.isfile(os.path.join(path, folder, layout.INDEX_FILE)) for folder in ("", "train"))


def records(path, how, skipped):
    """Yields the records of a pack, or of a folder of packs."""
    for split, pack in open_splits(path).items():
        split = "" if os.path.exists(os.path.join(path, layout.INDEX_FILE)) else split
        for start, stop in pack.ranges():
            numbers = np.arange(start, stop)
            images, labels = pack.read(numbers)
            weights = pack.weights(start, stop)[:, None].tolist() if pack.has_weights else [()] * len(images)
            for number, image, label, weight in zip(numbers, images, labels, weights, strict=True):
                yield split, f"{pack.path}: record {number}", pack.class_name(label), image, *weight


FORMAT = Format(records, is_folder=is_pack, takes_files=False)
