"""Packs that are read: in any order, by several threads, with weights, within bounded memory."""

import os
import threading
import tracemalloc
import zlib

import h5py
import numpy as np
import pytest

import xc.data.pack
from data_tools.packing.class_table import ClassTable
from data_tools.packing.writer import PackWriter
from tests.support.commands import run_pack
from tests.support.images import picture, write_tree
from tests.support.packs import add_weights, write_pack
from xc.data.pack import Pack, PackError


def test_read_in_any_order(whole):
    pack = Pack(whole[0])
    images, labels = pack.read(np.arange(len(pack)))
    rng = np.random.default_rng(0)
    requests = [rng.integers(0, len(pack), n) for n in (1, 5, 100)] + [rng.permutation(28), [3, 3, 4, 3], [27, 0]]
    for records in requests:
        got = pack.read(np.asarray(records))
        assert got[0] == [images[i] for i in records] and np.array_equal(got[1], labels[records])
        assert got[1].dtype == np.int64
    assert pack.read(np.empty(0, np.int64))[0] == [] and len(pack.read([])[1]) == 0
    for start, stop in [(0, 28), (3, 20), (9, 9), (27, 28)]:
        assert np.array_equal(pack.labels(start, stop), labels[start:stop])
    for wrong in ([28], [-1]):
        with pytest.raises(IndexError):
            pack.read(wrong)
    with pytest.raises(IndexError):
        pack.labels(0, 29)
    with pytest.raises(IndexError):
        pack.class_name(5)
    with pytest.raises(TypeError):
        pack.read(np.array([0.5]))
    pack.close()
    assert pack.read([5])[0] == [images[5]]


def test_neighbours_are_read_together(whole, monkeypatch):
    pack = Pack(whole[0])
    read, calls = xc.data.hdf5_tables.TableFile.read_bytes, []
    monkeypatch.setattr(xc.data.hdf5_tables.TableFile, "read_bytes",
                        lambda self, *what: calls.append(what[0]) or read(self, *what))
    pack.read(np.arange(len(pack)))
    assert calls.count("bytes") == pack.num_shards
    calls.clear()
    monkeypatch.setattr(xc.data.pack, "RUN_RECORDS", 1)  # and where runs are limited, none is lost
    assert len(set(pack.read(np.arange(len(pack)))[0])) == calls.count("bytes") == len(pack)


def test_threads_share_a_pack_with_few_files_open(tmp_path, monkeypatch):
    write_tree(tmp_path / "src")
    run_pack(tmp_path / "src", tmp_path / "pack", "--shard-mb", 1e-6)
    monkeypatch.setattr(xc.data.pack, "MAX_OPEN_SHARDS", 3)
    before = len(os.listdir("/proc/self/fd"))
    pack, wrong = Pack(tmp_path / "pack"), []
    images, labels = pack.read(np.arange(28))
    assert len(os.listdir("/proc/self/fd")) == before + 1 + 3  # the index and three shards

    def reader(seed):
        try:
            for records in np.random.default_rng(seed).integers(0, 28, (8, 6)):
                got = pack.read(records)
                if got[0] != [images[i] for i in records] or (got[1] != labels[records]).any():
                    wrong.append(records)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    pack.close()
    assert len(os.listdir("/proc/self/fd")) == before + 1


def test_weights_are_read_over_shards(copy):
    num_records = add_weights(copy)
    pack = Pack(copy)
    assert pack.has_weights and pack.num_shards > 2 and pack.verify() == num_records
    for start, stop in [(0, num_records), (3, num_records - 2), (5, 5), (num_records - 1, num_records)]:
        weights = pack.weights(start, stop)
        assert weights.dtype == np.float32 and np.array_equal(weights, np.arange(start, stop))
    for start, stop in [(-1, 2), (3, 2), (0, num_records + 1)]:
        with pytest.raises(IndexError):
            pack.weights(start, stop)
    assert len(pack.read(np.arange(num_records))[0]) == num_records


def test_a_pack_without_weights_says_so(whole):
    assert not Pack(whole[0]).has_weights
    with pytest.raises(PackError, match="has no weights"):
        Pack(whole[0]).weights(0, 1)


def test_counts_of_some_classes_are_part_of_those_of_all(whole):
    pack = Pack(whole[0])
    for first in range(pack.num_classes + 1):
        for last in range(first, pack.num_classes + 1):
            assert np.array_equal(pack.counts(first, last), pack.class_counts[first:last])
    assert pack.num_classes > 2


@pytest.mark.parametrize("most_records, most_bytes", [(256, 2**23), (256, 50), (5, 50), (5, 2**23), (1, 1), (256, 1)])
def test_ranges_are_all_records_and_as_many_as_fit(tmp_path, monkeypatch, most_records, most_bytes):
    chance = np.random.default_rng(most_bytes)
    sizes = np.where(chance.random(300) < 0.1, 80, chance.integers(0, 30, 300))  # some are empty, some do not fit
    write_pack(tmp_path / "pack", ["a"], [(bytes(size), 0) for size in sizes.tolist()], 2500)
    monkeypatch.setattr(xc.data.pack, "RUN_RECORDS", most_records)
    monkeypatch.setattr(xc.data.pack, "RANGE_BYTES", most_bytes)
    pack = Pack(tmp_path / "pack")
    found = list(pack.ranges())
    assert [number for start, stop in found for number in range(start, stop)] == list(range(300))
    begins = np.cumsum([0, *h5py.File(tmp_path / "pack" / "index.h5")["shard_records"][:-1]])
    for start, stop in found:
        assert 0 < stop - start <= most_records and (stop - start == 1 or sizes[start:stop].sum() <= most_bytes)
        at_edge = stop == 300 or stop in begins or (stop - begins[begins <= start][-1]) % most_records == 0
        assert at_edge or sizes[start : stop + 1].sum() > most_bytes
    assert pack.verify() == 300


def test_verifying_holds_some_records_however_large_they_are(tmp_path, monkeypatch):
    write_pack(tmp_path / "pack", ["a"], [(bytes(20_000), 0)] * 250, 10**7)
    monkeypatch.setattr(xc.data.pack, "RANGE_BYTES", 50_000)
    tracemalloc.start()
    try:
        assert Pack(tmp_path / "pack").verify() == 250
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()


def test_verify_holds_some_of_many_long_names(tmp_path):
    writer = PackWriter(tmp_path / "pack", 10**6, np.zeros(20_000, np.int64))
    writer.add(picture(0), zlib.crc32(picture(0)), 7)
    writer.end_shard()
    table = ClassTable(tmp_path / "table", (b"%d" % number * 400 for number in range(10_000, 30_000)))
    writer.write_index(table, source="made", seed=0, skipped=0)
    pack = Pack(tmp_path / "pack")
    tracemalloc.start()
    try:
        assert pack.verify() == 1
        assert tracemalloc.get_traced_memory()[1] < 25e6  # of 40 MB of names
    finally:
        tracemalloc.stop()
