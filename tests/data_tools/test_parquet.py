"""Parquet: columns of any Arrow type; what is bad is one line; rows take little memory."""

import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import xc.data.pack
from tests.support.commands import ended, pack_fails, peak_kib, run_pack, start
from tests.support.images import by_class, picture, write_tree
from tests.support.packs import contents
from tests.support.sources import skipped_rows, write_parquet
from xc.data.pack import Pack


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
        run_pack(source, tmp_path / name)
        assert contents(Pack(tmp_path / name / "train")) == by_class(files)
    write_parquet(tmp_path / "a.parquet", image=images, label=pa.array(["a", "b" * 5000, "", "", ""], text))
    assert "row 2: label of 5000 bytes, more than 4096" in pack_fails(capsys, tmp_path / "a.parquet", tmp_path / "new")


@pytest.mark.parametrize("columns, words", [
    ({"label": ["a"]}, "no column of the path"),
    ({"path": ["x.png"]}, "no column of the label"),
    ({"path": [1], "label": ["a"]}, "column path is of type int64"),
    ({"path": ["x.png"], "label": [0.5]}, "row 1: label 0.5 is not a whole number"),
    ({"image": ["text"], "label": ["a"]}, "text (No such file"),
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
    assert words in pack_fails(capsys, tmp_path / "a.parquet", tmp_path / "pack")


def test_a_parquet_file_that_is_cut_is_one_line(tmp_path, capsys):
    path = write_parquet(tmp_path / "a.parquet", image=[picture(i) for i in range(20)], label=[1] * 20)
    whole = path.read_bytes()
    for data in (whole[:-9], whole[:100], b"PAR1", whole[:300] + bytes(900) + whole[1200:]):
        path.write_bytes(data)
        assert "a.parquet: not readable as Parquet" in pack_fails(capsys, path, tmp_path / "pack", "--max-skipped", "0")


def test_a_path_that_is_too_long_is_one_line_in_parquet_too(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", path=["x" * 70_000], label=["a"])
    assert "row 1: path of 70000 bytes" in pack_fails(capsys, tmp_path / "a.parquet", tmp_path / "pack")


def parquet_bomb(path, **columns):
    """A file of some kilobytes with rows that repeat one value."""
    table = {name: pa.DictionaryArray.from_arrays(np.zeros(200, np.int32), pa.array([value]))
             for name, value in columns.items()}
    pyarrow.parquet.write_table(pa.table(table), path, compression="zstd", dictionary_pagesize_limit=2**30)
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("kind", [
    "coded", "plain", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("dictionary", "delta", "many"))])
def test_rows_of_parquet_take_little_memory_however_large_they_are(tmp_path, kind):
    """Each kind is 100 images of 4 MB in some kilobytes."""
    path, image = tmp_path / "a.parquet", bytes(2**22)
    images = pa.DictionaryArray.from_arrays(np.zeros(100, np.int32), pa.array([image]))
    if kind in ("plain", "delta"):
        images = pa.array([image] * 100)
    elif kind == "many":
        images = pa.array([bytes([number]) * 2**22 for number in range(100)])
    encoding = {"use_dictionary": kind in ("coded", "dictionary", "many"), "store_schema": kind == "coded",
                "column_encoding": "DELTA_BYTE_ARRAY" if kind == "delta" else None, "write_batch_size": 1}
    pyarrow.parquet.write_table(pa.table({"image": images, "label": pa.array(["a"] * 100)}), path, compression="zstd",
                                dictionary_pagesize_limit=2**30 if kind in ("coded", "dictionary") else 1, **encoding)
    del images
    assert path.stat().st_size < 500_000
    code = ("import sys; from data_tools.sources.base import Reading; from data_tools.sources.parquet import records; "
            "print(sum(len(image) for *_, image in records(sys.argv[1], Reading(), None)) >> 20)")
    peak, [megabytes, *_] = peak_kib(code, path)
    assert megabytes == "400" and peak < 250_000  # of which Python and its libraries take 60,000


def test_a_long_text_in_parquet_is_one_line_before_it_is_copied(tmp_path, capsys):
    parquet_bomb(tmp_path / "a.parquet", image=picture(0), label="n" * 2**25)
    tracemalloc.start()
    try:
        error = pack_fails(capsys, tmp_path / "a.parquet", tmp_path / "pack")
        assert "row 1: label of 33554432 bytes, more than 4096" in error
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_images_that_are_too_large_are_skipped_in_parquet_too(tmp_path, monkeypatch):
    monkeypatch.setattr(xc.data.pack, "MAX_RECORD_BYTES", 4000)
    for kind in "plain", "struct":
        images = [picture(0), bytes(4001), picture(1), bytes(5000)]
        if kind == "struct":
            images = [{"bytes": image, "path": "x"} for image in images]
        source = write_parquet(tmp_path / f"{kind}.parquet", image=images, label=["a", "a", "b", "b"])
        run_pack(source, tmp_path / kind, "--max-skipped", 2)
        assert contents(Pack(tmp_path / kind)) == {picture(0): "a", picture(1): "b"}
        assert [reason for _, reason in skipped_rows(tmp_path / kind)] == [
            f"{size} bytes, more than 4000" for size in (4001, 5000)]


def test_a_row_that_does_not_fit_into_memory_is_one_line(tmp_path):
    parquet_bomb(tmp_path / "a.parquet", image=bytes(2**27), label="a")
    code = ("import re, resource, sys, pyarrow.parquet; from data_tools.pack import main; "
            "size = int(re.search(r'VmSize:\\s*(\\d+)', open('/proc/self/status').read())[1]) * 1024 + 2**27; "
            "resource.setrlimit(resource.RLIMIT_AS, (size, size)); main(sys.argv[1:])")
    code, _, error = ended(start(code, tmp_path / "a.parquet", tmp_path / "pack", "--workers", 0))
    assert code == 2 and error.count("\n") == 1, error
    assert "a.parquet: some of its rows do not fit into memory" in error


def test_other_columns_of_parquet_take_little_memory_too(tmp_path):
    """They are looked at for names of splits. 2,000 rows of one text of 4 MB, in some kilobytes."""
    text = pa.DictionaryArray.from_arrays(np.zeros(2000, np.int32), pa.array(["x" * 2**22]))
    columns = {"image": pa.array([picture(0)] * 2000), "label": pa.array(["a"] * 2000), "note": text}
    for name, stored in ("coded", True), ("plain", False):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pa.table(columns), path, compression="zstd", store_schema=stored,
                                    dictionary_pagesize_limit=2**30)
        assert path.stat().st_size < 500_000
        code = ("import sys; from data_tools.sources.base import Reading; "
                "from data_tools.sources.parquet import records; "
                "print(sum(1 for _ in records(sys.argv[1], Reading(), None)))")
        peak, [rows, *_] = peak_kib(code, path)
        assert rows == "2000" and peak < 250_000
