"""Each record comes as often as its sampler says, in every epoch and over epochs, and a place tells the rest."""


import numpy as np
import pytest

import xc.data.sampler
from xc.data.sampler import WINDOW, ByClass, ByWeight, Natural


@pytest.mark.parametrize("num_records", [1, 101, 256, 600, 150_000])  # of a window: 256 chunks of 256 records
@pytest.mark.parametrize("cut", [7, 40, 1000])
def test_the_natural_order_has_each_record_once_an_epoch(num_records, cut):
    cut, total = cut * -(-num_records // 1000), 3 * num_records
    order = Natural(num_records, seed=4)
    found = np.concatenate([order.records(first, min(cut, total - first)) for first in range(0, total, cut)])
    epochs = found.reshape(3, num_records)
    assert all(np.array_equal(np.sort(epoch), np.arange(num_records)) for epoch in epochs)
    assert num_records == 1 or not np.array_equal(epochs[0], epochs[1])
    middle = num_records * 3 // 2
    assert np.array_equal(Natural(num_records, seed=4).records(middle, 20), found[middle:][:20]) or num_records < 40
    assert num_records == 1 or not np.array_equal(Natural(num_records, seed=5).records(0, num_records), epochs[0])


def test_the_natural_order_reads_chunks_of_neighbours_and_mixes_them():
    epoch = Natural(10**6, seed=0).records(0, 10**6)
    window = np.sort(epoch[:WINDOW])
    assert (np.diff(window) > 1).sum() < 256  # stretches of the pack
    assert np.abs(np.corrcoef(epoch[:WINDOW][1:], epoch[:WINDOW][:-1])[0, 1]) < 0.03
    assert np.ptp(epoch[:WINDOW]) > 0.9 * 10**6  # from all over it
    assert Natural(10**12, seed=3).records(10**15 + 7, 5).max() < 10**12  # at no cost by the number of records
    few = Natural(5000, seed=0).records(0, 5000)
    assert abs(np.corrcoef(few, np.arange(5000))[0, 1]) < 0.05  # mixed altogether


LABELS = np.random.default_rng(1).permutation(np.repeat(np.arange(60), np.r_[1000, 300, 0, 57 * [7]]))
COUNTS = np.bincount(LABELS, minlength=60)
SHARES = {"balanced": COUNTS > 0, "sqrt": np.sqrt(COUNTS)}
WEIGHTS = np.float32([3, 0, 0.5, 100, 0, 0, 7.25, 1e-3, 60, 0, *np.linspace(1, 2, 50), 0])


def by_class(sampler, seed=4):
    return ByClass(lambda start, stop: LABELS[start:stop], COUNTS, SHARES[sampler], seed)


def come(order, num_examples, epochs, of=lambda records: records):
    """(epochs, …) how often each thing came in each epoch."""
    found = of(order.records(0, epochs * num_examples)).reshape(epochs, num_examples)
    return np.stack([np.bincount(epoch, minlength=found.max() + 1) for epoch in found])


def check_shares(found, weights):
    """Rounded up or down in every epoch, and over epochs by no more than van der Corput's sequence is uneven."""
    found = np.pad(found, ((0, 0), (0, len(weights) - found.shape[1])))
    shares = found[0].sum() * weights / weights.sum(dtype=float)
    assert (abs(found - shares) < 1 + 1e-4).all()
    assert not found[:, weights == 0].any()
    for epochs in range(1, len(found) + 1):
        assert abs(found[:epochs].sum(0) - epochs * shares).max() < 2 + np.log2(epochs) / 3


@pytest.mark.parametrize("sampler", SHARES)
def test_classes_come_by_their_share(sampler):
    found = come(by_class(sampler), len(LABELS), 37, lambda records: LABELS[records])
    check_shares(found, SHARES[sampler])
    half = np.bincount(LABELS[by_class(sampler).records(0, len(LABELS) // 2)], minlength=60)
    assert abs(half - found[0] / 2).max() < 3 * np.sqrt(found.max())  # mixed within the epoch


@pytest.mark.parametrize("block", [1, 100, xc.data.sampler._BLOCK])
@pytest.mark.parametrize("sampler", SHARES)
def test_the_records_of_a_class_come_equally_often(sampler, block, monkeypatch):
    monkeypatch.setattr(xc.data.sampler, "_BLOCK", block)
    found = come(by_class(sampler), len(LABELS), 12).cumsum(0)
    for label in np.flatnonzero(COUNTS):
        assert (np.ptp(found[:, LABELS == label], axis=1) <= 1).all()


@pytest.mark.parametrize("num_examples", [1, 13, 61, 1000])
def test_records_come_by_their_weight(num_examples):
    order = ByWeight(WEIGHTS, num_examples, seed=2)
    found = come(order, num_examples, 70)
    check_shares(found, WEIGHTS)
    records, numbers = order.draw(0, 70 * num_examples)
    for record in np.unique(records):  # numbered without a gap, epoch by epoch
        epochs = np.split(numbers[records == record], found[:-1, record].cumsum())
        assert np.array_equal(np.concatenate([np.sort(epoch) for epoch in epochs]), np.arange(found[:, record].sum()))


@pytest.mark.parametrize("weight", [1, 0.1, 3e38])
@pytest.mark.parametrize("num_records", [1, 7, 1000])
def test_equal_weights_give_each_record_once_an_epoch(num_records, weight):
    order = ByWeight(np.full(num_records, weight, np.float32), num_records, seed=3)
    assert (come(order, num_records, 5) == 1).all()
    epochs = order.records(0, 5 * num_records).reshape(5, num_records)
    assert num_records < 1000 or len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize("make", [lambda seed: by_class("balanced", seed), lambda seed: by_class("sqrt", seed),
                                  lambda seed: ByWeight(WEIGHTS, 1699, seed), lambda seed: Natural(1699, seed)])
def test_an_order_can_start_at_any_place(make):
    found = make(4).records(0, 5000)
    for first in (1, 1369, 1698, 1705, 4000, 2):  # to and fro, near the ends of epochs and in their middle
        assert np.array_equal(make(4).records(first, 900), found[first:][:900])
    order = make(4)
    assert np.array_equal(np.concatenate([order.records(first, 13) for first in range(0, 4999, 13)])[:5000], found)
    assert not np.array_equal(make(5).records(0, 5000), found)
    assert len(order.records(7, 0)) == 0


def test_orders_work_after_very_many_epochs():
    order = by_class("sqrt")
    assert np.array_equal(np.sort(ByWeight(np.ones(11), 11, 0).records(11 * 10**12, 11)), np.arange(11))
    long = np.bincount(LABELS[order.records(len(LABELS) * 10**12, len(LABELS))], minlength=60)
    check_shares(long[None], SHARES["sqrt"])


@pytest.mark.parametrize("change", [1, -1])
def test_counts_that_are_not_of_the_labels_are_refused(change):
    counts = COUNTS.copy()
    counts[[0, 1]] += change, -change
    with pytest.raises(ValueError, match="class_counts do not match the labels"):
        ByClass(lambda start, stop: LABELS[start:stop], counts, counts > 0, 0)
