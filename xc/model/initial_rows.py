"""Random class rows, the same in any shard of any world."""

import numpy as np
import torch

from xc.run import watchdog

RANDOM_LENGTH = 3**-0.5  # of random class rows, about
_INIT_BLOCK = 4096  # class rows per random generator; a rank draws only the blocks that it owns


def initial_rows(shard, feature_dim, seed, dtype=torch.float32):
    """Random class rows (S, D); a class gets the same row in any shard of any world.

    Their length is about RANDOM_LENGTH, as in torch's nn.Linear: a step turns a longer row less.
    """
    rows = torch.empty(len(shard), feature_dim, dtype=dtype)
    for block in range(shard.first // _INIT_BLOCK, -(-shard.last // _INIT_BLOCK)):
        first = block * _INIT_BLOCK
        watchdog.progress("making the class rows", max(0, first - shard.first) / max(1, len(shard)))
        start, stop = max(first, shard.first), min(first + _INIT_BLOCK, shard.last)
        rows[start - shard.first : stop - shard.first] = _drawn(block, feature_dim, seed)[start - first : stop - first]
    return rows


def initial_rows_of(classes, feature_dim, seed, dtype=torch.float32):
    """The rows (n, D) of `initial_rows` of some classes (n,)."""
    rows = torch.empty(len(classes), feature_dim, dtype=dtype)
    for block in (classes // _INIT_BLOCK).unique().tolist():
        watchdog.heartbeat("making the class rows")
        here = (classes // _INIT_BLOCK == block).nonzero()[:, 0]
        rows[here] = _drawn(block, feature_dim, seed)[classes[here] - block * _INIT_BLOCK].to(dtype)
    return rows


def _drawn(block, feature_dim, seed):
    """The rows of a block of classes, float32."""
    # numpy's generator, since torch's uses only 32 bits of its seed
    drawn = np.random.default_rng([seed, block]).standard_normal((_INIT_BLOCK, feature_dim), np.float32)
    return torch.from_numpy(drawn).div_((3 * feature_dim) ** 0.5)
