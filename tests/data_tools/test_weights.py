"""Weights of images: they stay with their image through every command, and a bad one is named."""


import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import data_tools.export
import data_tools.split
from tests.support.commands import pack_fails, run_pack
from tests.support.images import write_tree
from tests.support.packs import file_hashes
from tests.support.sources import write_parquet
from xc.data.pack import Pack, open_splits

CLASSES = {"a": 5, "b": 11, "c 1": 1, "d": 7}
RAW = [0, 1, 0.1, 3.5e-30, 7e30, float(np.finfo(np.float32).max), 1e-46, 12345678.9, 0.5]  # one that is rounded to 0


def weighted(folder, kind, classes=CLASSES, first=0, split=None):
    """A manifest of images with weights, and {bytes: weight}."""
    files = write_tree(folder, classes, first)
    weights = {name: RAW[i % len(RAW)] for i, name in enumerate(files)}
    rows = {"path": list(files), "label": [name.rpartition("/")[0] for name in files], "weight": list(weights.values())}
    if split is not None:
        rows["split"] = [split(i) for i in range(len(files))]
    if kind == "parquet":
        source = write_parquet(folder / "list.parquet", **rows)
    elif kind == "parquet of bytes":
        source = write_parquet(folder / "list.parquet", **{**rows, "path": list(files), "image": list(files.values())})
    else:
        source = folder / "list.csv"
        lines = [rows.keys(), *zip(*rows.values(), strict=True)]
        source.write_text("\n".join(",".join(map(str, line)) for line in lines))
    return source, {files[name]: np.float32(weight) for name, weight in weights.items()}


def weights_of(out):
    found = {}
    for pack in open_splits(out).values():
        images, _ = pack.read(np.arange(len(pack)))
        found |= dict(zip(images, pack.weights(0, len(pack)), strict=True))
        assert pack.verify() == len(pack)
    return found


@pytest.mark.parametrize("kind", ["csv", "parquet", "parquet of bytes"])
def test_weights_stay_with_their_images(tmp_path, kind):
    source, weights = weighted(tmp_path / "src", kind)
    run_pack(source, tmp_path / "pack", "--shard-mb", 1e-3)
    assert Pack(tmp_path / "pack").num_shards > 2 and weights_of(tmp_path / "pack") == weights
    run_pack(source, tmp_path / "spilled", "--shard-mb", 1e-3, "--memory-mb", 1e-3, "--workers", 2)
    assert file_hashes(tmp_path / "spilled") == file_hashes(tmp_path / "pack")


def test_whole_numbers_are_weights(tmp_path):
    files = write_tree(tmp_path, {"a": 3})
    table = {"path": list(files), "label": ["x"] * 3, "weight": pa.array([0, 3, 2**40])}
    run_pack(write_parquet(tmp_path / "a.parquet", **table), tmp_path / "pack")
    assert weights_of(tmp_path / "pack") == dict(zip(files.values(), [0, 3, 2**40], strict=True))


def test_packs_keep_their_weights(tmp_path):
    one, weights = weighted(tmp_path / "one", "csv")
    two, more = weighted(tmp_path / "two", "parquet", {"b": 4, "e": 3}, first=100)
    run_pack(one, tmp_path / "1", "--shard-mb", 1e-3)
    run_pack(two, tmp_path / "2")
    run_pack(tmp_path / "1", tmp_path / "again", "--seed", 4)
    assert weights_of(tmp_path / "again") == weights and Pack(tmp_path / "again").num_shards == 1
    run_pack(tmp_path / "1", tmp_path / "2", tmp_path / "both", "--shard-mb", 5e-4)
    assert weights_of(tmp_path / "both") == weights | more and Pack(tmp_path / "both").num_classes == 5
    (tmp_path / "names").write_text("e\nc 1\n")
    run_pack(tmp_path / "both", tmp_path / "some", "--classes", tmp_path / "names")
    pack = Pack(tmp_path / "some")
    assert pack.class_names(0, 2) == ["c 1", "e"] and pack.class_counts.tolist() == [1, 3]
    assert weights_of(tmp_path / "some").items() < (weights | more).items()
    data_tools.split.main([str(tmp_path / "both"), str(tmp_path / "split"), "--test", "0.3"])
    assert len(open_splits(tmp_path / "split")) == 2 and weights_of(tmp_path / "split") == weights | more
    for name in "both", "split":
        data_tools.export.main([str(tmp_path / name), str(tmp_path / f"{name}.out"), "--to", "folder"])
        run_pack(tmp_path / f"{name}.out" / "list.csv", tmp_path / f"{name}.back")
        assert weights_of(tmp_path / f"{name}.back") == weights | more


def test_splits_have_weights_too(tmp_path):
    source, weights = weighted(tmp_path / "src", "csv", split=lambda i: "test" if i in (3, 9, 14) else "train")
    run_pack(source, tmp_path / "pack", "--max-images-per-class", 4, "--min-images", 3)
    assert [len(pack) for pack in open_splits(tmp_path / "pack").values()] == [12, 3]
    assert weights_of(tmp_path / "pack").items() < weights.items()


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "1e39", "", "x", "1_0", "0x1", "1 2", "٣"])
def test_bad_weights_are_named(tmp_path, capsys, text):
    files = write_tree(tmp_path, {"a": 2})
    first, second = files
    (tmp_path / "list.csv").write_text(f"path,weight,label\n{first},2,a\n{second},{text},a\n")
    error = pack_fails(capsys, tmp_path / "list.csv", tmp_path / "pack")
    assert f"line 3: weight {text!r} is not a number from 0 to 3.403e+38" in error


@pytest.mark.parametrize("values, words", [
    ([1.0, None], "row 2: weight '' is not"), ([1.0, -2.5], "row 2: weight '-2.5'"),
    ([0.0, float("nan")], "row 2: weight 'nan'"), (["1", "2"], "weight a number")])
def test_bad_weights_of_parquet_are_named(tmp_path, capsys, values, words):
    files = write_tree(tmp_path, {"a": 2})
    source = write_parquet(tmp_path / "list.parquet", path=list(files), label=["a", "a"], weight=values)
    assert words in pack_fails(capsys, source, tmp_path / "pack")


def test_all_have_weights_or_none(tmp_path, capsys):
    source, _ = weighted(tmp_path / "src", "csv")
    write_tree(tmp_path / "other", {"a": 2})
    error = pack_fails(capsys, source, tmp_path / "other", tmp_path / "pack")
    assert "24 images have a weight and 2 have none" in error
