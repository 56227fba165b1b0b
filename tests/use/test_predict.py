"""Predictions and features of a trained run: equal to evaluation, at any number of ranks; bad images, bad input. Ranks
are threads."""

import csv
import json
import shutil
import sys
import tarfile
from collections import Counter

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from tests.support.launch import last_json, mpirun, run
from tests.support.training import QUICK
from tests.support.use import call, done
from xc import embed, predict
from xc.data.pack import Pack
from xc.use import trained as trained_module


@pytest.fixture(scope="module")
def trained(tiny_packs, tmp_path_factory):
    """(run folder, top-1, top-5) of a short run on tiny_packs, in one process."""
    out = tmp_path_factory.mktemp("use") / "run"
    flags = [*QUICK, "--lr", 0.003, "--epochs", 1, "--input-norm", "0.3/0.2"]  # pixels are not those of the default
    last = last_json(run(sys.executable, "train.py", "--data", tiny_packs, "--out", out, *flags))
    assert 0 < last["top1"] < last["top5"] <= 1
    return out, last["top1"], last["top5"]


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def shares(rows, pack):
    """(top-1, top-5) of the predictions for the records of a Pack, in order."""
    names = [pack.class_name(label) for label in pack.labels(0, len(pack))]
    ranks = [next((int(row["rank"]) for row in rows[5 * i : 5 * i + 5] if row["class"] == name), 6)
             for i, name in enumerate(names)]
    return np.mean([rank == 1 for rank in ranks]), np.mean([rank <= 5 for rank in ranks])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_predictions_are_those_of_evaluation(ranks, trained, tiny_packs, tmp_path, monkeypatch):
    folder, top1, top5 = trained
    done(monkeypatch, predict, ranks, folder, tiny_packs / "test", "--out", tmp_path / "a.csv", "--batch-size", 4,
         "--images-per-pass", 7)
    rows = csv_rows(tmp_path / "a.csv")
    assert len(rows) == 5 * 30
    assert shares(rows, Pack(tiny_packs / "test")) == pytest.approx((top1, top5))
    done(monkeypatch, predict, 1, folder, tiny_packs / "test", "--out", tmp_path / "all.csv", "--top", 1000)
    all_rows = csv_rows(tmp_path / "all.csv")  # all ten classes: their probabilities are a distribution
    assert len(all_rows) == 10 * 30
    for i in range(30):
        of_image = all_rows[10 * i : 10 * i + 10]
        assert sum(float(row["probability"]) for row in of_image) == pytest.approx(1, abs=1e-6)
        for one, other in zip(rows[5 * i : 5 * i + 5], of_image, strict=False):
            assert one["class"] == other["class"] and one["path"] == other["path"]
            assert float(one["probability"]) == pytest.approx(float(other["probability"]), rel=1e-4)


def test_columns_that_may_hold_splits_do_not_matter(trained, tiny_packs, tmp_path, monkeypatch):
    """Packing must know the splits; here all images are taken."""
    images = sorted((tiny_packs.parent / "tree" / "test").glob("*/*.png"))[:4]
    for image, place in zip(images, (tmp_path / f"{i}.png" for i in range(4)), strict=True):
        shutil.copy(image, place)
    (tmp_path / "list.csv").write_text("path,label,is_train\n" + "".join(f"{i}.png,k,{i % 2}\n" for i in range(4)))
    done(monkeypatch, predict, 1, trained[0], tmp_path / "list.csv", "--out", tmp_path / "out.csv", "--top", 1)
    assert len(csv_rows(tmp_path / "out.csv")) == 4


def test_a_flat_folder_with_bad_images_loses_nothing(trained, tiny_packs, tmp_path, monkeypatch):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((tiny_packs.parent / "tree" / "test").glob("*/*.png"))[:7]):
        shutil.copy(path, flat / f"{i}.png")
    (flat / "3.png").write_bytes((flat / "3.png").read_bytes()[:100])
    (flat / "empty.jpg").touch()
    (flat / "notes.dat").write_text("no image")
    for ranks in 1, 3:
        out = tmp_path / f"{ranks}.jsonl"
        done(monkeypatch, predict, ranks, trained[0], flat, "--out", out, "--top", 2, "--batch-size", 1)
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        counts = Counter(row["path"].removeprefix(f"{flat}/") for row in rows)
        assert counts == {**{f"{i}.png": 2 for i in range(7)}, "3.png": 1, "empty.jpg": 1, "notes.dat": 1}
        bad = [row for row in rows if row["reason"]]
        assert len(bad) == 3 and all(row["rank"] is row["class"] is row["probability"] is None for row in bad)
    done(monkeypatch, embed, 2, trained[0], flat, "--out", tmp_path / "f.npy")
    done(monkeypatch, embed, 1, trained[0], flat, "--out", tmp_path / "f.parquet", "--batch-size", 2)
    array, lines = np.load(tmp_path / "f.npy"), (tmp_path / "f.txt").read_text().splitlines()
    table = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert array.shape == (9, 8) and [line.split("\t")[0] for line in lines] == table["path"]
    for row, line, features, reason in zip(array, lines, table["features"], table["reason"], strict=True):
        assert line.split("\t")[1:] == ([reason] if reason else [])
        assert np.isnan(row).all() and set(features) == {None} if reason else np.allclose(row, features, atol=1e-5)
        assert reason or np.linalg.norm(row) == pytest.approx(1, abs=1e-5)


def test_a_damaged_record_of_a_pack_is_a_row(trained, spoiled_packs, tmp_path, monkeypatch):
    done(monkeypatch, predict, 2, trained[0], spoiled_packs / "train", "--out", tmp_path / "a.parquet", "--top", 1)
    table = parquet.read_table(tmp_path / "a.parquet").to_pydict()
    bad = [path for path, reason in zip(table["path"], table["reason"], strict=True) if reason]
    assert len(table["path"]) == 120 and [path.split()[-1] for path in bad] == ["7", "8", "119"]


def test_a_tar_without_labels_and_a_single_image_are_read(trained, tiny_packs, tmp_path, monkeypatch):
    path = next((tiny_packs.parent / "tree" / "test").glob("*/*.png"))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(path, "x.png")
    for src, out in (tmp_path / "a.tar", "tar.csv"), (path, "one.csv"):
        done(monkeypatch, predict, 1, trained[0], src, "--out", tmp_path / out)
    one, other = csv_rows(tmp_path / "tar.csv"), csv_rows(tmp_path / "one.csv")
    assert [(row["class"], row["probability"]) for row in one] == [(row["class"], row["probability"]) for row in other]


def refused(monkeypatch, folder, *arguments, module=predict, ranks=2):
    before = sorted(folder.iterdir())
    texts = {str(error) for error in call(monkeypatch, module, ranks, *arguments)}
    assert len(texts) == 1 and sorted(folder.iterdir()) == before
    (text,) = texts
    assert "\n" not in text and text != "None"
    return text


def test_bad_input_is_one_line_and_nothing_is_written(trained, tiny_packs, tmp_path, monkeypatch):
    src, out = tiny_packs / "test", tmp_path / "new.csv"
    (tmp_path / "there.csv").write_text("mine")
    assert "exists" in refused(monkeypatch, tmp_path, trained[0], src, "--out", tmp_path / "there.csv")
    assert (tmp_path / "there.csv").read_text() == "mine"
    (tmp_path / "f.txt").write_text("mine")
    assert "f.txt exists" in refused(monkeypatch, tmp_path, trained[0], src, "--out", tmp_path / "f.npy", module=embed)
    assert "name a file that ends in" in refused(monkeypatch, tmp_path, trained[0], src, "--out", tmp_path / "a.txt")
    assert "not the folder of a run" in refused(monkeypatch, tmp_path, tmp_path / "no", src, "--out", out)
    assert "no such file" in refused(monkeypatch, tmp_path, trained[0], tmp_path / "no", "--out", out)
    assert "no such checkpoint" in refused(monkeypatch, tmp_path, trained[0], src, "--out", out, "--checkpoint", "x")
    assert "--top" in refused(monkeypatch, tmp_path, trained[0], src, "--out", out, "--top", 0)
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(monkeypatch, tmp_path, trained[0], tmp_path / "empty", "--out", out)
    (tmp_path / "cut.tar").write_bytes(b"\0" * 257 + b"ustar" + b"\1" * 800)
    assert "not a tar file" in refused(monkeypatch, tmp_path, trained[0], tmp_path / "cut.tar", "--out", out)


def test_a_run_without_a_checkpoint_or_with_a_damaged_one_is_refused(trained, tiny_packs, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(trained[0], copy)
    (checkpoint,) = (copy / "checkpoints").iterdir()
    rows = next(checkpoint.glob("rows-*"))
    data = bytearray(rows.read_bytes())
    data[-1] ^= 1
    rows.write_bytes(data)
    flags = copy, tiny_packs / "test", "--out", tmp_path / "a.csv"
    assert "checksum does not match" in refused(monkeypatch, tmp_path, *flags)
    shutil.rmtree(checkpoint)
    assert "has no checkpoint" in refused(monkeypatch, tmp_path, *flags)


def test_a_pack_of_other_classes_is_refused(trained, tiny_packs, tmp_path, monkeypatch):
    shutil.copytree(tiny_packs / "test", tmp_path / "pack")
    with h5py.File(tmp_path / "pack" / "index.h5", "r+") as file:
        file.attrs["classes_digest"] = np.bytes_("0" * 64)
    text = refused(monkeypatch, tmp_path, trained[0], tiny_packs / "test", "--out", tmp_path / "a.csv", "--classes",
                   tmp_path / "pack")
    assert "name the pack of the run by --classes" in text


def test_features_that_are_not_finite_are_rows_with_a_reason(trained, tiny_packs, tmp_path, monkeypatch):
    build = trained_module.backbones.build

    def spoiled(*arguments, **keywords):
        backbone = build(*arguments, **keywords)
        backbone.register_forward_hook(lambda module, inputs, out: torch.cat([out[:1] * torch.nan, out[1:]]))
        return backbone

    monkeypatch.setattr(trained_module.backbones, "build", spoiled)
    done(monkeypatch, predict, 1, trained[0], tiny_packs / "test", "--out", tmp_path / "a.csv", "--batch-size", 15)
    assert [row["reason"] for row in csv_rows(tmp_path / "a.csv")].count("its features are not finite") == 2


@pytest.mark.mpi
def test_real_ranks_predict_what_evaluation_found(trained, tiny_packs, tmp_path):
    folder, top1, top5 = trained
    mpirun(2, "-m", "xc.predict", folder, tiny_packs / "test", "--out", tmp_path / "a.csv")
    assert shares(csv_rows(tmp_path / "a.csv"), Pack(tiny_packs / "test")) == pytest.approx((top1, top5))
    again = mpirun(2, "-m", "xc.predict", folder, tiny_packs / "test", "--out", tmp_path / "a.csv", expect=2)
    assert again.stderr.count("error: ") == 1 and [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_images_of_any_mode_are_taken(trained, tmp_path, monkeypatch):
    for mode in "L", "RGB", "RGBA", "P":
        Image.new(mode, (40, 24)).save(tmp_path / f"{mode}.png")
    out = tmp_path.parent / f"{tmp_path.name}.csv"
    done(monkeypatch, predict, 1, trained[0], tmp_path, "--out", out, "--top", 1)
    assert [row["reason"] for row in csv_rows(out)] == [""] * 4
