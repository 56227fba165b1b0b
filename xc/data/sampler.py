"""The order of examples: endless sequences of record numbers, each a function of (seed, position) alone.

The progress of a run is one number, the position. Any number of ranks takes parts of such a sequence and resumes
anywhere in it. An epoch has as many examples as there are records. Threads may share an order.

    order.records(first, count)    record numbers of the examples first … first + count − 1, (count,) int64

natural    every epoch has each record once
balanced   every class comes equally often
sqrt       a class comes in proportion to the square root of its number of records, between the two
weighted   a record comes in proportion to its weight
"""

import functools

import numpy as np

from xc.data.hashing import keys_of, shuffled

CHUNK = 256  # neighbouring records that stay near each other in the order
WINDOW = 256 * CHUNK  # examples that are mixed with each other
_CHUNKS, _POINTS, _RECORDS = range(1, 4)  # streams of random numbers, see keys_of
_UNIT_BITS = 20  # points are multiples of 2**-20 examples (units): float64 holds those below 2**33 examples
_BLOCK = 2**18  # labels that are read at once


class Natural:
    """Every record once an epoch, in another order each time.

    Reads a pack in chunks of neighbours, which is fast and random enough, since packs are shuffled. An epoch starts at
    a random record and takes the chunks from there on in random order. The records of a window of 256 chunks are mixed,
    so an epoch that fits one window can be any permutation. Keeps the record numbers of two windows in memory.
    """

    def __init__(self, num_records, seed):
        self.num_records, self.seed = num_records, seed
        self._window = functools.lru_cache(2)(self._make_window)

    def records(self, first, count):
        pieces = [np.empty(0, np.int64)]
        while count:
            epoch, index = divmod(first, self.num_records)
            pieces.append(self._window(epoch, index // WINDOW)[index % WINDOW :][:count])
            first, count = first + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def _make_window(self, epoch, window):
        begin, end = window * WINDOW, min((window + 1) * WINDOW, self.num_records)
        chunks = np.arange(begin // CHUNK, -(-end // CHUNK))
        inside = chunks < self.num_records // CHUNK  # an incomplete chunk comes last
        keys = keys_of(self.seed, _CHUNKS, np.full(inside.sum(), epoch))
        chunks[inside] = shuffled(chunks[inside], self.num_records // CHUNK, keys)
        start = np.random.default_rng([self.seed, epoch]).integers(self.num_records)
        records = start + (chunks[:, None] * CHUNK + np.arange(CHUNK)).ravel()[: end - begin]
        return np.random.default_rng([self.seed, epoch, window]).permutation(records % self.num_records)


class ByWeight:
    """Records in proportion to their weights (systematic sampling, Madow 1949).

    The records lie on a line, each as long as its weight. An epoch takes evenly spaced points of the line in random
    order; the next epoch shifts the points. So an epoch has every record as often as its share says, rounded up or
    down, and over the epochs the rounding evens out.

    weights       (n,)  finite, from 0 up, not all 0; a weight below a millionth of the mean may count as 0
    num_examples  of an epoch

    Keeps 8 bytes per record.
    """

    def __init__(self, weights, num_examples, seed):
        self.num_examples, self.seed = num_examples, seed
        self._ends = np.cumsum(weights, dtype=np.float64)  # of records on the line, in units
        self._ends *= (num_examples << _UNIT_BITS) / self._ends[-1]
        np.rint(self._ends, out=self._ends)

    def records(self, first, count):
        return self.draw(first, count)[0]

    def draw(self, first, count):
        """Record numbers of the examples, and the example's number among those of its record: both (count,) int64.

        The examples of one record in an epoch are numbered consecutively, in any order; the next epoch continues.
        """
        epochs, indices = np.divmod(np.arange(first, first + count), self.num_examples)
        marks = shuffled(indices, self.num_examples, keys_of(self.seed, _POINTS, epochs))
        shifts, _ = _van_der_corput(epochs, epochs)
        records = np.searchsorted(self._ends, (marks << _UNIT_BITS) + shifts, side="right")
        begins = np.where(records, self._ends[records - 1], 0).astype(np.int64)
        ends = self._ends[records].astype(np.int64)
        earlier = _points_before(ends, epochs) - _points_before(begins, epochs)
        return records, earlier + marks - _marks_below(begins - shifts)


class ByClass:
    """Classes in proportion to their weights, as `ByWeight` draws records; within a class all records equally often.

    At the end of every epoch the records of a class have come equally often, give or take one.

    labels          labels(start, stop) returns those of the records start … stop − 1, (stop − start,) int
    class_counts    (C,) int, records of each class
    class_weights   (C,) finite, from 0 up; 0 for classes without records

    Keeps 4 bytes per record below 2**32 records, else 8, and 24 bytes per class. ValueError where class_counts do not
    match the labels.
    """

    def __init__(self, labels, class_counts, class_weights, seed):
        self.seed, self._counts = seed, class_counts
        num_records = int(class_counts.sum())
        self._classes = ByWeight(class_weights, num_records, seed)
        ends = np.cumsum(class_counts)
        self._begins = ends - class_counts  # of the classes in _by_class
        self._by_class = np.empty(num_records, np.min_scalar_type(num_records))
        free = self._begins.copy()
        for first in range(0, num_records, _BLOCK):
            some = labels(first, min(first + _BLOCK, num_records))
            sorting = np.argsort(some, kind="stable")
            classes, begins, counts = np.unique(some[sorting], return_index=True, return_counts=True)
            if (free[classes] + counts > ends[classes]).any():
                raise ValueError("class_counts do not match the labels: check the pack with python -m "
                                 "data_tools.show --verify")
            slots = np.repeat(free[classes] - begins, counts) + np.arange(len(some))
            self._by_class[slots] = first + sorting
            free[classes] += counts

    def records(self, first, count):
        classes, numbers = self._classes.draw(first, count)
        counts = self._counts[classes]
        passes, within = np.divmod(numbers, counts)
        within = shuffled(within, counts, keys_of(self.seed, _RECORDS, (classes << 32) + passes))
        return self._by_class[self._begins[classes] + within].astype(np.int64)


def _marks_below(positions):
    """How many of the marks at 0, 1, 2, … examples are below these positions, in units."""
    return -(-positions >> _UNIT_BITS)


def _points_before(positions, epochs):
    """How many points below these positions, in units, all epochs before these had."""
    marks, rests = np.divmod(positions, 1 << _UNIT_BITS)
    return epochs * marks + _van_der_corput(epochs, rests)[1]


def _van_der_corput(numbers, limits):
    """Van der Corput's sequence: the bits of a number in reverse. Its first n values are about evenly spaced.

    numbers   (n,) int64
    limits    (n,) int64 from 0 to 2**_UNIT_BITS
    returns   (n,) the values at these numbers, in units; (n,) how many earlier values are below the limit
    """
    values, below = np.zeros_like(numbers), (numbers >> _UNIT_BITS) * limits
    for bit in reversed(range(min(_UNIT_BITS, int(numbers.max(initial=0)).bit_length()))):
        block = numbers >> bit & 1  # whether 2**bit earlier values are values, values + step, …
        step_bits = _UNIT_BITS - bit
        below += block * (((limits - values - 1) >> step_bits) + 1)
        values += block << (step_bits - 1)
    return values, below
