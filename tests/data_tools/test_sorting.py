"""Sorting on disk is sorting."""

import os
import random

import numpy as np
import pytest

import data_tools.packing.external_sort
from data_tools.packing.external_sort import Sorter, merged
from tests.support.commands import run_pack
from tests.support.images import write_tree
from xc.data.pack import Pack


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("memory", [1, 300, 20_000, 10**9])
def test_sorting_on_disk_is_sorting(tmp_path, monkeypatch, unique, memory):
    monkeypatch.setattr(data_tools.packing.external_sort, "MAX_RUNS", 3)
    random = np.random.default_rng(0)
    items = [random.bytes(random.integers(0, 5)) for _ in range(500)]
    assert len(set(items)) < len(items)
    sorter = Sorter(tmp_path / "runs", memory, unique)
    for item in items:
        sorter.add(item)
    assert (tmp_path / "runs").exists() == (memory < 10**6)
    assert list(sorter) == sorted(set(items) if unique else items)
    assert not list(tmp_path.rglob("run-*"))
    assert list(Sorter(tmp_path, memory, unique)) == []


def test_numbers_of_any_length_sort_by_value_on_disk(tmp_path, capsys):
    names = ["7", "10", "9", "007", "0", str(10**30), "00"]
    write_tree(tmp_path / "src", {name: 1 for name in names})
    run_pack(tmp_path / "src", tmp_path / "pack", "--memory-mb", "1e-3")
    assert Pack(tmp_path / "pack").class_names(0, 7) == ["0", "00", "007", "7", "9", "10", str(10**30)]
    assert "gaps" in capsys.readouterr().err


@pytest.mark.parametrize("memory", [1, 300, 10**6])
def test_sorted_strings_from_any_of_them_on(tmp_path, memory):
    chance = random.Random(memory)
    items = [chance.randbytes(chance.randrange(6)) for _ in range(300)]
    sorter = Sorter(tmp_path / "runs", memory)
    for item in items:
        sorter.add(item)
    runs = sorter.runs()
    for start in [b"", *chance.sample(items, 20), b"\xff" * 6]:
        assert list(merged(runs, memory, start)) == sorted(item for item in items if item >= start)
    assert all(os.path.exists(path) for path in runs) and list(merged([], 1)) == []
