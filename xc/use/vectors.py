"""The vectors of an index: class rows of a checkpoint, or features in a file. Both are read in blocks, or by row.

    count, width    N, D
    blocks(shard)   yields (first row, (n, D) float32 array) of the rows of a Shard, ascending; ValueError where the
                    file is damaged
    remove()        called when the index is built
"""

import os

import numpy as np
import torch

from xc.comm.shard import Shard

BLOCK = 4096  # rows that are read at once


class ClassRows:
    """The class rows of a Trained as the logits use them, mapped from the checkpoint."""

    def __init__(self, trained):
        self._trained = trained
        self.count, self.width = trained.num_classes, trained.feature_dim

    def blocks(self, shard):
        for first in range(shard.first, shard.last, BLOCK):
            block = Shard(first, min(first + BLOCK, shard.last))
            yield first, torch.cat([rows for _, rows in self._trained.row_blocks(block, "cpu")]).numpy()

    def remove(self):
        """The rows stay in the checkpoint."""


class FeatureRows:
    """Features in a file of float32 numbers (N, D)."""

    def __init__(self, path, count, width):
        self._path, self.count, self.width = path, count, width

    def blocks(self, shard):
        for first in range(shard.first, shard.last, BLOCK):
            last = min(first + BLOCK, shard.last)
            yield first, np.array(np.memmap(self._path, "<f4", "r", 4 * first * self.width, (last - first, self.width)))

    def remove(self):
        """Delete the file."""
        os.unlink(self._path)


def shard_of(vectors, world):
    """The Shard of the vectors that a rank works on: whole blocks, so that products are rounded alike at any W."""
    blocks = Shard.of(-(-vectors.count // BLOCK), world.size, world.rank)
    return Shard(*(min(edge * BLOCK, vectors.count) for edge in (blocks.first, blocks.last)))


def take(vectors, rows):
    """(n, D) float32: the vectors of these rows (n,), ascending. ValueError where the file is damaged."""
    found = [np.empty((0, vectors.width), np.float32)]
    for of_block in np.split(rows, np.flatnonzero(np.diff(rows // BLOCK)) + 1):
        if len(of_block):
            for first, block in vectors.blocks(Shard(int(of_block[0]), int(of_block[-1]) + 1)):
                here = of_block[(of_block >= first) & (of_block < first + len(block))]
                found.append(block[here - first])
    return np.concatenate(found)


def sample_of(count, size, seed):
    """(min(size, count),) int64: random rows of so many, ascending, without repeats."""
    return np.sort(np.random.default_rng(seed).choice(count, min(size, count), replace=False, shuffle=False))
