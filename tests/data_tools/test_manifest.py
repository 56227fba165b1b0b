"""Manifests as CSV and TSV: paths, labels, splits; a bad one is one line."""

import os
import shutil
import unicodedata

import numpy as np
import pytest

from tests.support.commands import pack_fails, run_pack
from tests.support.images import picture, write_tree
from tests.support.packs import contents
from tests.support.sources import write_parquet
from xc.data.pack import Pack, open_splits


@pytest.mark.parametrize("text", ['path,label\n{0},7\n\n{1},"a, b"\n',
                                  "\ufeffLabel\tPATH\tnote\n7\t{0}\tx\na, b\t{1}\t\n"])
def test_manifest(tmp_path, text):
    files = write_tree(tmp_path / "images", {"p": 1, "q": 1})
    names = list(files)
    (tmp_path / "images" / "list").write_text(text.format(*names), encoding="utf-8")
    shutil.copy(tmp_path / "images" / "list", tmp_path / "list")
    run_pack(tmp_path / "images" / "list", tmp_path / "beside")
    run_pack(tmp_path / "list", tmp_path / "rooted", "--root", tmp_path / "images")
    for name in ("beside", "rooted"):
        assert contents(Pack(tmp_path / name)) == {files[names[0]]: "7", files[names[1]]: "a, b"}


def test_manifest_with_splits(tmp_path):
    names = list(files := write_tree(tmp_path, {"p": 4}))
    rows = [f"{name},{label},{split}" for name, label, split in
            zip(names, "1120", ("test", "train", "train", "train"), strict=True)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label,split", *rows]))
    run_pack(tmp_path / "list.csv", tmp_path / "pack")
    packs = open_splits(tmp_path / "pack")
    assert {name: len(pack) for name, pack in packs.items()} == {"train": 3, "test": 1}
    assert contents(packs["test"]) == {files[names[0]]: "1"} and packs["test"].labels(0, 1)[0] == 1


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
        error = pack_fails(capsys, listed((0, "a"), (1, "b"), (2, "a"), (1, "c"), (0, "a")), tmp_path / "pack",
                      "--memory-mb", memory)
        assert f"path {names[1]!r} has the labels 'b' and 'c' (1 such paths)" in error
    run_pack(listed((0, "a"), (1, "b"), (0, "a"), (2, "c")), tmp_path / "pack")
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
        assert "path 'p/0.png' has the labels 'a' and 'b' (1 such" in pack_fails(capsys, one, tmp_path / "pack")
    one, two = listed("one", ("p/0.png", "a"), ("p/1.png", "b")), listed("two", ("p/1.png", "c"))
    linked = tmp_path / "link" / two.name
    for second in two, linked:
        error = pack_fails(capsys, one, second, tmp_path / "pack")
        assert "path 'p/1.png' has the labels 'b' and 'c' (1 such" in error
    write_tree(tmp_path / "more", {"p": 2}, first=7)  # other files with the same names
    os.rename(two, tmp_path / "more" / two.name)
    run_pack(one, tmp_path / "more" / two.name, tmp_path / "pack")
    assert sorted(contents(Pack(tmp_path / "pack")).values()) == ["a", "b", "c"]


@pytest.mark.parametrize("text, words", [
    ("", "empty; the first line must name the columns"),
    ("photo,label\nx,1\n", "no column of the path; it has the columns 'photo', 'label'; name it by --path-column"),
    ("path,label,path\nx,1,x\n", "column 'path' is there 2 times"),
    ("path,label\n", "no images"),
    ("path,label\nx.png,1\n../x.png,1\n", "line 3: path '../x.png'"),
    ("path,label\na/../../x.png,1\n", "line 2: path"),
    ("path,label\n/x.png,1\n", "line 2: path '/x.png'"),
    ("path,label\n,1\n", "line 2: path ''"),
    ("path,label\nx.png,\n", "line 2: no label"),
    ("path,label\nx.png\n", "line 2: 1 cells"),
    ("path,label,split\nx.png,1,dev\n", "line 2: split 'dev'"),
    ("path,label,split\nx.png,1,test\n", "of split train"),
    ('path,label\n"x.png,1\n', "line 2: not in the format CSV"),
    (b"path,label\n\xff,1\n", "line 2, column 1: byte 0xff is not utf-8; give the encoding"),
    (b"path,label\nx\0.png,1\n", "must stay below"),
    ("path,label\nx.png,1\n".encode("utf-16"), "line 1, column 1: byte 0xff is not utf-8"),
    ("path,label\nx.png,1\n".encode("utf-16-le"), "as --encoding utf-16-le"),
    (b"path,label," + b"x" * 2**20 + b"\nx.png,1,\n", "the first line has more than"),
    (b"path,label\n" + b"x" * 2**21 + b",1\n", "longer than"),
    (b'path,label\n"' + b"x\n" * 2**20 + b'",1\n', "field larger than"),
    (b"path,label\n" + b'"x\n",' * 2**19 + b"1\n", "longer than"),
    (b"path,label\n" + b"x" * 5000 + b",1\n", "line 2: path of 5000 bytes"),
    (b"path,label\n" + b"x" * 70_000 + b",1\n", "line 2: path of 70000 bytes"),
    (b"path,label\nx.png," + b"n" * 5000 + b"\n", "has 5000 bytes, more than 4096"),
    (b'path,label\nx.png,"a"b\n', "line 2: not in the format CSV"),
    (b"label\npath\n", "no column of the path"),
    (b"path,label\nx.png,1,2\n", "line 2: 3 cells"),
    (b"\xff\xd8\xff\xe0" + bytes(9000), "an image; name the folder"),
])
def test_a_bad_manifest_is_one_line(tmp_path, capsys, text, words):
    (tmp_path / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    for folder in tmp_path, tmp_path.parent:
        (folder / "x.png").write_bytes(picture(0))
    assert words in pack_fails(capsys, tmp_path / "list.csv", tmp_path / "pack")


def test_empty_lines_are_no_row(tmp_path):
    (tmp_path / "x.png").write_bytes(picture(0))
    (tmp_path / "list.csv").write_text("path,label\n" + "\n" * 2**21 + "x.png,1\n")
    run_pack(tmp_path / "list.csv", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == {picture(0): "1"}


def test_labels_keep_what_is_odd_about_them(tmp_path):
    labels = ["a\0b", 'say "a"', "a\nb", "\u202eabc", "😀", "é", unicodedata.normalize("NFD", "é"), "n" * 4096, ".."]
    names = list(files := write_tree(tmp_path, {"k": len(labels)}))
    write_parquet(tmp_path / "a.parquet", path=names, label=labels)
    run_pack(tmp_path / "a.parquet", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == dict(zip(files.values(), labels, strict=True))
    assert Pack(tmp_path / "pack").verify() == len(labels)
