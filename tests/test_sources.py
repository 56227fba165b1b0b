"""Sources of images: the same images give the same records whatever they come as; what cannot be used is counted."""

import io
import json
import os
import struct
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import data_tools.external_sort
import data_tools.pack
from data_tools import recordio, sources
from data_tools.external_sort import Sorter
from tests.test_pack import by_class, contents, fails, file_hashes, picture, png, run, write_tree
from xc.pack import Pack, open_splits

CLASSES = {"0": 5, "1": 11, "2": 1, "3": 7}  # numbers, since RecordIO has nothing else


def write_tar(path, members):
    """members  [(name or TarInfo, bytes)]"""
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(files, first=0):
    """Members of a tar with the images of {path: bytes}, labels as .cls and .json by turns."""
    for number, (name, data) in enumerate(files.items(), first):
        label = name.rpartition("/")[0]
        yield f"s/{number:06d}.png", data
        if number % 2:
            yield f"s/{number:06d}.cls", label.encode()
        else:
            yield f"s/{number:06d}.json", json.dumps({"label": int(label), "more": [1]}).encode()


def part(kind, data):
    return recordio.PART.pack(recordio.MAGIC, kind << 29 | len(data)) + data + bytes(-len(data) % 4)


def written(record):
    """A record in its parts, cut where the magic number stands at a multiple of 4, as mxnet does."""
    pieces, start = [], 0
    for place in range(0, len(record) - 3, 4):
        if record[place : place + 4] == recordio.MAGIC:
            pieces.append(record[start:place])
            start = place + 4
    pieces.append(record[start:])
    if len(pieces) == 1:
        return part(recordio.WHOLE, record)
    kinds = [recordio.FIRST] + [recordio.MIDDLE] * (len(pieces) - 2) + [recordio.LAST]
    return b"".join(map(part, kinds, pieces))


def image_record(label, image, number=0):
    if isinstance(label, list):
        return recordio.IMAGE.pack(len(label), 0.0, number, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return recordio.IMAGE.pack(0, label, number, 0) + image


def write_rec(path, records, index=True):
    places, data = [], b""
    for record in records:
        places.append(len(data))
        data += written(record)
    path.write_bytes(data)
    if index:
        path.with_suffix(".idx").write_text("".join(f"{i}\t{place}\n" for i, place in enumerate(places)))
    return path


def write_parquet(to, **columns):
    pyarrow.parquet.write_table(pa.table(columns), to, row_group_size=7)
    return to


def make(kind, folder, files):
    """A source of one kind with the images of {class/name: bytes}."""
    folder.mkdir(exist_ok=True)
    labels = [name.rpartition("/")[0] for name in files]
    if kind == "folder":
        for name, data in files.items():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes(data)
        return folder / "tree"
    if kind == "manifest":
        root = make("folder", folder, files)
        rows = zip(["path", *files], ["label", *labels], strict=True)
        (root / "list.tsv").write_text("".join(f"{path}\t{label}\n" for path, label in rows))
        return root / "list.tsv"
    if kind == "parquet of paths":
        root = make("folder", folder, files)
        return write_parquet(root / "list.parquet", path=list(files), label=labels)
    if kind == "parquet of bytes":
        return write_parquet(folder / "a.parquet", image=list(files.values()), label=[int(label) for label in labels])
    if kind == "parquet of structs":
        images = [{"bytes": data, "path": None} for data in files.values()]
        return write_parquet(folder / "a.parquet", image=images, label=pa.array(labels).dictionary_encode())
    if kind == "webdataset":
        (folder / "tars").mkdir()
        names = list(files)
        for shard in range(3):
            some = {name: files[name] for name in names[shard::3]}
            write_tar(folder / "tars" / f"{shard}.tar", samples(some))
        return folder / "tars"
    if kind == "recordio":
        images = [image_record(float(label), data) if i % 2 else image_record([float(label), 7.5], data)
                  for i, (label, data) in enumerate(zip(labels, files.values(), strict=True))]
        first = image_record([float(len(images)), 99.0], b"")
        return write_rec(folder / "train.rec", [first, *images, image_record([1.0, 3.0], b"")])
    assert kind == "pack"
    run(make("folder", folder, files), folder / "source.pack", "--seed", 5, "--shard-mb", 1e-3)
    return folder / "source.pack"


MADE = ["folder", "manifest", "parquet of paths", "parquet of bytes", "parquet of structs", "webdataset", "recordio",
        "pack"]


@pytest.fixture
def files(tmp_path):
    files = write_tree(tmp_path / "files", CLASSES)
    files["3/magic.png"] = png(2, 2, 6, (b"teXt", b"\0\0\0" + recordio.MAGIC * 9))  # which RecordIO must escape
    return files


# Laws.


@pytest.mark.parametrize("kind", MADE)
def test_whatever_images_come_as_the_records_are_the_same(tmp_path, files, kind):
    source = make(kind, tmp_path / "source", files)
    assert sources.kind_of(str(source)) == kind.split()[0]
    for name, args in {"whole": [], "spilled": ["--memory-mb", 1e-3, "--workers", 2], "shards": ["--shard-mb", 1e-3],
                       "named": ["--from", kind.split()[0]], "seed": ["--seed", 1]}.items():
        run(source, tmp_path / name, *args)
        pack = Pack(tmp_path / name)
        assert contents(pack) == by_class(files) and pack.verify() == len(files) and pack.skipped == 0
        assert pack.class_names(0, 4) == ["0", "1", "2", "3"] and os.listdir(tmp_path / name).count("work") == 0
    assert file_hashes(tmp_path / "whole") == file_hashes(tmp_path / "spilled") == file_hashes(tmp_path / "named")
    assert Pack(tmp_path / "whole").read([0, 1, 2, 3, 4])[0] != Pack(tmp_path / "seed").read([0, 1, 2, 3, 4])[0]


def test_packs_are_merged_by_the_names_of_their_classes(tmp_path):
    one, two = write_tree(tmp_path / "one", {"a": 3, "c": 2}), write_tree(tmp_path / "two", {"b": 4, "c": 3}, first=50)
    for name in ("one", "two"):
        run(tmp_path / name, tmp_path / f"{name}.pack")
    write_tar(tmp_path / "three.tar", [("x.png", picture(90)), ("x.cls", b"d")])
    run(tmp_path / "one.pack", tmp_path / "two.pack", tmp_path / "three.tar", tmp_path / "all")
    pack = Pack(tmp_path / "all")
    assert contents(pack) == by_class(one) | by_class(two) | {picture(90): "d"}
    assert pack.class_names(0, 4) == ["a", "b", "c", "d"] and pack.class_counts.tolist() == [3, 4, 5, 1]


def test_trees_are_merged_too(tmp_path):
    one, two = write_tree(tmp_path / "one", {"a": 3}), write_tree(tmp_path / "two", {"a": 4}, first=50)
    run(tmp_path / "one", tmp_path / "two", tmp_path / "all")
    images, labels = Pack(tmp_path / "all").read(np.arange(7))
    assert set(images) == {*one.values(), *two.values()} and set(labels) == {0}


@pytest.mark.parametrize("names", [("train-0.tar", "train-1.tar", "test-0.tar"),
                                   ("train/0.tar", "train/1.tar", "test/x.tar")])
def test_shards_are_of_the_split_they_are_named_after(tmp_path, capsys, names):
    made = [write_tree(tmp_path / str(i), {"0": 2, "1": 1}, first=10 * i) for i in range(3)]
    for name, some in zip(names, made, strict=True):
        (tmp_path / "tars" / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / "tars" / name, samples(some))
    run(tmp_path / "tars", tmp_path / "packs")
    packs = open_splits(tmp_path / "packs")
    assert contents(packs["train"]) == by_class(made[0]) | by_class(made[1])
    assert contents(packs["test"]) == by_class(made[2])
    run(tmp_path / "packs", tmp_path / "again", "--seed", 9)  # and a pack with splits keeps them
    for split, pack in open_splits(tmp_path / "again").items():
        assert contents(pack) == contents(packs[split])
    write_tar(tmp_path / "tars" / "more.tar", samples(made[0]))
    assert "more.tar: of no split" in fails(capsys, tmp_path / "tars", tmp_path / "new")


def test_sources_with_and_without_splits_do_not_mix(tmp_path, capsys):
    write_tree(tmp_path / "one" / "train", {"a": 2})
    write_tree(tmp_path / "two", {"a": 2})
    assert "some images have a split" in fails(capsys, tmp_path / "one", tmp_path / "two", tmp_path / "pack")


# Sorting.


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("memory", [1, 300, 20_000, 10**9])
def test_sorting_on_disk_is_sorting(tmp_path, monkeypatch, unique, memory):
    monkeypatch.setattr(data_tools.external_sort, "MAX_RUNS", 3)
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
    run(tmp_path / "src", tmp_path / "pack", "--memory-mb", "1e-3")
    assert Pack(tmp_path / "pack").class_names(0, 7) == ["0", "00", "007", "7", "9", "10", str(10**30)]
    assert "gaps" in capsys.readouterr().err
