"""Splits: every record goes to one of them, unchanged; the shares are right; the same seed gives the same bytes."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import data_tools.split
from data_tools.packing import split as splitting
from tests.support.commands import call, refused
from tests.support.packs import file_hashes, records, write_pack
from xc.data.pack import Pack, open_splits

COUNTS = [1, 0, 2, 3, 1, 10, 57, 130, 1, 4, 2]  # images of each class, some of none


def split(*args):
    call(data_tools.split.main, *args)


def make(folder, counts=COUNTS):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    images = [(f"image {i}".encode(), label) for i, label in enumerate(labels)]
    return write_pack(folder, [f"class {label}" for label in range(len(counts))], images, 300)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make(tmp_path_factory.mktemp("whole") / "pack")


@pytest.mark.parametrize("by, test, val, seed", [
    ("image", 0.1, 0, 7), ("image", 0, 0.25, 0), ("image", 0.3, 0.3, 7), ("image", 0.5, 0.45, 0),
    ("class", 0.1, 0, 0), ("class", 0, 0.25, 7), ("class", 0.3, 0.3, 0), ("class", 0.4, 0.45, 7)])
def test_every_record_goes_to_one_split(whole, tmp_path, by, test, val, seed):
    split(whole, tmp_path / "out", "--test", test, "--val", val, "--by", by, "--seed", seed, "--shard-mb", 2e-4)
    packs = open_splits(tmp_path / "out")  # which checks that they have one class table
    assert packs.keys() == {"train"} | ({"test"} if test else set()) | ({"val"} if val else set())
    assert sorted(record for pack in packs.values() for record in records(pack)) == records(Pack(whole))
    assert all(pack.verify() == len(pack) and pack.classes_digest == Pack(whole).classes_digest
               for pack in packs.values())
    order = Pack(whole).read(np.arange(sum(COUNTS)))[0]
    for pack in packs.values():
        places = [order.index(image) for image in pack.read(np.arange(len(pack)))[0]]
        assert places == sorted(places)
    counts = np.array(COUNTS)
    for name, share in ("test", test), ("val", val):
        if not share:
            continue
        of_split = packs[name].class_counts
        if by == "class":
            assert ((of_split == 0) | (of_split == counts)).all()
            assert np.count_nonzero(of_split) == round(share * np.count_nonzero(counts))
        else:
            assert (of_split < share * counts + 1).all()
            if name == "test" or val < 0.4:  # what train keeps is taken off val first
                plenty = counts > 3
                assert (of_split[plenty] > share * counts[plenty] - 1).all()
    if by == "image":
        assert ((packs["train"].class_counts > 0) == (counts > 0)).all()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.37])
def test_a_long_tail_gets_its_share_of_all_images(share):
    counts = np.random.default_rng(0).zipf(1.5, 3001).clip(0, 500) + 1
    for seed in range(5):
        random = np.random.default_rng(seed)
        of_split = splitting.rounded(counts, share, random)
        assert abs(of_split.sum() - share * counts.sum()) <= 1
        assert (np.abs(of_split - share * counts) < 1).all()
        of_split = splitting.by_image(counts, {"val": share, "test": share}, random)
        for name in of_split:
            able = counts[counts > 1].sum()
            assert of_split[name].sum() <= share * able + 1
            assert of_split[name].sum() > share * able * (0.98 if share < 0.2 else 0.9)
        assert (counts - of_split["val"] - of_split["test"] >= 1).all()


def test_every_image_has_the_same_chance(tmp_path):
    pack = make(tmp_path / "pack", [20, 3])
    first_half = 0
    for seed in range(30):
        left = splitting.by_image(np.array([20, 3]), {"test": 0.5}, np.random.default_rng(seed))
        assert left["test"][0] == 10
        split(pack, tmp_path / f"{seed}", "--test", 0.5, "--seed", seed)
        chosen = {image for image, label, _ in records(Pack(tmp_path / f"{seed}" / "test")) if label == 0}
        images, labels = Pack(pack).read(np.arange(23))
        first_half += sum(image in chosen for image in [i for i, n in zip(images, labels, strict=True) if n == 0][:10])
    assert abs(first_half - 150) < 5 * (30 * 10 / 4) ** 0.5


def test_the_seed_gives_the_bytes(whole, tmp_path):
    for name, seed in ("a", 5), ("b", 5), ("c", 6):
        split(whole, tmp_path / name, "--test", 0.2, "--val", 0.1, "--seed", seed)
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b") != file_hashes(tmp_path / "c")


def test_json_says_what_became_of_it(whole, tmp_path, capsys):
    split(whole, tmp_path / "out", "--test", 0.2, "--json")
    facts = json.loads(capsys.readouterr().out)
    for name, pack in open_splits(tmp_path / "out").items():
        assert facts[name] == {"records": len(pack), "classes": np.count_nonzero(pack.class_counts),
                               "bytes": pack.num_bytes, "shards": pack.num_shards}
    split(whole, tmp_path / "again", "--test", 0.2)
    assert f"again/test: {facts['test']['records']} images of {facts['test']['classes']} classes" in (
        capsys.readouterr().out)


@pytest.mark.parametrize("args, words", [
    (("none", "out", "--test", 0.1), "none: no such folder"),
    (("packs", "out", "--test", 0.1), "packs has splits already; name one of its packs, as packs/train"),
    (("pack", "there", "--test", 0.1), "there exists"),
    (("pack", "pack/out", "--test", 0.1), "lies inside"),
    (("pack", "out"), "their sum must lie between 0 and 1"),
    (("pack", "out", "--test", 0.5, "--val", 0.5), "their sum must lie between 0 and 1"),
    (("pack", "out", "--test", "nan"), "not between"),
    (("pack", "out", "--test", 1e-9), "--test 1e-09 of 211 images of 10 classes comes to no image"),
    (("pack", "out", "--test", 0.01, "--by", "class"), "--test 0.01 of 211 images of 10 classes comes to no class"),
    (("pack", "out", "--test", 0.96, "--by", "class"), "leave none for train"),
])
def test_mistakes_are_one_line(whole, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "pack")
    shutil.copytree(whole, "packs/train")
    Path("there").mkdir()
    assert words in refused(capsys, data_tools.split.main, *args, folder=tmp_path)


def test_counts_that_are_not_those_of_the_records(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "other", [9, 4])
    make(tmp_path / "pack", [4, 9])
    index = (tmp_path / "other" / "index.h5").read_bytes()
    (tmp_path / "pack" / "index.h5").write_bytes(index)
    sizes = [os.path.getsize(tmp_path / name / "shard-00000.h5") for name in ("pack", "other")]
    assert sizes[0] == sizes[1]
    error = refused(capsys, data_tools.split.main, "pack", "out", "--test", 0.3, folder=tmp_path)
    assert "class_counts are not those" in error
