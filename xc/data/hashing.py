"""Random numbers and permutations as functions of keys: any one is computed directly, without those before it."""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # step from one number of splitmix64 to the next
SIGNED_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # the same bits as an int64


def mix(x):
    """The output function of splitmix64 (Steele et al. 2014): makes numbers that are close together unrelated.

    x  uint64 array of numpy, or int64 tensor of torch whose bits are taken as unsigned; the bits of the results agree
    """
    signed = not isinstance(x, np.ndarray)
    for shift, factor in (30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None):
        high = x >> shift
        if signed:  # an arithmetic shift repeats the sign bit
            high &= 2 ** (64 - shift) - 1
        x = x ^ high
        if factor:
            x = x * (factor - 2**64 if signed else np.uint64(factor))
    return x


def keys_of(seed, stream, numbers):
    """(n,) uint64: hashes of (seed, stream, number). stream is a small integer that names what the numbers are for."""
    start = mix(np.array([(stream << 32) + seed], np.uint64))
    return mix(start + GOLDEN * np.asarray(numbers).astype(np.uint64))


def uniform(seed, first, count, width):
    """(count, width) float64 in [0, 1): hashes of (seed, first + row, column).

    numpy's generators cannot start at every row cheaply.
    """
    with np.errstate(over="ignore"):
        x = np.arange(first * width, (first + count) * width, dtype=np.uint64) * GOLDEN
        x = mix(x + np.uint64(seed) * np.uint64(0xD1B54A32D192ED03))
    return ((x >> np.uint64(11)) * 2.0**-53).reshape(count, width)


def shuffled(numbers, counts, keys):
    """(n,) int64: images of the numbers under random permutations of 0 … count - 1, one permutation per key.

    numbers  (n,)          integers from 0 up, below the counts
    counts   one or (n,)
    keys     (n,)          uint64

    Needs no memory of size `count`: four Feistel rounds permute the next power of 4, and repeat until the result is
    below the count (cycle walking, Black and Rogaway 2002).
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
    """(n,) int: lengths in bits of numbers below 2**53, 0 for 0."""
    return np.frexp(numbers.astype(np.float64))[1]
