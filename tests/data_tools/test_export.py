"""Packs written as other programs read them: nothing lost or changed, nothing outside, packed again the same."""

import csv
import itertools
import json
import os
import random
import shutil
import tarfile
import tracemalloc
from pathlib import Path

import pytest

import data_tools.export
from data_tools.exports.folder import MAX_FOLDERS, MAX_NAME, folder_of, taken_for_splits
from tests.support.commands import call, refused, run_pack
from tests.support.images import picture, write_tree
from tests.support.packs import file_hashes, records, write_pack
from xc.data.pack import Pack, open_splits

CLASSES = {"b": 5, "a/x": 11, "a": 3, "c 10": 7, "ü": 4, "train": 2, "1": 1}
HOSTILE = ["..", ".", "../..", "a/../../b", "/etc/passwd", "/", "//", "a//b", "a/", "a", "a/b", ".hidden", "a/.b",
           "n\0l", "%2E%2E", "%", "%/", "x" * 900, "x" * 199 + "..", "x" * 200 + "..", "x" * 200 + "." * 300,
           "日" * 500, "y" * 199 + "%", "a\nb", "a\rb", 'a"b', "a,b", "000000001.png", "000000001.png/c", "list.csv",
           "list.csv/c", "train", "__MACOSX", "a/__MACOSX", "-rf", "C:\\x", "~", "\u202eabc", "\x7f", "a/" * 40 + "b"]


def export(*args):
    call(data_tools.export.main, *args)


def export_fails(capsys, *args):
    """The one line of an export, `PACK OUT …`, that must fail and leave nothing beside OUT."""
    return refused(capsys, data_tools.export.main, *args, folder=Path(args[1]).parent)


def same(path, other):
    """Whether two packs, or folders of packs, hold the same but for the order."""
    packs, others = open_splits(path), open_splits(other)
    return packs.keys() == others.keys() and all(
        records(packs[split]) == records(others[split]) and packs[split].classes_digest == others[split].classes_digest
        for split in packs)


def from_tars(folder):
    """{split: sorted (bytes, label, class name)} of what an export wrote, and {shard: members}."""
    names = (folder / "classes.txt").read_bytes().decode().split("\n")[:-1]
    found, shards = {}, {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert all((member.mtime, member.uid, member.mode) == (0, 0, 0o644) for member in members)
            samples = itertools.groupby(members, key=lambda member: member.name.split(".")[0])
            shards[path.name] = []
            for key, sample in samples:
                image, label, *more = sample
                assert label.name == key + ".cls"
                number = int(tar.extractfile(label).read())
                found.setdefault(path.name.split("-")[0], []).append(
                    (tar.extractfile(image).read(), number, names[number]))
                shards[path.name].append(image.name)
                assert [member.name for member in more] == [key + ".json"] * (names[number] != str(number))
    return {split: sorted(of_split) for split, of_split in found.items()}, shards


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    write_tree(folder / "src", CLASSES)
    run_pack(folder / "src", folder / "pack", "--shard-mb", 1e-3)
    return folder / "pack"


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """A folder of packs; test lacks some classes of train."""
    folder = tmp_path_factory.mktemp("split")
    write_tree(folder / "src" / "train", CLASSES)
    write_tree(folder / "src" / "test", {"b": 2, "a/x": 1}, first=100)
    run_pack(folder / "src", folder / "packs")
    return folder / "packs"


@pytest.mark.parametrize("source", ["plain", "split"])
@pytest.mark.parametrize("way", [".", "list.csv"])
def test_a_folder_packs_to_the_same(source, way, tmp_path, request, capsys):
    source = request.getfixturevalue(source)
    export(source, tmp_path / "out", "--to", "folder")
    run_pack(tmp_path / "out" / way, tmp_path / "again", "--max-skipped", 0)
    assert same(source, tmp_path / "again")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("shard_mb", [1e-6, 8e-3, 1])
def test_tars_hold_the_same(plain, split, tmp_path, shard_mb):
    for name, source in ("p", plain), ("s", split):
        export(source, tmp_path / name, "--to", "webdataset", "--shard-mb", shard_mb)
        found, shards = from_tars(tmp_path / name)
        packs = open_splits(source)
        wanted = {split if name == "s" else "images": records(pack) for split, pack in packs.items()}
        assert found == wanted
        for shard, members in shards.items():
            assert (tmp_path / name / shard).stat().st_size <= shard_mb * 1e6 or len(members) == 1
        assert all(members == sorted(members) for members in shards.values())
        export(source, tmp_path / f"{name}2", "--to", "webdataset", "--shard-mb", shard_mb)
        assert file_hashes(tmp_path / name) == file_hashes(tmp_path / f"{name}2")
    shards = sorted(path.name for path in (tmp_path / "p").glob("*.tar"))
    assert shards == [f"images-{number:06}.tar" for number in range(len(shards))]
    assert len(shards) == (33 if shard_mb == 1e-6 else 1) or shard_mb == 8e-3 and 1 < len(shards) < 33


@pytest.mark.parametrize("names", [["cat", "dog", "Ü/x y"], ["1", "2", "7"], ["0", "1", "2"], ["02", "1", "00"],
                                   ["train/x", "validation/x", "valid/y"]])
@pytest.mark.parametrize("to", ["folder", "webdataset"])
def test_classes_keep_their_names(to, names, tmp_path):
    """Whether they are numbers or not, the labels or others, and with some of the classes."""
    files = write_tree(tmp_path / "src", {f"{i}": 2 + i for i in range(len(names))})
    (tmp_path / "src" / "list.csv").write_text("path,label\n" + "".join(
        f"{path},{names[int(path.split('/')[0])]}\n" for path in files))
    run_pack(tmp_path / "src" / "list.csv", tmp_path / "pack")
    what = "list.csv" if to == "folder" else "."  # folders may have escapes in their names
    export(tmp_path / "pack", tmp_path / "all", "--to", to)
    run_pack(tmp_path / "all" / what, tmp_path / "again", "--max-skipped", 0)
    assert same(tmp_path / "pack", tmp_path / "again")
    export(tmp_path / "pack", tmp_path / "some", "--to", to, "--classes", "1-2")
    run_pack(tmp_path / "some" / what, tmp_path / "few", "--classes", tmp_path / "pack", "--max-skipped", 0)
    whole = records(Pack(tmp_path / "pack"))
    assert records(Pack(tmp_path / "few")) == [record for record in whole if record[1] > 0]


@pytest.mark.parametrize("to", ["folder", "webdataset"])
def test_suffixes_are_those_of_the_contents(tmp_path, to):
    formats = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP", "bmp": "BMP", "gif": "GIF", "tif": "TIFF",
               "ppm": "PPM"}
    images = [(picture(i, format), 0) for i, format in enumerate(formats.values())]
    write_pack(tmp_path / "pack", ["k"], images)
    export(tmp_path / "pack", tmp_path / "out", "--to", to)
    if to == "folder":
        names = sorted(os.listdir(tmp_path / "out" / "k"))
        assert [(tmp_path / "out" / "k" / name).read_bytes() for name in names] == [image for image, _ in images]
    else:
        names = from_tars(tmp_path / "out")[1]["images-000000.tar"]
    assert names == [f"{i:09}.{suffix}" for i, suffix in enumerate(formats)]


def test_some_classes_and_one_split(split, tmp_path, capsys):
    packs = open_splits(split)
    chosen = {1, 3, 4}
    wanted = {name: [record for record in records(of_split) if record[1] in chosen] for name, of_split in packs.items()}
    (tmp_path / "ids").write_text("3\n 4-4")
    for flags, splits in ((), ["test", "train"]), (("--split", "test"), ["test"]):
        out = tmp_path / "-".join(splits)
        export(split, out, "--to", "webdataset", "--classes", f"1,@{tmp_path / 'ids'},1", "--json", *flags)
        assert from_tars(out)[0] == {name: wanted[name] for name in splits}
        facts = json.loads(capsys.readouterr().out)
        assert facts["splits"] == {name: len(wanted[name]) for name in splits}
        assert facts["records"] == sum(facts["splits"].values())
        assert facts["bytes"] == sum(len(image) for name in splits for image, *_ in wanted[name])
        assert facts["classes"] == len({label for name in splits for _, label, _ in wanted[name]})
    export(split, tmp_path / "folder", "--to", "folder", "--classes", "0", "--split", "train")
    run_pack(tmp_path / "folder", tmp_path / "again", "--classes", split)
    assert records(Pack(tmp_path / "again" / "train")) == [one for one in records(packs["train"]) if one[1] == 0]


def test_classes_named_like_splits_stay_classes(tmp_path):
    write_pack(tmp_path / "pack", ["test/b", "train/a", "val"], [(picture(i), i % 3) for i in range(7)])
    export(tmp_path / "pack", tmp_path / "out", "--to", "folder")
    run_pack(tmp_path / "out", tmp_path / "from_tree")
    assert "" not in open_splits(tmp_path / "from_tree") and len(Pack(tmp_path / "from_tree")) == 7
    run_pack(tmp_path / "out" / "list.csv", tmp_path / "again")
    assert same(tmp_path / "pack", tmp_path / "again")


def test_no_class_is_lost_that_a_folder_would_hide(tmp_path):
    names = [".git", "..", "__MACOSX", "a/.b/c", "a/__MACOSX/b", "b/__MACOSX"]
    write_pack(tmp_path / "pack", names, [(picture(i), i % len(names)) for i in range(20)])
    export(tmp_path / "pack", tmp_path / "out", "--to", "folder")
    for way in "out", "out/list.csv":
        run_pack(tmp_path / way, tmp_path / "again", "--max-skipped", 0)
        assert {image for image, *_ in records(Pack(tmp_path / "again"))} == {picture(i) for i in range(20)}
        shutil.rmtree(tmp_path / "again")


@pytest.mark.parametrize("names, shunned", [
    (["train", "bus"], set()), (["train"], {"train"}), (["train", "test", "bus"], {"train", "test"}),
    (["Train/x", "bus"], {"Train/x"}), (["bullet_train", "test-tube"], set()),
    (["train_bus", "bus_test", "car"], {"train_bus", "bus_test"})])
def test_classes_that_look_like_splits_come_back(tmp_path, names, shunned):
    assert taken_for_splits(names) == shunned
    write_pack(tmp_path / "pack", sorted(names), [(picture(i), i % len(names)) for i in range(2 * len(names))])
    export(tmp_path / "pack", tmp_path / "out", "--to", "folder")
    run_pack(tmp_path / "out", tmp_path / "tree", "--max-skipped", 0)
    assert {image for image, *_ in records(Pack(tmp_path / "tree"))} == {picture(i) for i in range(2 * len(names))}
    run_pack(tmp_path / "out" / "list.csv", tmp_path / "again", "--max-skipped", 0)
    assert same(tmp_path / "pack", tmp_path / "again")


def test_folders_of_classes_are_safe_and_all_different():
    parts = ["/", ".", "%", "a", "ü", "\0", " ", "\n", "000000001.png", "list.csv", "__MACOSX", "train", "x" * 90, "..",
             "日" * 40]
    pick = random.Random(0)
    names = sorted({*HOSTILE, *("".join(pick.choices(parts, k=pick.randint(1, 9))) for _ in range(5000)), "%3", "%7/a"})
    for shunned in set(), {name for name in names if "train" in name}:
        paths = [folder_of(name, label, shunned) for label, name in enumerate(names)]
        assert len(set(paths)) == len(names)
        for label, (path, name) in enumerate(zip(paths, names, strict=True)):
            assert path in (name, f"%{label}")
            for folder in path.split("/"):
                assert folder and folder[0] != "." and len(folder.encode()) < 256
                assert not any(ord(letter) < 32 for letter in folder)
                assert folder not in ("list.csv", "000000001.png", "__MACOSX")
            assert not (shunned and "train" in path)
    for name in "plain", "a/x", "c 10", "ü", "a.b", "5", "train", "100%", "a/%5":
        assert folder_of(name, 3) == name


@pytest.mark.parametrize("to", ["folder", "webdataset"])
def test_hostile_names_stay_inside(tmp_path, to):
    names = sorted(HOSTILE)
    write_pack(tmp_path / "pack", names, [(picture(i), i % len(names)) for i in range(2 * len(names) + 1)])
    inside = tmp_path / "deep" / "deeper"
    inside.mkdir(parents=True)
    export(tmp_path / "pack", inside / "out", "--to", to)
    assert os.listdir(inside) == ["out"] and os.listdir(inside.parent) == ["deeper"]
    if to == "webdataset":
        read = {unname(name) for name in (inside / "out" / "classes.txt").read_bytes().decode().split("\n")[:-1]}
        assert read == set(names) and len(from_tars(inside / "out")[0]["images"]) == 2 * len(names) + 1
        return
    with open(inside / "out" / "list.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, strict=True))
    for row in rows:
        assert os.path.dirname(row["path"]) in (row["label"], f"%{names.index(row['label'])}")
    run_pack(inside / "out" / "list.csv", tmp_path / "again", "--max-skipped", 0)
    assert same(tmp_path / "pack", tmp_path / "again")
    found = [path for path in (inside / "out").rglob("*") if path.is_file()]
    assert len(found) == 2 * len(names) + 2


def unname(line):
    """A class name of a line of classes.txt."""
    return line.replace(r"\\", "\0\0").replace(r"\n", "\n").replace(r"\r", "\r").replace("\0\0", "\\")


@pytest.mark.parametrize("name", ["x" * (MAX_NAME + 1), "%" * (MAX_NAME // 2), "a/" * MAX_FOLDERS + "b", "日" * 67])
def test_names_that_no_folder_can_have(tmp_path, name):
    write_pack(tmp_path / "pack", ["good", name], [(picture(i), i) for i in range(2)])
    export(tmp_path / "pack", tmp_path / "out", "--to", "folder")
    assert (tmp_path / "out" / "%1" / "000000001.png").read_bytes() == picture(1)
    run_pack(tmp_path / "out" / "list.csv", tmp_path / "again", "--classes", tmp_path / "pack", "--max-skipped", 0)
    assert records(Pack(tmp_path / "again")) == records(Pack(tmp_path / "pack"))


def test_a_class_without_a_name_is_no_folder(tmp_path, capsys):
    write_pack(tmp_path / "pack", ["good", ""], [(picture(i), i) for i in range(2)])
    assert "record 1 of class 1: a" in export_fails(capsys, tmp_path / "pack", tmp_path / "out", "--to", "folder")
    export(tmp_path / "pack", tmp_path / "out", "--to", "webdataset")
    assert from_tars(tmp_path / "out")[0]["images"] == records(Pack(tmp_path / "pack"))


@pytest.mark.parametrize("args, words", [
    (("none", "out"), "none: not a pack"),
    (("packs", "there"), "there exists"),
    (("packs", "missing/out"), "no such folder, or not writable"),
    (("packs", "packs/out"), "lies inside"),
    (("packs", "out", "--split", "val"), "has train, test"),
    (("packs/train", "out", "--split", "train"), "no splits"),
    (("packs", "out", "--classes", "5-9"), "names 9, but the pack has the classes 0 to 6"),
    (("packs", "out", "--classes", "x"), "neither a class id as 17 nor a range"),
    (("packs", "out", "--classes", "0", "--split", "test"), "no images of these classes"),
    (("packs", "out", "--shard-mb", "0"), "not between"),
    (("packs", "out", "--to", "lmdb"), "invalid choice"),
])
def test_mistakes_are_one_line(split, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(split, "packs")
    Path("there").mkdir()
    assert words in export_fails(capsys, *args, *(() if "--to" in args else ("--to", "folder")))


@pytest.mark.parametrize("to", ["folder", "webdataset"])
def test_damage_is_one_line(tmp_path, capsys, to):
    write_pack(tmp_path / "pack", ["a"], [(picture(0), 0), (b"GIF is no magic", 0)])
    assert "record 1 of class 0: not an image" in export_fails(capsys, tmp_path / "pack", tmp_path / "out", "--to", to)
    write_pack(tmp_path / "pack2", ["a"], [(picture(i), 0) for i in range(5)])
    [shard] = (tmp_path / "pack2").glob("shard-*")
    data = bytearray(shard.read_bytes())
    data[data.index(picture(3)) + 20] ^= 1
    shard.write_bytes(data)
    assert "record 3: wrong checksum" in export_fails(capsys, tmp_path / "pack2", tmp_path / "out", "--to", to)


@pytest.mark.parametrize("to", ["folder", "webdataset"])
def test_memory_does_not_grow_with_the_records(tmp_path, to):
    peaks = []
    for count in 1, 500, 3000:  # the first for what is imported and made once
        write_pack(tmp_path / f"pack{count}", ["a", "b"], [(picture(0), i % 2) for i in range(count)], 10**5)
        tracemalloc.start()
        export(tmp_path / f"pack{count}", tmp_path / f"out{count}", "--to", to)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < peaks[1] + 2500 * 20
