"""Numbers and permutations that depend on keys alone: any of them is made at once, without those before it."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's step from one number to the next


def mix(x):
    """splitmix64's output function (Steele et al. 2014) of a uint64 array: numbers one apart become unrelated."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keys_of(seed, stream, numbers):
    """(n,) uint64 that depend on (seed, stream, number)."""
    start = mix(np.array([(stream << 32) + seed], np.uint64))
    return mix(start + GOLDEN * np.asarray(numbers).astype(np.uint64))


def shuffled(numbers, counts, keys):
    """(n,) int64: where each key's permutation of 0 … count - 1 takes a number; nothing of size `count` is made.

    numbers  (n,)          integers
    counts   one or (n,)   above each number
    keys     (n,)          uint64

    Four Feistel rounds permute the next power of 4; what falls outside is permuted on until it is inside (Black and
    Rogaway 2002).
    """
    result, outside = np.asarray(numbers).astype(np.uint64), np.ones(len(numbers), bool)
    counts = np.broadcast_to(np.asarray(counts, np.uint64), result.shape)
    half = np.maximum(1, (_bit_length(counts - np.uint64(1)) + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    while outside.any():
        key, shift, ones = keys[outside], half[outside], mask[outside]
        high, low = result[outside] >> shift, result[outside] & ones
        for _ in range(4):
            key = key + GOLDEN
            high, low = low, high ^ (mix(key + low) & ones)
        result[outside] = number = (high << shift) | low
        outside[outside] = number >= counts[outside]
    return result.astype(np.int64)


def _bit_length(numbers):
    """(n,) of the lengths of numbers below 2**53 in bits, 0 of 0."""
    return np.frexp(numbers.astype(np.float64))[1]
