"""Packing: nothing is lost or changed, and the same input gives the same bytes."""

import json
import os
import re
import shutil
import time

import h5py
import numpy as np
import pytest

import data_tools.common.progress
import data_tools.packing.catalogue
import data_tools.packing.workers
import data_tools.packing.write_part
from tests.support.commands import pack_fails, run_pack
from tests.support.images import CLASSES, by_class, picture, write_tree
from tests.support.packs import contents, file_hashes
from xc.data.pack import Pack, PackError, open_splits


@pytest.mark.parametrize("shard_mb, shards", [(1e-6, 28), (4e-4, None), (1e-3, None), (256, 1)])
def test_every_image_comes_back_once(tmp_path, shard_mb, shards):
    files = write_tree(tmp_path / "src")
    run_pack(tmp_path / "src", tmp_path / "pack", "--shard-mb", shard_mb)
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
    run_pack(tmp_path / "src", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == by_class(files)


def test_small_chunks_lose_nothing(tmp_path, monkeypatch):
    files = write_tree(tmp_path / "src")
    run_pack(tmp_path / "src", tmp_path / "a")
    for module in (data_tools.packing.workers, data_tools.packing.write_part):
        monkeypatch.setattr(module, "CHUNK_BYTES", 200)  # the worker stops after every second image
    monkeypatch.setattr(data_tools.packing.write_part, "CHUNK_RECORDS", 5)
    run_pack(tmp_path / "src", tmp_path / "b")
    assert contents(Pack(tmp_path / "b")) == by_class(files)
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")


def test_the_window_bounds_the_chunks_in_flight():
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
        run_pack(tmp_path / source / "src", tmp_path / name, "--workers", workers, "--seed", seed, "--shard-mb", 1e-3)
        if name == "0":
            time.sleep(1 - time.time() % 1)  # now a time in a file, in seconds, would differ
    assert len(file_hashes(tmp_path / "0")) > 3
    assert file_hashes(tmp_path / "0") == file_hashes(tmp_path / "1") == file_hashes(tmp_path / "2")
    everything = [Pack(tmp_path / name).read(np.arange(28)) for name in ("0", "other")]
    assert everything[0][0] != everything[1][0] and set(everything[0][0]) == set(everything[1][0])


def test_records_are_shuffled_over_the_classes(tmp_path):
    write_tree(tmp_path / "src", {"a": 50, "b": 50})
    run_pack(tmp_path / "src", tmp_path / "pack")
    labels = Pack(tmp_path / "pack").labels(0, 100)
    assert 30 < (np.diff(labels) != 0).sum() < 70  # 1 in order of folders; 50 ± 5 at random


def test_splits_share_the_classes_of_train(tmp_path, capsys):
    train = write_tree(tmp_path / "src" / "train", {"k/b": 3, "k/a": 2, "c": 1})
    test = write_tree(tmp_path / "src" / "test", {"c": 2, "k/b": 1}, first=100)
    (tmp_path / "src" / "LICENSE").write_text("free")
    run_pack(tmp_path / "src", tmp_path / "pack")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    sizes = {name: sum(map(len, split.values())) for name, split in {"train": train, "test": test}.items()}
    assert {**result, "seconds": 0} == {
        "records": 9, "classes": 3, "bytes": sum(sizes.values()), "shards": 2, "skipped": 0, "left_out": {},
        "seconds": 0, "splits": {"train": {"records": 6, "classes": 3, "bytes": sizes["train"], "shards": 1},
                   "test": {"records": 3, "classes": 2, "bytes": sizes["test"], "shards": 1}}}
    run_pack(tmp_path / "src", tmp_path / "again", "--json")
    again = json.loads(capsys.readouterr().out)
    assert {**again, "seconds": 0} == {**result, "seconds": 0}
    packs = open_splits(tmp_path / "pack")
    assert list(packs) == ["train", "test"]
    assert contents(packs["train"]) == by_class(train) and contents(packs["test"]) == by_class(test)
    for pack in packs.values():
        assert pack.class_names(0, 3) == ["c", "k/a", "k/b"]
    assert packs["test"].class_counts.tolist() == [2, 0, 1]
    assert list(open_splits(tmp_path / "pack" / "test")) == ["train"]

    run_pack(tmp_path / "src" / "train", tmp_path / "single")  # the same names: they go together
    shutil.rmtree(tmp_path / "pack" / "test")
    shutil.copytree(tmp_path / "single", tmp_path / "pack" / "val")
    assert list(open_splits(tmp_path / "pack")) == ["train", "val"]
    write_tree(tmp_path / "other", {"c": 2, "k/a": 1, "k/x": 1})
    run_pack(tmp_path / "other", tmp_path / "pack" / "test")
    with pytest.raises(PackError, match="classes are not those of train"):
        open_splits(tmp_path / "pack")


def test_unknown_test_class_is_named(tmp_path, capsys):
    write_tree(tmp_path / "src" / "train", {"a": 2, "b": 2})
    write_tree(tmp_path / "src" / "val", {"b": 1, "new": 2})
    error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack")
    assert "'new' of val" in error and "2 images" in error


def test_a_class_may_be_called_train(tmp_path):
    write_tree(tmp_path / "src", {"train": 1, "other": 2})
    run_pack(tmp_path / "src", tmp_path / "pack")
    assert Pack(tmp_path / "pack").class_names(0, 2) == ["other", "train"]


def test_classes_of_another_pack(tmp_path, capsys):
    write_tree(tmp_path / "src")
    run_pack(tmp_path / "src", tmp_path / "whole")
    files = write_tree(tmp_path / "new", {"ü": 2, "b": 1}, first=200)
    run_pack(tmp_path / "new", tmp_path / "pack", "--classes", tmp_path / "whole")
    pack = Pack(tmp_path / "pack")
    assert pack.classes_digest == Pack(tmp_path / "whole").classes_digest and pack.num_classes == len(CLASSES)
    assert contents(pack) == by_class(files)
    write_tree(tmp_path / "new", {"z": 1})
    assert "'z'" in pack_fails(capsys, tmp_path / "new", tmp_path / "pack2", "--classes", tmp_path / "whole")


def test_numbers_sort_as_numbers(tmp_path, capsys):
    write_tree(tmp_path / "src", {str(i): 1 for i in range(12)})
    run_pack(tmp_path / "src", tmp_path / "pack")
    assert Pack(tmp_path / "pack").class_names(0, 12) == [str(i) for i in range(12)]
    assert "gaps" not in capsys.readouterr().err
    shutil.rmtree(tmp_path / "src" / "5")
    run_pack(tmp_path / "src", tmp_path / "gap")
    assert Pack(tmp_path / "gap").class_names(4, 6) == ["4", "6"] and "gaps" in capsys.readouterr().err
    write_tree(tmp_path / "src", {"x": 1})
    run_pack(tmp_path / "src", tmp_path / "mixed")
    assert Pack(tmp_path / "mixed").class_names(0, 4) == ["0", "1", "10", "11"]


def test_progress_in_plain_lines(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path / "src")
    run_pack(tmp_path / "src", tmp_path / "a")
    assert capsys.readouterr().err == ""  # over before the first line is due
    monkeypatch.setattr(data_tools.common.progress.Progress, "line_seconds", 0)
    run_pack(tmp_path / "src", tmp_path / "b")
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"listing: 1 images, [\d,.]+/s", lines[0])
    assert re.fullmatch(r"packing: 1 of 28 images, [\d,.]+/s, \d+ s left", lines[28])
    assert re.fullmatch(r"packing: 28 of 28 images, [\d,.]+/s, 0 s left", lines[-1])


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
    assert words in pack_fails(capsys, *args)
