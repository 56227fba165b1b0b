"""Classes found by name in another table: what a dictionary finds, for the shards of any number of ranks."""

import random
import tracemalloc

import numpy as np
import pytest
import torch

from tests.support.packs import write_pack
from xc.comm.shard import Shard
from xc.data import class_names
from xc.data.class_names import ClassNames, Numbers, labels_in, names_of
from xc.data.pack import Pack

NAMES = ["", "a", "a\0", "b" * 5000, "é", "é", *(f"item {i}" for i in range(90))]


def table(folder, names):
    write_pack(folder, names, [(b"image", 0)])
    return ClassNames.of_file(folder / "index.h5")


@pytest.mark.parametrize("block", [1, 7, 2**16])
@pytest.mark.parametrize("parts", [1, 2, 5, 97])
def test_labels_are_those_of_a_dictionary(block, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(class_names, "_BLOCK", block)
    old, new = (random.Random(seed).sample(NAMES, 70) for seed in (1, 2))
    others, names = table(tmp_path / "old", old), table(tmp_path / "new", new)
    found = np.concatenate([labels_in(others, names, Shard.of(70, parts, part)) for part in range(parts)])
    assert found.tolist() == [old.index(name) if name in old else -1 for name in new]
    assert labels_in(names, names, Shard(3, 9)).tolist() == list(range(3, 9))


@pytest.mark.parametrize("few", [1, 3, 64])
def test_names_of_some_labels(few, tmp_path, monkeypatch):
    monkeypatch.setattr(class_names, "_FEW", few)
    monkeypatch.setattr(class_names, "NAMES", 8)
    names = table(tmp_path / "pack", NAMES)
    for labels in [], [5], [95, 0, 7, 8], list(range(3, 50, 2)):
        assert names_of(torch.tensor(labels, dtype=torch.int64), names) == {label: NAMES[label] for label in labels}


def test_numbers_are_names_of_their_own(tmp_path):
    names = table(tmp_path / "pack", ["7", "x", "0"])
    assert labels_in(Numbers(8, "other"), names, Shard(0, 3)).tolist() == [7, -1, 0]
    assert labels_in(names, Numbers(8, "other"), Shard(0, 8)).tolist() == [2, *[-1] * 6, 0]


@pytest.mark.parametrize("kind", ["pack", "numbers"])
def test_keys_take_no_object_for_each_name(kind, tmp_path):
    count = 50_000
    names = Numbers(count, "") if kind == "numbers" else table(tmp_path / "pack", [f"item {i}" for i in range(count)])
    tracemalloc.start()
    keys = names.keys(0, count)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert keys.nbytes == 16 * count and peak < 16 * count + 2**20


def test_names_are_those_of_the_pack(tmp_path):
    names = table(tmp_path / "pack", NAMES)
    pack = Pack(tmp_path / "pack")
    assert names.class_names(0, len(NAMES)) == NAMES == pack.class_names(0, len(NAMES))
    assert (names.num_classes, names.classes_digest) == (pack.num_classes, pack.classes_digest)
