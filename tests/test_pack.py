"""Packs: nothing lost or changed, the same bytes from the same input, damage found and named, clean failures."""

import hashlib
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import warnings
import zlib
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from PIL import Image

import data_tools.common.progress
import data_tools.pack
import data_tools.packing.catalogue
import data_tools.packing.workers
import data_tools.packing.write_part
import data_tools.show
import xc.data.images
import xc.data.pack
from data_tools.packing.class_table import ClassTable
from data_tools.packing.writer import PackWriter
from xc.data.images import decode
from xc.data.pack import Pack, PackError, open_splits

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"b": 5, "a/x": 11, "a/y": 1, "c 10": 7, "ü": 4}  # name: images


def picture(seed, format="PNG", size=(6, 5), mode="RGB"):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def write_tree(folder, classes=None, first=0, reverse=False):
    """{path: bytes} of the images, whose contents all differ."""
    names = [f"{name}/{i}.png" for name, count in (classes or CLASSES).items() for i in range(count)]
    files = {name: picture(first + i) for i, name in enumerate(names)}
    for name, data in sorted(files.items(), reverse=reverse):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def run(*args):
    data_tools.pack.main([str(arg) for arg in (*args, *(() if "--workers" in args else ("--workers", 0)))])


def fails(capsys, *args):
    """The one line of a run that must fail, leaving nothing."""
    out = Path(args[1])
    before = sorted(os.listdir(out.parent)) if out.parent.is_dir() else None
    with pytest.raises(SystemExit) as exit:
        run(*args)
    text = capsys.readouterr().err
    assert exit.value.code == 2
    assert text.count("\n") == 1 and text.startswith("data_tools.pack: error: ")
    assert before is None or sorted(os.listdir(out.parent)) == before
    return text


def contents(pack):
    """{image bytes: class name} by reading everything."""
    images, labels = pack.read(np.arange(len(pack)))
    assert len(set(images)) == len(images)
    return {image: pack.class_name(label) for image, label in zip(images, labels, strict=True)}


def by_class(files):
    return {data: name.rpartition("/")[0] for name, data in files.items()}


def file_hashes(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pack with several records in each of several shards, and its source."""
    folder = tmp_path_factory.mktemp("whole")
    files = write_tree(folder / "src")
    run(folder / "src", folder / "pack", "--shard-mb", 1e-3)
    return folder / "pack", files


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))


# Nothing lost, nothing changed.


@pytest.mark.parametrize("shard_mb, shards", [(1e-6, 28), (4e-4, None), (1e-3, None), (256, 1)])
def test_every_image_comes_back_once(tmp_path, shard_mb, shards):
    files = write_tree(tmp_path / "src")
    run(tmp_path / "src", tmp_path / "pack", "--shard-mb", shard_mb)
    pack = Pack(tmp_path / "pack")
    assert contents(pack) == by_class(files)
    assert len(pack) == pack.num_records == len(files) and pack.num_bytes == sum(map(len, files.values()))
    assert pack.class_names(0, pack.num_classes) == sorted(CLASSES) and pack.source == "src"
    assert dict(zip(sorted(CLASSES), pack.class_counts, strict=True)) == CLASSES
    assert pack.num_shards == shards or (shards is None and 1 < pack.num_shards < len(files))
    done = []
    assert pack.verify(done.append) == len(files) == sum(done)
    sizes = []
    for number in range(pack.num_shards):
        with h5py.File(tmp_path / "pack" / f"shard-{number:05d}.h5") as shard:
            sizes.append(len(shard["bytes"]))
            assert len(shard["labels"]) == 1 or sizes[-1] <= shard_mb * 1e6
    assert sum(sizes) == pack.num_bytes


def test_every_format_is_kept_as_it_was(tmp_path):
    formats = {"png": "PNG", "jpg": "JPEG", "JPEG": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF",
               "tiff": "TIFF"}
    (tmp_path / "src" / "k").mkdir(parents=True)
    files = {f"k/0.{suffix}": picture(i, format) for i, (suffix, format) in enumerate(formats.items())}
    for name, data in files.items():
        (tmp_path / "src" / name).write_bytes(data)
    run(tmp_path / "src", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == by_class(files)


def test_small_chunks_lose_nothing(tmp_path, monkeypatch):
    files = write_tree(tmp_path / "src")
    run(tmp_path / "src", tmp_path / "a")
    for module in (data_tools.packing.workers, data_tools.packing.write_part):
        monkeypatch.setattr(module, "CHUNK_BYTES", 200)  # the worker stops after every second image
    monkeypatch.setattr(data_tools.packing.write_part, "CHUNK_RECORDS", 5)
    run(tmp_path / "src", tmp_path / "b")
    assert contents(Pack(tmp_path / "b")) == by_class(files)
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")


def test_window_bounds_what_is_under_way():
    under_way, most = 0, 0

    class Pool:
        def submit(self, function, images):
            nonlocal under_way, most
            under_way, most = under_way + 1, max(most, under_way + 1)
            return type("Future", (), {"result": lambda self: finish(images)})()

    def finish(images):
        nonlocal under_way
        under_way -= 1
        return [(path.encode(), 0) for path, _ in images[:1]]  # each time half of the chunk is left over

    records = [data_tools.packing.catalogue.Record("", f"{i}", 0, 0, None) for i in range(40)]
    chunks = (records[i : i + 2] for i in range(0, 40, 2))
    found = [(record, data) for record, data, _ in data_tools.packing.workers.read_in_order(Pool(), 3, [""], chunks)]
    assert found == [(record, record.path.encode()) for record in records] and most == 3


def test_bytes_depend_on_source_and_seed_only(tmp_path):
    write_tree(tmp_path / "one" / "src")
    write_tree(tmp_path / "two" / "src", reverse=True)  # another order on the disk
    runs = [("0", "one", 0, 3), ("1", "two", 1, 3), ("2", "one", 2, 3), ("other", "one", 0, 4)]
    for name, source, workers, seed in runs:
        run(tmp_path / source / "src", tmp_path / name, "--workers", workers, "--seed", seed, "--shard-mb", 1e-3)
        if name == "0":
            time.sleep(1 - time.time() % 1)  # now a time in a file, in seconds, would differ
    assert len(file_hashes(tmp_path / "0")) > 3
    assert file_hashes(tmp_path / "0") == file_hashes(tmp_path / "1") == file_hashes(tmp_path / "2")
    everything = [Pack(tmp_path / name).read(np.arange(28)) for name in ("0", "other")]
    assert everything[0][0] != everything[1][0] and set(everything[0][0]) == set(everything[1][0])


def test_records_are_shuffled_over_the_classes(tmp_path):
    write_tree(tmp_path / "src", {"a": 50, "b": 50})
    run(tmp_path / "src", tmp_path / "pack")
    labels = Pack(tmp_path / "pack").labels(0, 100)
    assert 30 < (np.diff(labels) != 0).sum() < 70  # 1 in order of folders; 50 ± 5 at random


# Reading.


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
    read, calls = xc.data.pack._File.read_bytes, []
    monkeypatch.setattr(xc.data.pack._File, "read_bytes", lambda self, *what: calls.append(what[0]) or read(self, *what))
    pack.read(np.arange(len(pack)))
    assert calls.count("bytes") == pack.num_shards
    calls.clear()
    monkeypatch.setattr(xc.data.pack, "RUN_RECORDS", 1)  # and where runs are limited, none is lost
    assert len(set(pack.read(np.arange(len(pack)))[0])) == calls.count("bytes") == len(pack)


def test_threads_share_a_pack_with_few_files_open(tmp_path, monkeypatch):
    write_tree(tmp_path / "src")
    run(tmp_path / "src", tmp_path / "pack", "--shard-mb", 1e-6)
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


# Damaged and hostile packs.


def edit(pack, file, change):
    """Applies change(h5py file) to a file of a pack and makes the index agree with the new sizes."""
    with h5py.File(pack / file, "r+") as opened:
        change(opened)
    with h5py.File(pack / "index.h5", "r+") as index:
        for number in range(len(index["shard_file_bytes"])):
            index["shard_file_bytes"][number] = os.path.getsize(pack / f"shard-{number:05d}.h5")


def replace(name, make):
    """A change that makes dataset `name` anew: make(file, name, its old values)."""

    def change(file):
        values = file[name][...]
        del file[name]
        make(file, name, values)

    return change


def put(name, place, value):
    def change(file):
        file[name][place] = value

    return change


def link(kind):
    def make(file, name, values):
        other = Path(file.filename).parent.parent / "other.h5"
        with h5py.File(other, "w") as target:
            target[name] = values
        if kind == "external":
            file[name] = h5py.ExternalLink(str(other), name)
        elif kind == "soft":
            file["elsewhere"] = values
            file[name] = h5py.SoftLink("/elsewhere")
        elif kind == "virtual":
            source = h5py.VirtualSource(str(other), name, values.shape, values.dtype)
            sheet = h5py.VirtualLayout(values.shape, values.dtype)
            sheet[:] = source
            file.create_virtual_dataset(name, sheet)
        elif kind == "stored elsewhere":
            raw = other.with_suffix(".raw")
            raw.write_bytes(values.tobytes())
            file.create_dataset(name, values.shape, values.dtype, external=[(str(raw), 0, values.nbytes)])
        elif kind == "chunked":
            file.create_dataset(name, data=values, chunks=True)
        assert np.array_equal(file[name][...], values)  # whoever follows it is served

    return make


@pytest.mark.parametrize("kind", ["external", "soft", "virtual", "stored elsewhere", "chunked"])
@pytest.mark.parametrize("file, name", [("shard-00000.h5", "labels"), ("shard-00000.h5", "bytes"),
                                        ("index.h5", "class_names")])
def test_data_from_elsewhere_is_refused(copy, kind, file, name):
    edit(copy, file, replace(name, link(kind)))
    with pytest.raises(PackError, match=f"{file}: {name} is (missing or a link|not stored in one piece)"):
        Pack(copy).read([0])


SHARD_DAMAGE = {
    "offsets fall": (put("offsets", 2, 1), "offsets"),
    "offsets negative": (put("offsets", 0, -5), "offsets"),
    "offsets not from 0": (put("offsets", 0, 1), "offsets"),
    "offsets beyond the end": (put("offsets", -1, 10**6), "offsets"),
    "offsets huge": (put("offsets", 1, 2**62), "offsets"),
    "bytes of no record": (replace("bytes", lambda f, n, v: f.create_dataset(n, data=np.append(v, v))), "offsets"),
    "label negative": (put("labels", 1, -1), "record 1: label -1"),
    "label too large": (put("labels", 1, 5), "record 1: label 5"),
    "wrong checksum": (put("crc32", 1, 7), "record 1: wrong checksum"),
    "wrong type": (replace("labels", lambda f, n, v: f.create_dataset(n, data=v.astype(np.int32))), "labels"),
    "wrong byte order": (replace("labels", lambda f, n, v: f.create_dataset(n, data=v.astype(">i8"))), "labels"),
    "wrong shape": (replace("labels", lambda f, n, v: f.create_dataset(n, data=v[:, None])), "labels"),
    "a label too many": (replace("labels", lambda f, n, v: f.create_dataset(n, data=np.append(v, 0))), "records"),
    "group": (replace("labels", lambda f, n, v: f.create_group(n)), "labels"),
    "missing": (lambda f: f.__delitem__("crc32"), "crc32 is missing"),
    "huge and empty": (replace("bytes", lambda f, n, v: f.create_dataset(n, (2**50,), np.uint8)), "claims"),
    "another version": (lambda f: f.attrs.__setitem__("version", 3), "version 3"),
    "another shard": (lambda f: f.attrs.__setitem__("shard", 1), "not the shard 0"),
    "another format": (lambda f: f.attrs.__setitem__("format", np.bytes_("x")), "not a pack"),
}


@pytest.mark.parametrize("name", SHARD_DAMAGE)
def test_damaged_shard(copy, name):
    change, message = SHARD_DAMAGE[name]
    edit(copy, "shard-00000.h5", change)
    with h5py.File(copy / "index.h5") as index:
        num_records = index["shard_records"][0]
    assert num_records > 4
    for use in (lambda pack: pack.read(np.arange(num_records)), lambda pack: pack.verify()):
        with pytest.raises(PackError, match=f"shard-00000.h5: .*{message}"):
            use(Pack(copy))
    assert len(Pack(copy).read([num_records])[0]) == 1  # the other shards are as they were


@pytest.mark.parametrize("place, value", [(2, -5), (3, 10**6), (3, 2**62)])
def test_bad_offsets_of_one_record(copy, place, value):
    edit(copy, "shard-00000.h5", put("offsets", place, value))
    with pytest.raises(PackError, match="shard-00000.h5: offsets"):
        Pack(copy).read([2])


@pytest.mark.parametrize("name, place, value", [("labels", 1, -1), ("offsets", 2, -5)])
def test_neighbours_of_a_damaged_record_are_read(copy, name, place, value):
    whole = Pack(copy).read([0, 3])
    edit(copy, "shard-00000.h5", put(name, place, value))
    pack = Pack(copy)
    assert all(pack.read([record]) == ([whole[0][i]], [whole[1][i]]) for i, record in enumerate([0, 3]))
    with pytest.raises(PackError, match=name.removesuffix("s")):
        pack.read([1])


INDEX_DAMAGE = {
    "another version": (lambda f: f.attrs.__setitem__("version", 3), "version 3"),
    "no version": (lambda f: f.attrs.__delitem__("version"), "version"),
    "version is a text": (lambda f: f.attrs.__setitem__("version", "1"), "version"),
    "source is a number": (lambda f: f.attrs.__setitem__("source", 1), "source"),
    "no format": (lambda f: f.attrs.__delitem__("format"), "not a pack"),
    "records too many": (lambda f: f.attrs.__setitem__("num_records", 29), "num_records"),
    "records do not add up": (put("shard_records", 0, 1), "num_records"),
    "records negative": (lambda f: f["shard_records"].write_direct(
        np.array([28, 5, -5] + [0] * (len(f["shard_records"]) - 3))), "num_records"),
    "records wrap around": (lambda f: f["shard_records"].write_direct(
        np.array([2**63 - 1, 2**63 - 1, 30] + [0] * (len(f["shard_records"]) - 3))), "num_records"),
    "has_weights is a text": (lambda f: f.attrs.__setitem__("has_weights", "1"), "has_weights"),
    "empty": (lambda f: f.attrs.__setitem__("num_records", 0), "no records"),
    "classes": (lambda f: f.attrs.__setitem__("num_classes", 6), "do not fit"),
    "huge classes": (lambda f: f.attrs.__setitem__("num_classes", 2**62), "do not fit"),
    "sizes": (replace("shard_file_bytes", lambda f, n, v: f.create_dataset(n, data=v[:-1])), "do not fit"),
}


@pytest.mark.parametrize("name", INDEX_DAMAGE)
def test_damaged_index_is_seen_when_opened(copy, name):
    change, message = INDEX_DAMAGE[name]
    with h5py.File(copy / "index.h5", "r+") as file:
        change(file)
    with pytest.raises(PackError, match=f"index.h5: .*{message}"):
        Pack(copy)


@pytest.mark.parametrize("change, message", [
    (put("class_counts", 0, 10), "class_counts"),
    (put("class_names", 0, 255), "UTF-8"),
    (put("class_names", 0, ord("z")), "digest"),
    (put("class_name_offsets", 1, 10**9), "class_name_offsets"),
    (lambda f: f.attrs.__setitem__("num_bytes", 3), "num_bytes"),
    (lambda f: f["class_counts"].write_direct(f["class_counts"][...][::-1].copy()), r"class_counts\[0\]"),
])
def test_verify_checks_the_index(copy, change, message):
    with h5py.File(copy / "index.h5", "r+") as file:
        change(file)
    with pytest.raises(PackError, match=f"index.h5: .*{message}"):
        Pack(copy).verify()


def test_verify_holds_some_of_many_long_names(tmp_path):
    writer = PackWriter(tmp_path / "pack", 10**6, np.zeros(20_000, np.int64))
    writer.add(picture(0), zlib.crc32(picture(0)), 7)
    writer.end_shard()
    table = ClassTable(tmp_path / "table", (b"%d" % number * 400 for number in range(10_000, 30_000)), 2**20)
    writer.write_index(table, source="made", seed=0, skipped=0)
    pack = Pack(tmp_path / "pack")
    tracemalloc.start()
    try:
        assert pack.verify() == 1
        assert tracemalloc.get_traced_memory()[1] < 25e6  # of 40 MB of names
    finally:
        tracemalloc.stop()


def test_a_flipped_bit_is_found_and_named(copy, capsys):
    with h5py.File(copy / "shard-00001.h5") as shard:
        place = shard["bytes"].id.get_offset() + int(shard["offsets"][3]) + 20
        first = len(h5py.File(copy / "shard-00000.h5")["labels"])
    with open(copy / "shard-00001.h5", "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 4]))
    pack = Pack(copy)
    named = f"shard-00001.h5: record {first + 3}: wrong checksum"
    assert len(pack.read([first + 2, first + 4])[0]) == 2
    for use in (lambda: pack.read([0, first + 3]), pack.verify):
        with pytest.raises(PackError, match=named):
            use()
    with pytest.raises(SystemExit) as exit:
        data_tools.show.main([str(copy), "--verify"])
    error = capsys.readouterr().err
    assert exit.value.code == 1 and named in error and error.count("\n") == 1


def weighted(pack):
    """Adds weights to a pack, the numbers of the records; returns how many there are."""
    with h5py.File(pack / "index.h5", "r+") as index:
        index.attrs["has_weights"] = np.int64(1)
        ends = np.cumsum(index["shard_records"])
    for number, shard in enumerate(np.split(np.arange(ends[-1], dtype=np.float32), ends[:-1])):
        edit(pack, f"shard-{number:05d}.h5", lambda f, shard=shard: f.create_dataset("weights", data=shard))
    return ends[-1]


def test_weights_are_read_over_shards(copy):
    num_records = weighted(copy)
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


@pytest.mark.parametrize("change, message", [
    (put("weights", 1, np.nan), "record 1: weight nan"), (put("weights", 2, np.inf), "record 2: weight inf"),
    (put("weights", 3, -0.5), "record 3: weight -0.5"),
    (replace("weights", lambda f, n, v: f.create_dataset(n, data=v.astype(np.float64))), "weights"),
    (replace("weights", lambda f, n, v: f.create_dataset(n, data=v[:-1])), "records"),
    (replace("weights", link("external")), "weights is missing or a link"),
    (lambda f: f.__delitem__("weights"), "weights is missing"),
])
def test_damaged_weights(copy, change, message):
    num_records = weighted(copy)
    edit(copy, "shard-00000.h5", change)
    for use in (lambda pack: pack.weights(0, num_records), lambda pack: pack.verify()):
        with pytest.raises(PackError, match=f"shard-00000.h5: .*{message}"):
            use(Pack(copy))


def test_cut_and_missing_files(copy, tmp_path):
    shard = copy / "shard-00000.h5"
    os.truncate(shard, os.path.getsize(shard) - 1)
    with pytest.raises(PackError, match=r"shard-00000.h5: \d+ bytes, not \d+"):
        Pack(copy)
    edit(copy, "index.h5", lambda f: None)  # the index now lists the new size
    with pytest.raises(PackError, match="shard-00000.h5: "):
        Pack(copy).read([0])
    shard.unlink()
    with pytest.raises(PackError, match="shard-00000.h5: no such file"):
        Pack(copy)
    os.mkfifo(shard)  # must not block
    with pytest.raises(PackError, match="shard-00000.h5: no such file"):
        Pack(copy)
    (copy / "index.h5").write_bytes(b"not HDF5")
    with pytest.raises(PackError, match="index.h5: not readable as HDF5"):
        Pack(copy)
    (copy / "index.h5").unlink()
    os.mkfifo(copy / "index.h5")
    with pytest.raises(PackError, match="index.h5: no such file"):
        Pack(copy)
    (copy / "index.h5").unlink()
    for use in (Pack, open_splits):
        with pytest.raises(PackError, match="not a pack"):
            use(copy)
        with pytest.raises(PackError, match="no such folder|not a pack"):
            use(tmp_path / "nowhere")


def test_a_file_cut_while_open(copy):
    pack = Pack(copy)
    pack.read([0])
    os.truncate(copy / "shard-00000.h5", 3000)
    with pytest.raises(PackError, match="shard-00000.h5: .*cut while open"):
        pack.verify()


# Splits and class tables.


def test_splits_share_the_classes_of_train(tmp_path, capsys):
    train = write_tree(tmp_path / "src" / "train", {"k/b": 3, "k/a": 2, "c": 1})
    test = write_tree(tmp_path / "src" / "test", {"c": 2, "k/b": 1}, first=100)
    (tmp_path / "src" / "LICENSE").write_text("free")
    run(tmp_path / "src", tmp_path / "pack")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = {name: sum(map(len, split.values())) for name, split in {"train": train, "test": test}.items()}
    assert {**result, "seconds": 0} == {
        "records": 9, "classes": 3, "bytes": sum(sizes.values()), "shards": 2, "skipped": 0, "left_out": {},
        "seconds": 0, "splits": {"train": {"records": 6, "classes": 3, "bytes": sizes["train"], "shards": 1},
                   "test": {"records": 3, "classes": 2, "bytes": sizes["test"], "shards": 1}}}
    run(tmp_path / "src", tmp_path / "again", "--json")
    again = json.loads(capsys.readouterr().out)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    packs = open_splits(tmp_path / "pack")
    assert list(packs) == ["train", "test"]
    assert contents(packs["train"]) == by_class(train) and contents(packs["test"]) == by_class(test)
    for pack in packs.values():
        assert pack.class_names(0, 3) == ["c", "k/a", "k/b"]
    assert packs["test"].class_counts.tolist() == [2, 0, 1]
    assert list(open_splits(tmp_path / "pack" / "test")) == ["train"]

    run(tmp_path / "src" / "train", tmp_path / "single")  # the same names: they go together
    shutil.rmtree(tmp_path / "pack" / "test")
    shutil.copytree(tmp_path / "single", tmp_path / "pack" / "val")
    assert list(open_splits(tmp_path / "pack")) == ["train", "val"]
    write_tree(tmp_path / "other", {"c": 2, "k/a": 1, "k/x": 1})
    run(tmp_path / "other", tmp_path / "pack" / "test")
    with pytest.raises(PackError, match="classes are not those of train"):
        open_splits(tmp_path / "pack")


def test_unknown_test_class_is_named(tmp_path, capsys):
    write_tree(tmp_path / "src" / "train", {"a": 2, "b": 2})
    write_tree(tmp_path / "src" / "val", {"b": 1, "new": 2})
    error = fails(capsys, tmp_path / "src", tmp_path / "pack")
    assert "'new' of val" in error and "2 images" in error


def test_folders_that_are_not_splits(tmp_path):
    for classes in ({"train": 1, "other": 2}, {"test": 1, "val": 1}):
        write_tree(tmp_path / "src", classes)
        run(tmp_path / "src", tmp_path / "pack")
        assert Pack(tmp_path / "pack").class_names(0, 2) == sorted(classes)
        shutil.rmtree(tmp_path / "src")
        shutil.rmtree(tmp_path / "pack")


def test_classes_of_another_pack(tmp_path, whole, capsys):
    files = write_tree(tmp_path / "new", {"ü": 2, "b": 1}, first=200)
    run(tmp_path / "new", tmp_path / "pack", "--classes", whole[0])
    pack = Pack(tmp_path / "pack")
    assert pack.classes_digest == Pack(whole[0]).classes_digest and pack.num_classes == len(CLASSES)
    assert contents(pack) == by_class(files)
    write_tree(tmp_path / "new", {"z": 1})
    assert "'z'" in fails(capsys, tmp_path / "new", tmp_path / "pack2", "--classes", whole[0])


def test_numbers_sort_as_numbers(tmp_path, capsys):
    write_tree(tmp_path / "src", {str(i): 1 for i in range(12)})
    run(tmp_path / "src", tmp_path / "pack")
    assert Pack(tmp_path / "pack").class_names(0, 12) == [str(i) for i in range(12)]
    assert "gaps" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "src" / "5")
    run(tmp_path / "src", tmp_path / "gap")
    assert Pack(tmp_path / "gap").class_names(4, 6) == ["4", "6"] and "gaps" in capsys.readouterr().err
    write_tree(tmp_path / "src", {"x": 1})
    run(tmp_path / "src", tmp_path / "mixed")
    assert Pack(tmp_path / "mixed").class_names(0, 4) == ["0", "1", "10", "11"]


# Sources.


@pytest.mark.parametrize("text", ['path,label\n{0},7\n\n{1},"a, b"\n',
                                  "\ufeffLabel\tPATH\tnote\n7\t{0}\tx\na, b\t{1}\t\n"])
def test_manifest(tmp_path, text):
    files = write_tree(tmp_path / "images", {"p": 1, "q": 1})
    names = list(files)
    (tmp_path / "images" / "list").write_text(text.format(*names), encoding="utf-8")
    shutil.copy(tmp_path / "images" / "list", tmp_path / "list")
    run(tmp_path / "images" / "list", tmp_path / "beside")
    run(tmp_path / "list", tmp_path / "rooted", "--root", tmp_path / "images")
    for name in ("beside", "rooted"):
        assert contents(Pack(tmp_path / name)) == {files[names[0]]: "7", files[names[1]]: "a, b"}


def test_manifest_with_splits(tmp_path):
    names = list(files := write_tree(tmp_path, {"p": 4}))
    rows = [f"{name},{label},{split}" for name, label, split in
            zip(names, "1120", ("test", "train", "train", "train"), strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    run(tmp_path / "list.csv", tmp_path / "pack")
    packs = open_splits(tmp_path / "pack")
    assert {name: len(pack) for name, pack in packs.items()} == {"train": 3, "test": 1}
    assert contents(packs["test"]) == {files[names[0]]: "1"} and packs["test"].labels(0, 1)[0] == 1


@pytest.mark.parametrize("text, words", [
    ("", "columns path, label"),
    ("file,label\nx,1\n", "columns path, label"),
    ("path,label,path\nx,1,x\n", "columns path, label"),
    ("path,label\n", "no images"),
    ("path,label\nx.png,1\n../x.png,1\n", "line 3: path '../x.png'"),
    ("path,label\na/../../x.png,1\n", "line 2: path"),
    ("path,label\n/x.png,1\n", "line 2: path '/x.png'"),
    ("path,label\n,1\n", "line 2: path ''"),
    ("path,label\nx.png,\n", "line 2: no label"),
    ("path,label\nx.png\n", "line 2: 1 cells"),
    ("path,label,split\nx.png,1,dev\n", "line 2: split 'dev'"),
    ("path,label,split\nx.png,1,test\n", "of split train"),
    ('path,label\n"x.png,1\n', "not a CSV"),
    (b"path,label\n\xff,1\n", "UTF-8"),
])
def test_bad_manifest(tmp_path, capsys, text, words):
    (tmp_path / "list").write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path.parent / "x.png").write_bytes(picture(0))
    assert words in fails(capsys, tmp_path / "list", tmp_path / "pack")


def test_links_and_hidden_files(tmp_path, capsys):
    write_tree(tmp_path / "outside", {"secret": 2}, first=50)
    files = write_tree(tmp_path / "src", {"a": 2})
    (tmp_path / "src" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "src" / "a" / "loop").symlink_to(tmp_path / "src")
    (tmp_path / "src" / ".git").mkdir()
    (tmp_path / "src" / ".git" / "x.png").write_bytes(picture(60))
    (tmp_path / "src" / "a" / "notes.txt").write_text("x")
    run(tmp_path / "src", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == by_class(files)
    said = capsys.readouterr().err
    assert "2 links to folders" in said and "1 hidden" in said and "1 files that are not images" in said


# Images that cannot be used.


def png(width, height, num_bytes, *more):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + b"".join(chunk(*part) for part in more) + chunk(b"IDAT", zlib.compress(bytes(num_bytes)))
            + chunk(b"IEND", b""))


BAD = {"cut.png": picture(1, size=(40, 40))[:-900], "cut.jpg": picture(2, "JPEG", (40, 40))[:-500], "empty.png": b"",
       "text.gif": b"hello", "cut.bmp": picture(3, "BMP", (40, 40))[:-500], "huge.png": png(60000, 50000, 1000),
       "cut.webp": picture(4, "WEBP", (40, 40))[:-300], "cut.tif": picture(5, "TIFF", (40, 40))[:-500]}


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_listed_and_counted(tmp_path, capsys, workers):
    files = write_tree(tmp_path / "src", {"a": 3})
    files["a/odd.png"] = png(2, 2, 6, (b"acTL", bytes(8)))  # an animation of no frames: Pillow warns and decodes
    (tmp_path / "src" / "a" / "odd.png").write_bytes(files["a/odd.png"])
    with pytest.warns(UserWarning):
        xc.data.images.open_image(files["a/odd.png"])
    (tmp_path / "src" / "lost").mkdir()
    for name, data in BAD.items():
        (tmp_path / "src" / "lost" / name).write_bytes(data)
    (tmp_path / "src" / "lost" / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "src" / "lost" / "pipe.png")
    (tmp_path / "src" / "lost" / "tab\tline\n.png").write_bytes(b"bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(tmp_path / "src", tmp_path / "pack", "--max-skipped", len(BAD) + 3, "--workers", workers)
    pack = Pack(tmp_path / "pack")
    assert contents(pack) == by_class(files)
    assert pack.class_names(0, 2) == ["a", "lost"] and pack.class_counts.tolist() == [4, 0]
    assert pack.skipped == len(BAD) + 3
    header, *rows = [line.split("\t") for line in (tmp_path / "pack" / "skipped.tsv").read_text().splitlines()]
    assert header == ["path", "reason"]
    assert {path for path, _ in rows} == {f"lost/{name}" for name in [*BAD, "gone.png", "pipe.png", r"tab\tline\n.png"]}
    assert dict(rows)["lost/huge.png"].startswith("60000×50000 pixels")
    text = capsys.readouterr()
    assert "1 classes lost all their images" in text.err and "lost/" in text.err and "Warning" not in text.err
    assert json.loads(text.out.splitlines()[-1])["skipped"] == len(BAD) + 3


@pytest.mark.parametrize("allowed, fits", [("1", False), ("2", True), ("1%", False), ("10%", True), ("9.9%", False)])
def test_limit_of_skipped_images(tmp_path, capsys, allowed, fits):
    write_tree(tmp_path / "src", {"a": 18})
    for i in range(2):
        (tmp_path / "src" / "a" / f"bad{i}.png").write_bytes(b"bad")
    if fits:
        run(tmp_path / "src", tmp_path / "pack", "--max-skipped", allowed)
        assert len(Pack(tmp_path / "pack")) == 18
    else:
        error = fails(capsys, tmp_path / "src", tmp_path / "pack", "--max-skipped", allowed)
        assert "a/bad" in error and "--max-skipped" in error


def test_max_pixels(tmp_path):
    write_tree(tmp_path / "src", {"a": 1})  # 30 pixels
    (tmp_path / "src" / "a" / "large.png").write_bytes(picture(9, size=(31, 1)))
    run(tmp_path / "src", tmp_path / "pack", "--max-pixels", 30, "--max-skipped", 1)
    assert len(Pack(tmp_path / "pack")) == 1 and "31×1 pixels" in (tmp_path / "pack" / "skipped.tsv").read_text()


def test_progress_in_plain_lines(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path / "src")
    run(tmp_path / "src", tmp_path / "a")
    assert capsys.readouterr().err == ""  # over before the first line is due
    monkeypatch.setattr(data_tools.common.progress.Progress, "line_seconds", 0)
    run(tmp_path / "src", tmp_path / "b")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"listing: 1 images, [\d,.]+/s", lines[0])
    assert re.fullmatch(r"packing: 1 of 28 images, [\d,.]+/s, \d+ s left", lines[28])
    assert re.fullmatch(r"packing: 28 of 28 images, [\d,.]+/s, 0 s left", lines[-1])


def test_max_record_bytes(tmp_path, monkeypatch):
    files = write_tree(tmp_path / "src", {"a": 2})
    (tmp_path / "src" / "a" / "long.png").write_bytes(picture(9) + bytes(10**4))
    run(tmp_path / "src", tmp_path / "all")
    monkeypatch.setattr(xc.data.pack, "MAX_RECORD_BYTES", 10**4)
    run(tmp_path / "src", tmp_path / "pack", "--max-skipped", 1)
    assert contents(Pack(tmp_path / "pack")) == by_class(files)
    with pytest.raises(PackError, match=r"record \d: more than 10000 bytes"):
        Pack(tmp_path / "all").verify()


# Bad input, and ends in the middle.


@pytest.mark.parametrize("args, words", [
    (["nowhere", "pack"], "nowhere: no such file or folder"),
    (["empty", "pack"], "no images"),
    (["src", "src2"], "src2 exists"),
    (["src", "src/pack"], "lies inside"),
    (["src", "no/pack"], "no such folder"),
    (["src", "pack", "--root", "src"], "--root src"),
    (["rooted", "pack"], "0.png: an image without a class"),
    (["rooted-train", "pack"], "train/0.png: an image without a class"),
    (["src", "pack", "--classes", "src"], "src: not a pack"),
    (["src", "pack", "--workers", "-1"], "--workers: -1 is not between 0 and 4096"),
    (["src", "pack", "--seed", "x"], "--seed"),
    (["src", "pack", "--shard-mb", "nan"], "--shard-mb"),
    (["src", "pack", "--max-skipped", "1.5"], "--max-skipped: 1.5 is neither"),
    (["src", "pack", "--shards", "3"], "unrecognized arguments: --shards"),
    (["latin", "pack"], r"class name 'caf\udce9' is not valid UTF-8"),
    (["allbad", "pack", "--max-skipped", "100%"], "no image can be used: a/0.png"),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    for name in ("src", "src2"):
        write_tree(tmp_path / name, {"a": 1})
    (tmp_path / "empty" / "a").mkdir(parents=True)
    for name in (os.fsdecode(b"latin/caf\xe9/0.png"), "rooted/0.png", "rooted-train/train/0.png", "allbad/a/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"bad")
    assert words in fails(capsys, *args)


def slow(module, *args, until, seconds=0.1):
    """A real process of a tool whose fsync takes so many seconds; returned when `until` is true."""
    code = (f"import os, runpy, signal, time; os.fsync = lambda fd: time.sleep({seconds}); "
            "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a job in the background may ignore it
            f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)")
    process = subprocess.Popen([sys.executable, "-c", code, *args], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    deadline = time.monotonic() + 30
    while not until():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    return process


def slow_pack(tmp_path, *args):
    """A process that packs slowly, one image per shard; returned when it is at work."""
    write_tree(tmp_path / "src", {"a": 60})
    return slow("data_tools.pack", tmp_path / "src", tmp_path / "pack", "--shard-mb", "1e-6", *args, seconds=0.02,
                until=lambda: list(tmp_path.glob(".pack.partial-*/*/shard-00002.h5")))


def test_a_killed_pack_leaves_nothing_that_looks_whole(tmp_path):
    process = slow_pack(tmp_path, "--workers", "2")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    assert not (tmp_path / "pack").exists()
    [left] = tmp_path.glob(".pack.partial-*")
    for use in (Pack, open_splits):
        with pytest.raises(PackError):
            use(left)
    shutil.copytree(left, tmp_path / "renamed")
    with pytest.raises(PackError, match="index.h5: no such file"):
        Pack(tmp_path / "renamed")
    run(tmp_path / "src", tmp_path / "pack", "--shard-mb", "1e-6")
    assert Pack(tmp_path / "pack").verify() == 60 and not left.exists()
    shutil.copytree(tmp_path / "pack", left / "pack" / "train")  # killed later still
    with pytest.raises(PackError, match="did not end"):
        Pack(left / "pack" / "train")
    until = time.monotonic() + 10
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < until, "workers outlive their parent"
        time.sleep(0.05)


@pytest.mark.parametrize("number, send", [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_an_interrupted_pack_says_what_it_keeps(tmp_path, number, send):
    process = slow_pack(tmp_path, "--workers", "1")
    send(process.pid, number)  # a terminal's Ctrl-C reaches the workers too
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and error == (
        f"data_tools.pack: interrupted; {tmp_path}/.pack.partial-pack keeps what was done: the same command resumes "
        "from there\n")
    assert sorted(os.listdir(tmp_path)) == [".pack.partial-pack", "src"]


def test_no_space_is_one_line(tmp_path):
    write_tree(tmp_path / "src", {"a": 60})
    code = ("import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); "
            "runpy.run_module('data_tools.pack', run_name='__main__', alter_sys=True)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "src", tmp_path / "pack", "--workers", "0"], cwd=ROOT,
                          stderr=subprocess.PIPE, text=True, timeout=30)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"too large; {tmp_path}/.pack.partial-pack keeps what was done" in done.stderr  # the list of images
    run(tmp_path / "src", tmp_path / "pack")
    assert Pack(tmp_path / "pack").verify() == 60 and sorted(os.listdir(tmp_path)) == ["pack", "src"]


def test_a_dead_worker_is_one_line(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path / "src")
    monkeypatch.setattr(data_tools.packing.workers, "_start_worker", os.abort)
    assert "a worker died" in fails(capsys, tmp_path / "src", tmp_path / "pack", "--workers", 1)


# Decoding.


def test_decode_shapes_and_values():
    rows = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "PNG")
    with Image.open(io.BytesIO(file.getvalue())) as image:
        square = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(decode(file.getvalue(), 8, 1), square[None])
    assert np.array_equal(decode(file.getvalue(), 8, 3), np.stack([square] * 3))
    for mode, format in [("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("LA", "PNG")]:
        for channels in (1, 3):
            image = decode(picture(0, format, (9, 5), mode), 7, channels)
            assert image.shape == (channels, 7, 7) and image.dtype == np.uint8 and image.flags.c_contiguous
    same = decode(picture(0, size=(6, 6)), 6, 3)
    assert np.array_equal(same, np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8).transpose(2, 0, 1))


def pillows(data, size, channels):
    """What decode gives, by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, -1).transpose(2, 0, 1)


@pytest.mark.parametrize("mode, options", [("RGB", {}), ("RGB", {"subsampling": 0, "quality": 95}), ("L", {}),
                                           ("RGB", {"progressive": True}), ("RGB", {"keep_rgb": True}), ("CMYK", {}),
                                           ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"
                                                            b"\x06\0\0\0\0\0\0\0"})])  # turned by a quarter
@pytest.mark.parametrize("channels", [1, 3])
def test_jpegs_decode_as_by_pillow(mode, options, channels):
    for size in (17, 64):
        file = io.BytesIO()
        smooth = Image.fromarray(np.random.default_rng(size).integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth.resize((size, size)).convert(mode).save(file, "JPEG", **options)
        assert np.array_equal(decode(file.getvalue(), size, channels), pillows(file.getvalue(), size, channels))


@pytest.mark.parametrize("format, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")])
def test_stretched_images_are_those_of_pillow(format, mode):
    for shape in [(60, 50), (7, 500), (500, 7), (3, 4), (1, 1), (33, 32)]:
        data = picture(1, format, shape, mode)
        for size, channels in [(32, 1), (32, 3), (9, 3)]:
            apart = abs(decode(data, size, channels).astype(int) - pillows(data, size, channels))
            assert apart.max() <= 3 and apart.mean() < 0.3, (shape, size)


def test_a_damaged_jpeg_is_refused_or_is_what_pillow_makes_of_it():
    whole, refused = picture(2, "JPEG", (40, 40)), 0
    numbers = np.random.default_rng(0)
    spoilt = [whole[:length] for length in range(0, len(whole), 97)]
    for place in numbers.integers(2, len(whole), 200):
        spoilt.append(whole[:place] + bytes([numbers.integers(256)]) + whole[place + 1 :])
    for data in spoilt:
        try:
            expected = pillows(xc.data.images.open_image(data) and data, 40, 3)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError):
                decode(data, 40, 3)
        else:
            assert abs(decode(data, 40, 3).astype(int) - expected).max() <= 2
    assert 10 < refused < len(spoilt) - 10


def test_a_jpeg_too_large_is_refused_by_its_header():
    data = bytearray(picture(2, "JPEG", (40, 40)))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(ValueError, match="65000×65000 pixels, more than"):
        decode(bytes(data), 8, 3)
    assert decode(picture(2, "JPEG", (40, 40)), 8, 3, max_pixels=1600).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="40×40 pixels, more than 1599"):
        decode(picture(2, "JPEG", (40, 40)), 8, 3, max_pixels=1599)


def test_decode_averages_when_it_shrinks():
    file = io.BytesIO()
    Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).save(file, "PNG")
    assert abs(decode(file.getvalue(), 8, 1).astype(int) - 127).max() < 20  # without antialiasing: 0 and 255


def test_decode_keeps_the_upper_bits_of_16():
    values = np.array([[0, 255, 256], [40000, 65280, 65535], [1, 2, 3]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert np.array_equal(decode(file.getvalue(), 3, 1)[0], values >> 8)


@pytest.mark.parametrize("name", BAD)
def test_decode_refuses(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="pixels" if name == "huge.png" else "image|decode"):
            decode(BAD[name], 8, 3)


def test_no_warning_for_large_images_that_are_allowed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="does not decode"):  # the header passes, there is just no data
            decode(png(20000, 20000, 1000), 8, 1, max_pixels=10**9)
