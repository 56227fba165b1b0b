"""What is shown of a pack is what is in it."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data_tools.show
from data_tools.reports import plots as pack_pictures
from data_tools.reports.facts import doubling, long_tail, sample, sheet
from tests.support.commands import call, refused, run_pack
from tests.support.images import picture, write_tree
from tests.support.packs import write_pack
from xc.data.pack import Pack


def show(*args):
    call(data_tools.show.main, *args)


@pytest.fixture(scope="module")
def packs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    write_tree(folder / "src" / "train")
    write_tree(folder / "src" / "test", {"b": 2}, first=100)
    run_pack(folder / "src", folder / "packs", "--shard-mb", 1e-3)
    return folder / "packs"


def test_text(packs, capsys):
    show(packs, "--verify")
    text = capsys.readouterr().out
    for words in ("train: 28 images of 5 classes", "1 / 5 / 11 (min / median / max)", "'a/x'", "'src'",
                  "width 6 / 6 / 6, height 5 / 5 / 5", "PNG 100.0%; modes RGB 100.0%", "all 28 checksums",
                  "of the classes with images, 1, has 39.3% of the images; half of them are in 2",
                  "4 to 7            3 ########################################\n",
                  "2 to 3            0\n", "8 to 15            1 ##############\n", "4 classes without images"):
        assert words in text, words


def test_json(packs, capsys):
    show(packs, "--json", "--verify")
    facts = json.loads(capsys.readouterr().out)
    assert facts.keys() == {"train", "test"}
    train = facts["train"]
    assert train["records"] == 28 == train["verified"]
    assert train["images_per_class"] == {"min": 1, "median": 5.0, "max": 11}
    assert train["long_tail"]["classes_by_images"] == [
        {"from": 1, "to": 1, "count": 1, "sum": 1}, {"from": 2, "to": 3, "count": 0, "sum": 0},
        {"from": 4, "to": 7, "count": 3, "sum": 16}, {"from": 8, "to": 15, "count": 1, "sum": 11}]
    assert facts["test"]["long_tail"]["classes_by_images"][0] == {"from": 0, "to": 0, "count": 4, "sum": 0}
    assert train["sample"]["longer_side"] == [{"from": 4, "to": 7, "count": 28, "sum": 28 * 6}]


@pytest.mark.parametrize("size", [1, 7, 1001])
def test_nothing_is_left_out_of_the_bins(size):
    values = np.random.default_rng(size).zipf(1.3, size).clip(0, 10**12) - 1
    bins = doubling(values)
    assert sum(one["count"] for one in bins) == size and sum(one["sum"] for one in bins) == values.sum()
    for one in bins:
        inside = values[(values >= one["from"]) & (values <= one["to"])]
        assert (one["count"], one["sum"]) == (len(inside), inside.sum())
        assert one["to"] in (one["from"], 2 * one["from"] - 1)
    for value in 2**np.arange(0, 40):
        assert doubling(np.array([value - 1, value]))[-1]["from"] == value


@pytest.mark.parametrize("size", [1, 99, 100, 101, 950])
def test_the_share_of_the_frequent_classes(size):
    counts = np.random.default_rng(size).zipf(1.5, size).clip(1, 10**6)
    tail = long_tail(np.concatenate([counts, np.zeros(3, np.int64)]))
    ordered = sorted(counts, reverse=True)
    top = next(n for n in range(1, size + 1) if n >= size / 100)
    assert tail["top_percent_classes"] == top
    assert tail["top_percent_share"] == pytest.approx(sum(ordered[:top]) / sum(ordered))
    half = tail["classes_with_half"]
    assert 2 * sum(ordered[:half]) >= sum(ordered) > 2 * sum(ordered[: half - 1])


def test_the_sample_is_of_all_records(tmp_path, capsys):
    formats = [("PNG", "L"), ("JPEG", "RGB"), ("GIF", "P")]
    images = [(picture(i, *[formats[i % 3][0]], (10 + i, 5), formats[i % 3][1]), 0) for i in range(30)]
    write_pack(tmp_path / "pack", ["k"], images)
    show(tmp_path / "pack", "--json", "--sample", 1000)
    found = json.loads(capsys.readouterr().out)["train"]["sample"]
    assert found["images"] == 30 and found["formats"] == {"PNG": 10, "JPEG": 10, "GIF": 10}
    assert found["modes"]["RGB"] == 10
    assert found["width"] == {"min": 10, "median": 24.5, "max": 39}
    assert found["bytes"]["max"] == max(len(image) for image, _ in images)
    pack = Pack(tmp_path / "pack")
    some = sample(pack, 10)
    assert len(set(some)) == 10 and some[-1] > 15 and (some == sample(pack, 10)).all()
    show(tmp_path / "pack", "--json", "--sample", 7)
    assert json.loads(capsys.readouterr().out)["train"]["sample"]["images"] == 7


def test_sheet_shows_images_and_names(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (70, 3), dtype=np.uint8)
    images = []
    for colour in colours:
        file = io.BytesIO()
        Image.fromarray(np.broadcast_to(colour, (9, 5, 3))).save(file, "PNG")
        images.append(file.getvalue())
    for count in 3, 70:
        names = [f"n\n\0{i}" if i % 3 else "W" * (9990 + i) if i else "" for i in range(count)]
        pack = Pack(write_pack(tmp_path / f"{count}", names, [(image, i) for i, image in enumerate(images[:count])]))
        with Image.open(io.BytesIO(sheet(pack))) as picture:
            pixels = np.asarray(picture)
        height, width = pack_pictures.IMAGE + pack_pictures.TEXT, pack_pictures.IMAGE
        assert pixels.shape == ((1 if count == 3 else 8) * height, 8 * width, 3)
        for place, record in enumerate(sample(pack, 64)):
            row, column = divmod(place, 8)
            tile = pixels[row * height :, column * width :][:height, :width]
            assert (tile[: pack_pictures.IMAGE] == colours[record]).all()
            assert tile[pack_pictures.IMAGE :].any() == bool(names[record])


def test_pictures_are_written(packs, tmp_path):
    show(packs, "--plot", tmp_path / "plot.png", "--sheet", tmp_path / "sheet.png")
    for name in "plot", "sheet":
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.format == "PNG" and len(np.unique(np.asarray(image))) > 50
    one = pack_pictures.rank_frequency({"train": np.array([0, 3])})
    assert one != pack_pictures.rank_frequency({"train": np.array([0, 300])})


@pytest.mark.parametrize("args, words", [
    (("none",), "not a pack"),
    (("packs", "--plot", "a.jpg"), "ends in .png"),
    (("packs", "--plot", "there.png"), "there.png exists"),
    (("packs", "--sheet", "there.png"), "there.png exists"),
    (("packs", "--sheet", "no/a.png"), "there is no folder no"),
    (("packs", "--sample", "0"), "not between"),
    (("broken",), "record 0: not an image"),
])
def test_mistakes_are_one_line(packs, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(packs, "packs")
    write_pack(tmp_path / "broken", ["k"], [(b"none", 0), (b"none", 0)])
    (tmp_path / "there.png").touch()
    assert words in refused(capsys, data_tools.show.main, *args, folder=tmp_path)


def test_a_record_that_does_not_decode_is_named_and_left_out(tmp_path, capsys):
    """Its checksum is right: data_tools.pack --check none looks at no image."""
    write_pack(tmp_path / "pack", ["k"], [(picture(0), 0), (b"none", 0), (picture(1), 0)])
    show(tmp_path / "pack", "--verify", "--sheet", tmp_path / "sheet.png")
    text = capsys.readouterr().out
    assert "another 1 does not decode" in text and "record 1: not an image" in text and "all 3 checksums" in text
    show(tmp_path / "pack", "--json")
    facts = json.loads(capsys.readouterr().out)["train"]["sample"]
    assert facts["images"] == 2 and len(facts["undecodable"]) == 1


@pytest.mark.parametrize("damage", ["cut", "missing", "index", "record", "split"])
def test_damage_found_by_verify_has_exit_code_1(packs, tmp_path, capsys, damage):
    path = Path(shutil.copytree(packs, tmp_path / "packs"))
    shard = path / "train" / "shard-00001.h5"
    if damage == "cut":
        os.truncate(shard, 100)
    elif damage == "missing":
        shard.unlink()
    elif damage == "index":
        (path / "train" / "index.h5").write_bytes(b"no index")
    elif damage == "split":
        (path / "test" / "index.h5").unlink()
    else:
        data = shard.read_bytes()
        place = data.index(b"IDAT") + 9
        shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    for flags in ["--verify"], ["--verify", "--json"]:
        with pytest.raises(SystemExit) as exit:
            show(path, *flags)
        said = capsys.readouterr()
        assert exit.value.code == 1 and said.out == "" and said.err.count("\n") == 1
    for wrong in [tmp_path / "none", "--verify"], [tmp_path, "--verify"], [path, "--verify", "--plot", "a.jpg"]:
        with pytest.raises(SystemExit) as exit:
            show(*wrong)
        assert exit.value.code == 2
