"""Sets of images that benchmarks read: smooth JPEGs, and images copied from a tree; and the page cache they lie in."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def write_patterns(folder, count):
    """Smooth coloured JPEGs, 200 to 280 pixels a side, in classes of ten."""
    numbers = np.random.default_rng(0)
    for i in range(count):
        (folder / f"{i // 10:04d}").mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(numbers.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        size = tuple(numbers.integers(200, 281, 2).tolist())
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i // 10:04d}" / f"{i % 10}.jpg", quality=90)


def copy_images(tree, folder, count):
    """The first `count` images of a tree TREE/<class>/."""
    paths = sorted(Path(tree).glob("*/*.png"))[:count]
    if not paths:
        sys.exit(f"error: {tree} holds no <class>/<image>.png: make it by python -m data_tools.glyphs")
    for path in paths:
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.parent.name)


def forget(paths):
    """The bytes of files out of the page cache; those that are not on the disk yet stay."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
