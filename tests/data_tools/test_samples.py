"""Which image and which label of a tar belong together, whatever their names."""

import itertools
import json

import pytest

from tests.support.commands import pack_fails, run_pack
from tests.support.images import picture
from tests.support.packs import contents
from tests.support.sources import skipped_rows, write_tar
from xc.data.pack import Pack, open_splits


def packed(tmp_path, members, *flags):
    """{name of an image: its class} of what is packed of a tar with these members."""
    path = write_tar(tmp_path / "a.tar", members)
    run_pack(path, tmp_path / "pack", *flags)
    names = {data: name for name, data in members if not name.endswith((".cls", ".json", ".txt", ".npy", ".xml"))}
    return {names[image]: label for image, label in contents(Pack(tmp_path / "pack")).items()}


def skipped(tmp_path):
    """{name of a member: reason}."""
    return {path.partition("a.tar: ")[2]: reason for path, reason in skipped_rows(tmp_path / "pack")}


@pytest.mark.parametrize("stem", ["0001", "0002 v2.1", "a.b.c", "dir.with.dots/1.2", "ü.1"])
@pytest.mark.parametrize("label", ["cls", "json"])
@pytest.mark.parametrize("label_first", [False, True])
def test_the_last_dot_ends_the_name(tmp_path, stem, label, label_first):
    members = []
    for number, name in enumerate((stem, f"{stem}0", f"{stem}1.5")):
        value = b"k%d" % number if label == "cls" else json.dumps({"label": f"k{number}"}).encode()
        pair = [(f"{name}.png", picture(number)), (f"{name}.{label}", value)]
        members += pair[::-1] if label_first else pair
    assert packed(tmp_path, members) == {f"{stem}.png": "k0", f"{stem}0.png": "k1", f"{stem}1.5.png": "k2"}
    assert not skipped(tmp_path)


@pytest.mark.parametrize("order", [*itertools.permutations(["0001.input.jpg", "0001.cls",
                                                            "0001.mask.npy"])])
def test_a_single_image_has_the_label_of_its_key(tmp_path, order):
    data = {"0001.input.jpg": picture(1), "0001.cls": b"k", "0001.mask.npy": b"numbers"}
    members = [(name, data[name]) for name in order] + [("0002.png", picture(2)), ("0002.cls", b"k")]
    assert packed(tmp_path, members) == {"0001.input.jpg": "k", "0002.png": "k"} and not skipped(tmp_path)


def test_of_several_images_of_a_sample_those_with_a_label_of_their_own_are_taken(tmp_path):
    members = [("0.cls", b"k"), ("0.input.png", picture(0)), ("0.target.png", picture(1)),
               ("1.png", picture(2)), ("1.cls", b"k"), ("1.seg.png", picture(3)),
               ("2.a.png", picture(4)), ("2.a.cls", b"a"), ("2.b.png", picture(5)), ("2.b.cls", b"b")]
    assert packed(tmp_path, members, "--max-skipped", 4) == {"1.png": "k", "2.a.png": "a", "2.b.png": "b"}
    assert skipped(tmp_path).keys() == {"0.input.png", "0.target.png", "0.cls", "1.seg.png"}


@pytest.mark.parametrize("folder", ["", "s/"])
@pytest.mark.parametrize("names", [["png", "cls"], ["cls", "png"], ["json", "png"]])
def test_a_tar_that_is_not_sorted_is_one_line(tmp_path, capsys, names, folder):
    """The image and the label of a sample are there, but not side by side."""
    data = {"png": picture, "cls": lambda number: b"%d" % number, "json": lambda number: b'{"label": %d}' % number}
    members = [(f"{folder}{number:04}.{suffix}", data[suffix](number)) for suffix in names for number in range(3)]
    error = pack_fails(capsys, write_tar(tmp_path / "a.tar", members), tmp_path / "pack")
    assert "0000 and its label do not stand side by side; sort the tar by name (tar --sort=name)" in error


def test_folders_in_a_tar_are_the_classes(tmp_path):
    members = [("./a/0.png", picture(0)), ("a/0.json", b'{"width": 6}'), ("b/c/1.jpg", picture(1)),
               ("b/c/1.txt", b"x y"), ("b/c/2", picture(2)), ("./3.png", picture(3)), ("LICENSE", b"text"),
               ("__MACOSX/a/._0.png", b"x")]
    assert packed(tmp_path, members, "--max-skipped", 1) == {"./a/0.png": "a", "b/c/1.jpg": "b/c", "b/c/2": "b/c"}
    assert "no label" in skipped(tmp_path)["3.png"]


def test_splits_in_a_tar(tmp_path, capsys):
    members = [(f"{split}/a/{number}.png", picture(number))
               for number, split in enumerate(("Train", "validation", "TEST", "Train"))]
    run_pack(write_tar(tmp_path / "a.tar", members), tmp_path / "packs")
    assert {split: sorted(contents(pack)) for split, pack in open_splits(tmp_path / "packs").items()} == {
        split: sorted(map(picture, numbers)) for split, numbers in (("train", [0, 3]), ("val", [1]), ("test", [2]))}
    for name, words in {"a/train/0.png": "names split train below the folder of a class",
                        "train/0.png": "its folder names a split, and nothing names its class"}.items():
        assert words in pack_fails(capsys, write_tar(tmp_path / "a.tar", [(name, picture(0))]), tmp_path / "pack")
    write_tar(tmp_path / "train-0.tar", [("test/a/0.png", picture(0))])
    (tmp_path / "tars").mkdir()
    (tmp_path / "train-0.tar").rename(tmp_path / "tars" / "train-0.tar")
    assert "split test, but the file is of split train" in pack_fails(capsys, tmp_path / "tars", tmp_path / "pack")


def test_a_text_is_the_label_where_there_is_nothing_else(tmp_path, capsys):
    members = [("0.png", picture(0)), ("0.txt", b"cat\n"), ("1.png", picture(1)), ("1.txt", b"3.0"),
               ("2.png", picture(2)), ("2.txt", b"two\nlines")]
    assert packed(tmp_path, members, "--max-skipped", 1) == {"0.png": "cat", "1.png": "3"}
    assert "the text in .txt gives the class" in capsys.readouterr().err and "2.png" in skipped(tmp_path)
    members = [("0.cls", b"k"), ("0.png", picture(0)), ("0.txt", b"a caption")]
    run_pack(write_tar(tmp_path / "b.tar", members), tmp_path / "other")
    assert contents(Pack(tmp_path / "other")) == {picture(0): "k"}


@pytest.mark.parametrize("members, words", [
    ([("0.png", picture(0)), ("0.cls", b"k"), ("a/1.png", picture(1))], None),
    ([("a/1.png", picture(1)), ("b/0.png", picture(0)), ("b/0.cls", b"k")], "the class of a/1.png is in its folder"),
    ([("a.tar", b"x")], "a.tar: an archive in a tar file; unpack it first")])
def test_labels_and_folders_do_not_mix(tmp_path, capsys, members, words):
    path = write_tar(tmp_path / "a.tar", members)
    if words:
        assert words in pack_fails(capsys, path, tmp_path / "pack")
    else:
        assert packed(tmp_path, members, "--max-skipped", 1) == {"0.png": "k"}
        assert "as other images of the file have" in skipped(tmp_path)["a/1.png"]
