"""Sources of images: the same images give the same records whatever they come as; what cannot be used is counted."""

import codecs
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import data_tools.packing.external_sort
import xc.data.pack
from data_tools.packing.class_table import name_hash
from data_tools.packing.external_sort import Sorter
from data_tools.packing.select import names_in
from data_tools.packing.skipped import Skipped
from data_tools.sources import detect, recordio, webdataset
from tests.test_pack import ROOT, by_class, contents, fails, file_hashes, picture, png, run, write_tree
from xc.data.pack import Pack, open_splits

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
    assert detect.kind_of(str(source)) == kind.split()[0]
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


@pytest.mark.parametrize("memory_mb", [1e-3, 1024])
def test_a_list_of_classes_takes_those_only(tmp_path, capsys, files, memory_mb):
    source = make("pack", tmp_path / "source", files)
    (tmp_path / "list").write_bytes(b"3\r\n\n0\n17\n0\n" + b"x" * 5000 + b"\n")
    run(source, tmp_path / "pack", "--classes", tmp_path / "list", "--memory-mb", memory_mb)
    pack = Pack(tmp_path / "pack")
    assert contents(pack) == {data: name for data, name in by_class(files).items() if name in "03"}
    assert pack.class_names(0, pack.num_classes) == ["0", "3"] and pack.skipped == 0
    said = capsys.readouterr().err
    assert f"ignored 12 images of classes that {tmp_path / 'list'} does not name" in said and "have no images" in said
    (tmp_path / "list").write_bytes(codecs.BOM_UTF8 + b"3\n0")
    run(source, tmp_path / "marked", "--classes", tmp_path / "list")
    assert contents(Pack(tmp_path / "marked")) == contents(pack)
    (tmp_path / "list").write_text("17\n")
    capsys.readouterr()
    assert "no images" in fails(capsys, source, tmp_path / "none", "--classes", tmp_path / "list")


def test_a_long_list_of_classes_takes_some_bytes_each(tmp_path):
    (tmp_path / "list").write_text("".join(f"{number % 99_990}\n" for number in range(100_000)))
    tracemalloc.start()
    try:
        hashes = names_in(tmp_path / "list")
        assert tracemalloc.get_traced_memory()[1] < 100_000 * 40
    finally:
        tracemalloc.stop()
    assert hashes.tolist() == sorted({name_hash(b"%d" % number) for number in range(99_990)})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_path_has_one_label(tmp_path, capsys, kind):
    names = list(files := write_tree(tmp_path, {"p": 3}))

    def listed(*rows):
        path, label = [names[i] for i, _ in rows], [label for _, label in rows]
        if kind == "parquet":
            return write_parquet(tmp_path / "list.parquet", path=path, label=label)
        lines = ["path,label", *map(",".join, zip(path, label, strict=True))]
        (tmp_path / "list.csv").write_text("\n".join(lines))
        return tmp_path / "list.csv"

    for memory in 1e-3, 1:
        error = fails(capsys, listed((0, "a"), (1, "b"), (2, "a"), (1, "c"), (0, "a")), tmp_path / "pack",
                      "--memory-mb", memory)
        assert f"path {names[1]!r} has the labels 'b' and 'c' (1 such cases)" in error
    run(listed((0, "a"), (1, "b"), (0, "a"), (2, "c")), tmp_path / "pack")
    assert "1 rows name a path that an earlier row named" in capsys.readouterr().err
    images, _ = Pack(tmp_path / "pack").read(np.arange(4))
    assert sorted(images) == sorted([*files.values(), files[names[0]]])


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_path_has_one_label_however_it_is_written(tmp_path, capsys, kind):
    write_tree(tmp_path, {"p": 2})
    (tmp_path / "link").symlink_to(tmp_path)

    def listed(name, *rows):
        paths, labels = zip(*rows, strict=True)
        if kind == "parquet":
            return write_parquet(tmp_path / f"{name}.parquet", path=paths, label=labels)
        (tmp_path / f"{name}.csv").write_text("\n".join(["path,label", *map(",".join, rows)]))
        return tmp_path / f"{name}.csv"

    for other in "./p/0.png", "p//0.png", "p/./0.png":
        one = listed("one", ("p/0.png", "a"), (other, "b"))
        assert "path 'p/0.png' has the labels 'a' and 'b' (1 such" in fails(capsys, one, tmp_path / "pack")
    one, two = listed("one", ("p/0.png", "a"), ("p/1.png", "b")), listed("two", ("p/1.png", "c"))
    linked = tmp_path / "link" / two.name
    for second in two, linked:
        error = fails(capsys, one, second, tmp_path / "pack")
        assert "path 'p/1.png' has the labels 'b' and 'c' (1 such" in error
    write_tree(tmp_path / "more", {"p": 2}, first=7)  # other files with the same names
    os.rename(two, tmp_path / "more" / two.name)
    run(one, tmp_path / "more" / two.name, tmp_path / "pack")
    assert sorted(contents(Pack(tmp_path / "pack")).values()) == ["a", "b", "c"]


@pytest.mark.parametrize("names", [("train-0.tar", "train-1.tar", "test-0.tar"),
                                   ("train/0.tar", "train/1.tar", "test/x.tar"),
                                   ("a-train-0.tar", "b.train_7.tar", "crops_test.tar"),
                                   ("train-of-the-test-0.tar", "train.tar", "test-train.tar")])
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
    assert "more.tar: its name gives no split" in fails(capsys, tmp_path / "tars", tmp_path / "new")


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
@pytest.mark.parametrize("kind", ["folder", "shards", "folders of shards", "manifest"])
def test_validation_is_val_whatever_it_is_called(tmp_path, kind, name):
    files = {split: write_tree(tmp_path / "src" / split, {"0": 2, "1": 1}, first=10 * i)
             for i, split in enumerate(("train", name))}
    source = tmp_path / "src"
    if kind == "manifest":
        source = tmp_path / "src" / "list.csv"
        source.write_text("path,label,split\n" + "".join(
            f"{split}/{path},{path[0]},{split}\n" for split, some in files.items() for path in some))
    elif kind != "folder":
        source = tmp_path / "tars"
        for split, some in files.items():
            path = source / (f"set-{split}-00.tar" if kind == "shards" else f"{split}/00.tar")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tar(path, samples(some))
    run(source, tmp_path / "packs")
    packs = open_splits(tmp_path / "packs")
    assert packs.keys() == {"train", "val"}
    assert contents(packs["train"]) == by_class(files["train"]) and contents(packs["val"]) == by_class(files[name])


@pytest.mark.parametrize("suffix", ["tar", "rec", "parquet"])
def test_shards_of_several_splits_are_not_merged(tmp_path, capsys, suffix):
    paths = [tmp_path / f"{name}.{suffix}" for name in ("train-0", "train-1", "test-0")]
    for i, path in enumerate(paths):
        if suffix == "tar":
            write_tar(path, samples({"0/a": picture(i)}))
        elif suffix == "rec":
            write_rec(path, [image_record(0.0, picture(i))])
        else:
            write_parquet(path, image=[picture(i)], label=["0"])
    error = fails(capsys, *paths, tmp_path / "pack")
    assert "are named after different splits" in error and f"{paths[2]}" in error and "give that folder" in error
    run(*paths[:2], tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == {picture(0): "0", picture(1): "0"}


def test_splits_of_a_tree_are_not_lost_without_a_word(tmp_path, capsys):
    train, test = write_tree(tmp_path / "src" / "train", {"a": 3}), write_tree(tmp_path / "src" / "test", {"a": 2}, 50)
    write_tree(tmp_path / "src" / "__MACOSX" / "train", {"a": 1}, first=90)
    run(tmp_path / "src", tmp_path / "packs")
    packs = open_splits(tmp_path / "packs")
    assert contents(packs["train"]) == by_class(train) and contents(packs["test"]) == by_class(test)
    assert "ignored 1 hidden files and folders" in capsys.readouterr().err
    write_tree(tmp_path / "src" / "more", {"b": 1}, first=80)
    run(tmp_path / "src", tmp_path / "one")
    assert Pack(tmp_path / "one").class_names(0, 3) == ["more/b", "test/a", "train/a"]
    assert "src: test, train are taken for classes, not for splits, because more stands beside them" in (
        capsys.readouterr().err)
    os.rename(tmp_path / "src" / "test", tmp_path / "src" / "other")
    run(tmp_path / "src", tmp_path / "train")  # may well be a class
    assert "taken for classes" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_a_share_is_held_out(tmp_path, capsys, kind):
    files = write_tree(tmp_path / "files", {str(i): 1 + i % 3 for i in range(100)})  # classes of one image, too
    source = make(kind, tmp_path / "source", files)
    for name, args in {"a": [], "b": ["--memory-mb", 1e-3, "--workers", 2], "c": ["--seed", 1]}.items():
        run(source, tmp_path / name, "--split", "test=0.3", *args)
        packs = open_splits(tmp_path / name)
        train, test = contents(packs["train"]), contents(packs["test"])
        assert not train.keys() & test.keys() and train | test == by_class(files)
        assert 40 < len(test) < 80 and packs["train"].num_classes == 100  # 60 ± 6.5
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")
    assert contents(open_splits(tmp_path / "a")["test"]) != test
    assert " classes have images in test and none in train\n" in capsys.readouterr().err
    assert "has split t" in fails(capsys, tmp_path / "a", tmp_path / "new", "--split", "val=0.5")
    for wrong in ("train=0.1", "test=1", "test=0", "test=nan", "test", "dev=0.1"):
        assert "is not like test=0.01" in fails(capsys, source, tmp_path / "new", "--split", wrong)


def test_sources_with_and_without_splits_do_not_mix(tmp_path, capsys):
    write_tree(tmp_path / "one" / "train", {"a": 2})
    write_tree(tmp_path / "two", {"a": 2})
    assert "some images have a split" in fails(capsys, tmp_path / "one", tmp_path / "two", tmp_path / "pack")


# Sorting.


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
    run(tmp_path / "src", tmp_path / "pack", "--memory-mb", "1e-3")
    assert Pack(tmp_path / "pack").class_names(0, 7) == ["0", "00", "007", "7", "9", "10", str(10**30)]
    assert "gaps" in capsys.readouterr().err


# Bad input: one clear line, or counted.


def peak(module, *args):
    """KiB of memory of a process of data_tools.module."""
    code = (f"import re, sys; from data_tools.{module} import main; main(sys.argv[1:]); "
            "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])")
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                          check=True, timeout=300)
    return int(done.stdout.splitlines()[-1])


def test_large_images_take_the_memory_of_some_of_them(tmp_path):
    """50 of about 4 MB, 200 MB together."""
    def members():
        for number in range(50):
            yield f"{number}.bmp", picture(number, "BMP", (1000 + 20 * (number % 8), 1200))
            yield f"{number}.cls", str(number % 3).encode()

    write_tar(tmp_path / "a.tar", members())
    few = "--shard-mb", 8
    peaks = [peak("pack", tmp_path / "a.tar", tmp_path / "a", "--workers", 0, "--memory-mb", 4, *few)]
    (tmp_path / "a.tar").unlink()
    for module, *flags in (("pack", "--workers", 0, "--memory-mb", 4, *few), ("split", "--test", 0.2, *few),
                           ("export", "--to", "webdataset"), ("export", "--to", "folder")):
        peaks.append(peak(module, tmp_path / "a", tmp_path / "b", *flags))
        shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert max(peaks) < 150_000, peaks  # Python and its libraries take 60,000


def skipped_rows(pack):
    return [line.split("\t") for line in (pack / "skipped.tsv").read_text().splitlines()[1:]]


def odd(name, kind=None, **fields):
    member = tarfile.TarInfo(name)
    member.type = kind or tarfile.REGTYPE
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def test_members_that_are_not_taken_from_a_tar_are_counted(tmp_path, capsys):
    image = picture(0)
    bad = {
        "/etc/x.png": [("/etc/x.png", image), ("/etc/x.cls", b"a")],
        "../x.png": [("../x.png", image)],
        "a/../../y.png": [("a/../../y.png", image)],
        "link.png": [(odd("link.png", tarfile.SYMTYPE, linkname="/etc/passwd"), b"")],
        "hard.png": [(odd("hard.png", tarfile.LNKTYPE, linkname="0.png"), b"")],
        "device.png": [(odd("device.png", tarfile.CHRTYPE, devmajor=1, devminor=5), b"")],
        "pipe.png": [(odd("pipe.png", tarfile.FIFOTYPE), b"")],
        "long.json": [("long.json", b"1" * 70_000)],
        "nolabel": [("nolabel.png", image)],
        "noimage": [("noimage.cls", b"3")],
        "two": [("two.png", image), ("two.jpg", image), ("two.cls", b"a")],
        "conflict": [("conflict.png", image), ("conflict.cls", b"a"), ("conflict.json", b'{"label": "b"}')],
        "names": [("names.png", image), ("names.cls", b"1"), ("names.json", b'{"label": 2, "xc_class_name": "b"}')],
        "noname": [("noname.png", image), ("noname.json", b'{"label": 2, "xc_class_name": 3}')],
        "list": [("list.png", image), ("list.json", b"[1]")],
        "deep": [("deep.png", image), ("deep.json", b"[" * 60_000)],
        "broken": [("broken.png", image), ("broken.json", b"{")],
        "true": [("true.png", image), ("true.json", b'{"label": true}')],
        "real": [("real.png", image), ("real.json", b'{"label": 1.5}')],
        "empty": [("empty.png", image), ("empty.cls", b" \n")],
        "latin": [("latin.png", image), ("latin.cls", b"caf\xe9")],
        "notimage": [("notimage.png", b"hello"), ("notimage.cls", b"a")],
        "huge": [("huge.png", png(60000, 50000, 1000)), ("huge.cls", b"a")],
    }
    good = write_tree(tmp_path / "good", {"a": 3, "ü " + "n" * 150: 2}, first=10)
    members = [member for case in bad.values() for member in case]
    for i, (name, data) in enumerate(good.items()):
        members += [(f"ö{'x' * 180}/{i}.PNG", data), (f"ö{'x' * 180}/{i}.cls", name.rpartition("/")[0].encode()),
                    (f"ö{'x' * 180}/{i}.txt", b"a caption")]
    write_tar(tmp_path / "a.tar", members)
    run(tmp_path / "a.tar", tmp_path / "pack", "--max-skipped", 100)
    assert contents(Pack(tmp_path / "pack")) == by_class(good)
    rows = skipped_rows(tmp_path / "pack")
    for name in bad:
        assert [path for path, _ in rows if path.endswith(f"a.tar: {name}")], name
    assert Pack(tmp_path / "pack").skipped == len(rows) == len(bad) + 1  # the label of /etc/x.png
    assert "ignored 5 members" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "good", "pack"}
    assert "allows 0" in fails(capsys, tmp_path / "a.tar", tmp_path / "pack2", "--max-skipped", "0")


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path):
    marked = [("a.cls", b"cat"), ("b.cls", codecs.BOM_UTF8 + b"cat"), ("c.json", codecs.BOM_UTF8 + b'{"label": "cat"}')]
    write_tar(tmp_path / "a.tar", [member for i, (name, data) in enumerate(marked)
                                   for member in ((f"{name[0]}.png", picture(i)), (name, data))])
    run(tmp_path / "a.tar", tmp_path / "pack", "--max-skipped", 0)
    assert contents(Pack(tmp_path / "pack")) == {picture(i): "cat" for i in range(3)}


def test_a_tar_that_is_cut_anywhere_is_one_line(tmp_path, capsys):
    files = write_tree(tmp_path / "src", {"0": 2})
    whole = write_tar(tmp_path / "whole.tar", samples(files)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in (0, 1, 511, 512, 700, 1024, 1536, 2048, end, (end + 511) // 512 * 512, (end + 1023) // 512 * 512):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        assert "cut.tar: cut short or not a tar file" in fails(capsys, tmp_path / "cut.tar", tmp_path / "pack"), length
    (tmp_path / "cut.tar").write_bytes(b"not a tar file" * 1000)
    assert "cut.tar: cut short or not a tar file" in fails(capsys, tmp_path / "cut.tar", tmp_path / "pack")


def test_a_tar_header_cannot_fill_the_memory(tmp_path, capsys):
    for kind in webdataset.HEADERS:
        header = odd("x", kind, size=2**21).tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(header + b"1" * 2**21 + bytes(1024))
        assert "a header of 2097152 bytes" in fails(capsys, tmp_path / "a.tar", tmp_path / "pack")


def test_a_tar_header_for_all_members_has_few_keys(tmp_path, capsys):
    """tarfile copies them for each member that has a header of its own."""
    files = write_tree(tmp_path / "src", {"0": 2})
    for count in webdataset.MAX_GLOBAL_KEYS, webdataset.MAX_GLOBAL_KEYS + 1:
        keys = {f"key{i}": "x" for i in range(count)}
        with tarfile.open(tmp_path / "a.tar", "w", pax_headers=keys) as tar:
            for name, data in samples(files):
                tar.addfile(odd(name, size=len(data)), io.BytesIO(data))
        if count == webdataset.MAX_GLOBAL_KEYS:
            run(tmp_path / "a.tar", tmp_path / "few")
            assert contents(Pack(tmp_path / "few")) == by_class(files)
    assert "a.tar: cut short or not a tar file: global headers of 257 keys" in fails(capsys, tmp_path / "a.tar",
                                                                                    tmp_path / "pack")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_chain_of_tar_headers_is_one_line(tmp_path, capsys, kind):
    header = odd("x", kind, size=512).tobuf(tarfile.GNU_FORMAT) + b"9 a=bcde\n".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(header * 2000 + bytes(1024))
    assert "a.tar: a member has too many headers" in fails(capsys, tmp_path / "a.tar", tmp_path / "pack")


@pytest.mark.parametrize("name, size, reason", [
    ("a.png", 2**18, "several images"), ("a.cls", 2**16, f"more than {webdataset.MAX_LABELS} files with a label")])
def test_a_sample_cannot_fill_the_memory(tmp_path, name, size, reason):
    image = picture(1)
    write_tar(tmp_path / "a.tar", [("a.jpg", image), *[(name, b"1" * size)] * 100, ("b.png", image), ("b.cls", b"1")])
    with Skipped(tmp_path / "skipped.tsv", "1") as skipped:
        tracemalloc.start()
        try:
            records = list(webdataset.records(str(tmp_path / "a.tar"), skipped))
            assert tracemalloc.get_traced_memory()[1] < 10 * size + 2**20
        finally:
            tracemalloc.stop()
    assert [data for *_, data in records] == [image] and skipped.tally.count == 1 and reason in str(skipped.tally)


@pytest.mark.parametrize("size", [2**40, 2**70])
def test_a_tar_member_that_claims_more_than_the_file_is_one_line(tmp_path, capsys, size):
    """tarfile looked for the end of it without end."""
    for name in "x.png", "x.txt":
        (tmp_path / "a.tar").write_bytes(odd(name, size=size).tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        assert f"ends inside {name}" in fails(capsys, tmp_path / "a.tar", tmp_path / "pack")


def test_recordio_is_cut_at_the_magic_number_and_joined_again(tmp_path):
    random = np.random.default_rng(0)
    cases = [b"", b"x", recordio.MAGIC, recordio.MAGIC * 3, b"ab" + recordio.MAGIC]
    cases += [b"".join(random.choice([recordio.MAGIC, b"abcd", b"x"], 9)) for _ in range(50)]
    path = write_rec(tmp_path / "a.rec", cases)
    assert sum(case.count(recordio.MAGIC) for case in cases) > 50
    kinds = {path.read_bytes()[place + 7] >> 5 for place, _ in recordio.read_records(path)}
    assert kinds == {recordio.WHOLE, recordio.FIRST}
    assert [data for _, data in recordio.read_records(path, tmp_path / "a.idx")] == cases


def test_a_rec_that_is_cut_or_damaged_is_one_line(tmp_path, capsys):
    images = [image_record(1.0, picture(i)) for i in range(3)]
    whole = write_rec(tmp_path / "whole.rec", images, index=False).read_bytes()
    second = [place for place, _ in recordio.read_records(tmp_path / "whole.rec")][1]
    for length in (4, 7, 8, 100, second + 2, second + 8, len(whole) - 1):
        (tmp_path / "a.rec").write_bytes(whole[:length])
        assert "cut short" in fails(capsys, tmp_path / "a.rec", tmp_path / "pack"), length
    for data in (whole[:second] + b"abcd" + whole[second + 4 :], b"abcd" + whole, part(recordio.LAST, b"x") + whole,
                 part(recordio.FIRST, b"x") + whole):
        (tmp_path / "a.rec").write_bytes(data)
        error = fails(capsys, tmp_path / "a.rec", tmp_path / "pack", "--from", "recordio")
        assert "a.rec: no record at byte" in error
    (tmp_path / "a.rec").write_bytes(whole[:second] + part(recordio.FIRST, b"x"))
    assert "cut short" in fails(capsys, tmp_path / "a.rec", tmp_path / "pack")


def test_records_that_hold_no_image_of_a_class_are_counted(tmp_path, monkeypatch):
    image = picture(0)
    bad = [image_record(label, picture(1)) for label in (-1.0, 0.5, float("nan"), float("inf"))]
    bad += [b"short", recordio.IMAGE.pack(2**32 - 1, 0.0, 0, 0) + b"x", image_record(3.0, b"hello"),
            image_record(3.0, bytes(5000)), image_record(3.0, recordio.MAGIC * 1500)]
    write_rec(tmp_path / "a.rec", [*bad, image_record(3.0, image)])
    monkeypatch.setattr(xc.data.pack, "MAX_RECORD_BYTES", 4000)
    run(tmp_path / "a.rec", tmp_path / "pack", "--max-skipped", len(bad))
    assert contents(Pack(tmp_path / "pack")) == {image: "3"}
    rows = skipped_rows(tmp_path / "pack")
    assert len(rows) == len(bad) and sum(reason == "more than 4000 bytes" for _, reason in rows) == 2


def test_labels_that_float32_does_not_tell_apart_are_one_line(tmp_path, capsys):
    below, first = float(2**24 - 1), float(2**24)
    write_rec(tmp_path / "a.rec", [image_record(below, picture(0)), image_record(first, b"")])
    run(tmp_path / "a.rec", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == {picture(0): str(2**24 - 1)}
    write_rec(tmp_path / "a.rec", [image_record(below, picture(0)), image_record([first], picture(1))])
    capsys.readouterr()
    error = fails(capsys, tmp_path / "a.rec", tmp_path / "new")
    assert "a.rec: record 1: label 16777216, but" in error and "from another source" in error


@pytest.mark.parametrize("text", [lambda text: text + "\n\r\n \n", lambda text: text.replace("\n", "\n\n")])
def test_blank_lines_of_an_index_say_nothing(tmp_path, text):
    write_rec(tmp_path / "a.rec", [image_record(1.0, picture(i)) for i in range(3)])
    (tmp_path / "a.idx").write_text(text((tmp_path / "a.idx").read_text()))
    run(tmp_path / "a.rec", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == {picture(i): "1" for i in range(3)}


@pytest.mark.parametrize("text, words", [
    (lambda text: text + "\n\n9\t0\n", "line 6 is of byte 0, but"),
    (lambda text: text + "9\t0\n", "line 4 is of byte 0, but"),
    (lambda text: text[: text.rindex("2\t")], "has no more lines, but"),
    (lambda text: text.replace("\n1\t", "\n1\t1"), "line 2 is of byte 1"),
    (lambda text: text.replace("\t", ","), "line 1 is of no byte"),
    (lambda text: "\0" * 9999, "line 1 is of no byte"),
    (lambda text: "", "has no more lines"),
])
def test_an_index_that_is_not_that_of_the_rec_is_one_line(tmp_path, capsys, text, words):
    write_rec(tmp_path / "a.rec", [image_record(1.0, picture(i)) for i in range(3)])
    (tmp_path / "a.idx").write_text(text((tmp_path / "a.idx").read_text()))
    error = fails(capsys, tmp_path / "a.rec", tmp_path / "pack")
    assert "a.idx: " in error and words in error
    (tmp_path / "a.idx").unlink()
    run(tmp_path / "a.rec", tmp_path / "pack")


@pytest.mark.parametrize("text, binary", [(pa.string(), pa.binary()), (pa.large_string(), pa.large_binary()),
                                          (pa.string_view(), pa.binary_view())])
def test_texts_and_images_of_any_arrow_type_are_read(tmp_path, capsys, text, binary):
    files = write_tree(tmp_path, {"a": 3, "n" * 99: 2})
    labels = pa.array([name.partition("/")[0] for name in files], text)
    splits, images = pa.array(["train"] * 5, text), pa.array(files.values(), binary)
    structs = pa.StructArray.from_arrays([images], ["bytes"])
    for name, columns in ("paths", {"path": pa.array(files, text)}), ("bytes", {"image": images}), (
            "structs", {"image": structs}):
        source = write_parquet(tmp_path / f"{name}.parquet", label=labels, split=splits, **columns)
        run(source, tmp_path / name)
        assert contents(Pack(tmp_path / name / "train")) == by_class(files)
    write_parquet(tmp_path / "a.parquet", image=images, label=pa.array(["a", "b" * 5000, "", "", ""], text))
    assert "row 2: label of 5000 bytes, more than 4096" in fails(capsys, tmp_path / "a.parquet", tmp_path / "new")


@pytest.mark.parametrize("columns, words", [
    ({"label": ["a"]}, "must have the columns"),
    ({"path": ["x.png"]}, "must have the columns"),
    ({"path": [1], "label": ["a"]}, "column path is of type int64"),
    ({"path": ["x.png"], "label": [0.5]}, "column label is of type double"),
    ({"image": ["text"], "label": ["a"]}, "column image is of type string"),
    ({"image": [{"data": b""}], "label": ["a"]}, "column image is of type struct"),
    ({"path": ["x.png", "/x.png"], "label": ["a", "a"]}, "row 2: path '/x.png'"),
    ({"path": ["../x.png"], "label": ["a"]}, "row 1: path '../x.png'"),
    ({"path": [None], "label": pa.array(["a"])}, "column path is of type null"),
    ({"path": pa.array([None], pa.string()), "label": ["a"]}, "row 1: path ''"),
    ({"path": ["x.png"], "label": pa.array([None], pa.int64())}, "row 1: no label"),
    ({"path": ["x.png"], "label": [1], "split": ["dev"]}, "row 1: split 'dev'"),
    ({"image": pa.array([None], pa.binary()), "label": [1]}, "row 1: no image"),
    ({"path": pa.array([], pa.string()), "label": pa.array([], pa.string())}, "no images"),
])
def test_bad_parquet_is_one_line(tmp_path, capsys, columns, words):
    write_parquet(tmp_path / "a.parquet", **columns)
    assert words in fails(capsys, tmp_path / "a.parquet", tmp_path / "pack")


def test_a_parquet_file_that_is_cut_is_one_line(tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", image=[picture(i) for i in range(20)], label=[1] * 20)
    whole = path.read_bytes()
    for data in (whole[:-9], whole[:100], b"PAR1", whole[:300] + bytes(900) + whole[1200:]):
        path.write_bytes(data)
        assert "a.parquet: not readable as Parquet" in fails(capsys, path, tmp_path / "pack", "--max-skipped", "0")


def test_a_damaged_pack_is_one_line(tmp_path, capsys, files):
    source = make("pack", tmp_path / "source", files)
    with open(source / "shard-00000.h5", "r+b") as file:
        data = file.read()
        file.seek(data.index(b"IDAT") + 9)
        file.write(b"damage")
    assert "wrong checksum" in fails(capsys, source, tmp_path / "pack")


@pytest.mark.parametrize("kind", MADE)
def test_another_kind_is_not_read_as_this_one(tmp_path, capsys, files, kind):
    source = make(kind, tmp_path / "source", files)
    for other in {name.split()[0] for name in MADE} - {kind.split()[0]}:
        if not (source.is_dir() and other == "folder"):  # any folder may hold images
            fails(capsys, source, tmp_path / "pack", "--from", other)
    if source.is_dir() or kind.split()[0] not in ("manifest", "parquet"):
        assert "--root" in fails(capsys, source, tmp_path / "pack", "--root", tmp_path)


def test_a_class_may_have_the_name_of_a_packs_index(tmp_path):
    files = write_tree(tmp_path / "src", {"index.h5": 2, "train/index.h5": 1})
    assert detect.kind_of(str(tmp_path / "src")) == "folder"
    run(tmp_path / "src", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == by_class(files)


def test_a_folder_is_no_manifest_and_a_file_no_folder(tmp_path, capsys):
    write_tree(tmp_path / "src", {"a": 1})
    write_tar(tmp_path / "a.tar", [])
    error = fails(capsys, tmp_path / "src", tmp_path / "pack", "--from", "manifest")
    assert f"{tmp_path / 'src'}: a folder, but --from manifest needs a file" in error
    for kind in "folder", "pack":
        error = fails(capsys, tmp_path / "a.tar", tmp_path / "pack", "--from", kind)
        assert f"{tmp_path / 'a.tar'}: a file, but --from {kind} needs a folder" in error


def test_a_class_name_has_an_end(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("a.cls", b"n" * 4097)])
    assert "has 4097 bytes, more than 4096" in fails(capsys, tmp_path / "a.tar", tmp_path / "pack")
    write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("a.cls", b"n" * 4096)])
    run(tmp_path / "a.tar", tmp_path / "pack")
    assert Pack(tmp_path / "pack").class_name(0) == "n" * 4096


def test_a_disk_that_fills_up_while_sorting_is_one_line(tmp_path):
    files = write_tree(tmp_path / "src", {"0": 60})
    write_tar(tmp_path / "a.tar", samples(files))
    before = sorted(os.listdir(tmp_path))
    code = ("import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); "
            "runpy.run_module('data_tools.pack', run_name='__main__', alter_sys=True)")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.tar", tmp_path / "pack", "--workers", "0",
                           "--memory-mb", "0.005"], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "too large; nothing was kept" in done.stderr
    assert sorted(os.listdir(tmp_path)) == before
