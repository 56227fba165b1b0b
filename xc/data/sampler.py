"""The order of examples: endless sequences of record numbers, each a function of (seed, place) alone.

A run's position is one number, the place; any number of ranks takes parts of such a sequence and goes on anywhere in
it. An epoch is as many examples as there are records.

    order.records(first, count)    record numbers of the examples first … first + count − 1, (count,) int64

Threads may share an order.

natural    every epoch has each record once
balanced   every class comes equally often
sqrt       a class comes in proportion to the square root of its number of records, between the two
weighted   a record comes in proportion to its weight
"""

import functools

import numpy as np

from xc.data.hashing import keys_of, shuffled

SAMPLERS = ("natural", "balanced", "sqrt", "weighted")
CHUNK = 256  # neighbouring records that come near each other
WINDOW = 256 * CHUNK  # examples among which these are mixed
_CHUNKS, _POINTS, _RECORDS = range(1, 4)  # streams of numbers
_UNIT_BITS = 20  # points lie on multiples of 2**-20 examples: float64 holds those below 2**33 examples
_BLOCK = 2**18  # labels read at once


class Natural:
    """Every epoch in another order, which reads a pack in chunks of neighbours: packs are shuffled already.

    An epoch begins at a random record and takes the chunks from there on in random order. The records of 256
    chunks, a window, are mixed; an epoch of no more is any permutation. Keeps the numbers of two windows.
    """

    def __init__(self, num_records, seed):
        self.num_records, self.seed = num_records, seed
        self._window = functools.lru_cache(2)(self._make_window)

    def records(self, first, count):
        pieces = [np.empty(0, np.int64)]
        while count:
            epoch, place = divmod(first, self.num_records)
            pieces.append(self._window(epoch, place // WINDOW)[place % WINDOW :][:count])
            first, count = first + len(pieces[-1]), count - len(pieces[-1])
        return np.concatenate(pieces)

    def _make_window(self, epoch, window):
        begin, end = window * WINDOW, min((window + 1) * WINDOW, self.num_records)
        chunks = np.arange(begin // CHUNK, -(-end // CHUNK))
        inside = chunks < self.num_records // CHUNK  # what is left over comes last
        keys = keys_of(self.seed, _CHUNKS, np.full(inside.sum(), epoch))
        chunks[inside] = shuffled(chunks[inside], self.num_records // CHUNK, keys)
        start = np.random.default_rng([self.seed, epoch]).integers(self.num_records)
        records = start + (chunks[:, None] * CHUNK + np.arange(CHUNK)).ravel()[: end - begin]
        return np.random.default_rng([self.seed, epoch, window]).permutation(records % self.num_records)


class ByWeight:
    """Records in proportion to their weights (systematic sampling, Madow 1949).

    Records lie on a line, each as long as its weight. An epoch takes evenly spaced points of the line in random order;
    in the next epoch these lie elsewhere between the same marks. So in every epoch a record comes as often as its
    share says, rounded up or down, and over epochs that evens out.

    weights       (n,)  finite, from 0 up, not all 0; less than a millionth of the mean may count as 0
    num_examples  of an epoch

    Keeps 8 bytes a record.
    """

    def __init__(self, weights, num_examples, seed):
        self.num_examples, self.seed = num_examples, seed
        self._ends = np.cumsum(weights, dtype=np.float64)  # of records on the line, in units
        self._ends *= (num_examples << _UNIT_BITS) / self._ends[-1]
        np.rint(self._ends, out=self._ends)

    def records(self, first, count):
        return self.draw(first, count)[0]

    def draw(self, first, count):
        """Record numbers of the examples, and of each a number: those of one record are 0, 1, 2, … in an epoch, and go
        on in the next. Both (count,) int64."""
        epochs, places = np.divmod(np.arange(first, first + count), self.num_examples)
        marks = shuffled(places, self.num_examples, keys_of(self.seed, _POINTS, epochs))
        shifts, _ = _van_der_corput(epochs, epochs)
        records = np.searchsorted(self._ends, (marks << _UNIT_BITS) + shifts, side="right")
        begins = np.where(records, self._ends[records - 1], 0).astype(np.int64)
        ends = self._ends[records].astype(np.int64)
        earlier = _points_before(ends, epochs) - _points_before(begins, epochs)
        return records, earlier + marks - _marks_below(begins - shifts)


class ByClass:
    """Classes in proportion to their weights, as records `ByWeight`. By the end of every epoch the records of a class
    have come equally often, give or take one.

    labels          labels(start, stop) are those of the records start … stop − 1, (stop − start,) int
    class_counts    (C,) int, records of each class
    class_weights   (C,) finite, from 0 up; 0 for classes without records

    Keeps a number for each record, of 4 bytes below 2**32 records, and 24 bytes a class. ValueError where class_counts
    are not those of the labels.
    """

    def __init__(self, labels, class_counts, class_weights, seed):
        self.seed, self._counts = seed, class_counts
        num_records = int(class_counts.sum())
        self._classes = ByWeight(class_weights, num_records, seed)
        ends = np.cumsum(class_counts)
        self._begins = ends - class_counts  # of classes in _by_class
        self._by_class = np.empty(num_records, np.min_scalar_type(num_records))
        free = self._begins.copy()
        for first in range(0, num_records, _BLOCK):
            some = labels(first, min(first + _BLOCK, num_records))
            sorting = np.argsort(some, kind="stable")
            classes, begins, counts = np.unique(some[sorting], return_index=True, return_counts=True)
            if (free[classes] + counts > ends[classes]).any():
                raise ValueError("class_counts are not those of the labels: check the pack with python -m "
                                 "data_tools.show --verify")
            places = np.repeat(free[classes] - begins, counts) + np.arange(len(some))
            self._by_class[places] = first + sorting
            free[classes] += counts

    def records(self, first, count):
        classes, numbers = self._classes.draw(first, count)
        counts = self._counts[classes]
        rounds, within = np.divmod(numbers, counts)
        within = shuffled(within, counts, keys_of(self.seed, _RECORDS, (classes << 32) + rounds))
        return self._by_class[self._begins[classes] + within].astype(np.int64)


def _marks_below(places):
    """How many of the marks 0, 1, 2, … examples are below places in units."""
    return -(-places >> _UNIT_BITS)


def _points_before(places, epochs):
    """How many points all epochs before these have below these places, in units."""
    marks, rests = np.divmod(places, 1 << _UNIT_BITS)
    return epochs * marks + _van_der_corput(epochs, rests)[1]


def _van_der_corput(numbers, limits):
    """Van der Corput's sequence, whose first n numbers lie about evenly in the unit, for any n: a number's bits, the
    other way round.

    numbers   (n,) int64
    limits    (n,) int64 from 0 to 2**_UNIT_BITS
    returns   (n,) the sequence at those numbers, in units; (n,) how many numbers before it are below the limit
    """
    values, below = np.zeros_like(numbers), (numbers >> _UNIT_BITS) * limits
    for bit in reversed(range(min(_UNIT_BITS, int(numbers.max(initial=0)).bit_length()))):
        block = numbers >> bit & 1  # 2**bit numbers of the sequence, which are values, values + step, …
        step_bits = _UNIT_BITS - bit
        below += block * (((limits - values - 1) >> step_bits) + 1)
        values += block << (step_bits - 1)
    return values, below
