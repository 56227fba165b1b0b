"""Records that cannot be used: training takes the next one in their place, a test does without."""

import numpy as np

from xc.data.pack import open_splits
from xc.data.pack_split import PackSplit


def test_the_next_record_is_taken(spoiled_packs, tiny_packs):
    good, bad = (PackSplit(open_splits(path)["train"], 1, 16, 3) for path in (tiny_packs, spoiled_packs))
    order = np.random.default_rng(0).permutation(120)
    taken = np.array([{7: 9, 8: 9, 119: 0}.get(record, record) for record in order])
    for found, expected in zip(bad.examples(order), good.examples(taken), strict=True):
        assert found.equal(expected)
    assert bad.bad_records == {7, 8, 119} and not good.bad_records


def test_a_test_does_without_records_that_cannot_be_used(spoiled_packs, tiny_packs):
    good, bad = (PackSplit(open_splits(path)["train"], 1, 16, 3) for path in (tiny_packs, spoiled_packs))
    whole = np.setdiff1d(np.arange(120), [7, 8, 119])
    for found, expected in zip(bad.examples(np.arange(120), replace=False), good.examples(whole), strict=True):
        assert found.equal(expected)
    images, labels = bad.examples(np.array([7, 8]), replace=False)
    assert images.shape == (0, 1, 16, 16) and len(labels) == 0
