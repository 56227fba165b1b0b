"""Classes that are too small and too large, and splits that are drawn."""

from collections import Counter

import numpy as np
import pytest

from tests.support.commands import pack_fails, run_pack
from tests.support.images import by_class, picture, write_tree
from tests.support.packs import contents, file_hashes
from tests.support.rows import count_records, count_rows, facts, write_rows
from tests.support.sources import make_source
from xc.data.pack import Pack, open_splits


@pytest.mark.parametrize("kind", ["folder", "pack"])
def test_a_share_of_the_images_is_held_out(tmp_path, capsys, kind):
    files = write_tree(tmp_path / "files", {str(i): 1 + i % 3 for i in range(100)})  # classes of one image, too
    source = make_source(kind, tmp_path / "source", files)
    for name, args in {"a": [], "b": ["--memory-mb", 1e-3, "--workers", 2], "c": ["--seed", 1]}.items():
        run_pack(source, tmp_path / name, "--split", "test=0.3", *args)
        packs = open_splits(tmp_path / name)
        train, test = contents(packs["train"]), contents(packs["test"])
        assert not train.keys() & test.keys() and train | test == by_class(files)
        assert 40 < len(test) < 80 and packs["train"].num_classes == 100  # 60 ± 6.5
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")
    assert contents(open_splits(tmp_path / "a")["test"]) != test
    assert " classes have images in test and none in train\n" in capsys.readouterr().err
    assert "has split t" in pack_fails(capsys, tmp_path / "a", tmp_path / "new", "--split", "val=0.5")
    for wrong in ("train=0.1", "test=1", "test=0", "test=nan", "test", "dev=0.1"):
        assert "is not like test=0.01" in pack_fails(capsys, source, tmp_path / "new", "--split", wrong)


COUNTS = {"1": 1, "3": 3, "4": 4, "x/5": 5, "17": 17, "b": 2}


@pytest.mark.parametrize("least, most", [(1, 1), (1, 16), (2, None), (2, 4), (4, 4), (4, 1), (17, 16), (17, None)])
def test_classes_are_dropped_and_cut_to_size(tmp_path, capsys, least, most):
    files = write_tree(tmp_path / "src", COUNTS)
    flags = ["--min-images", least, *(["--max-images-per-class", most] if most else [])]
    run_pack(tmp_path / "src", tmp_path / "pack", *flags)
    said, pack = facts(capsys), Pack(tmp_path / "pack")
    kept = {name: min(count, most or count) for name, count in COUNTS.items() if count >= least}
    assert pack.class_names(0, pack.num_classes) == sorted(kept)
    assert dict(zip(sorted(kept), pack.class_counts, strict=True)) == kept and pack.verify() == sum(kept.values())
    few = sum(count for count in COUNTS.values() if count < least)
    many = len(files) - few - len(pack)
    assert said["left_out"] == {name: count for name, count in (("few", few), ("many", many)) if count}
    args = ["--memory-mb", 1e-3, *(["--workers", 2] if (least, most) == (4, 4) else [])]
    run_pack(tmp_path / "src", tmp_path / "spilled", *flags, *args)
    assert file_hashes(tmp_path / "spilled") == file_hashes(tmp_path / "pack")
    run_pack(tmp_path / "src", tmp_path / "whole")
    images, labels = Pack(tmp_path / "whole").read(np.arange(len(files)))
    names = [Pack(tmp_path / "whole").class_name(label) for label in labels]
    before = [names[:i].count(name) for i, name in enumerate(names)]
    first = [image for image, name, count in zip(images, names, before, strict=True) if count < kept.get(name, 0)]
    assert pack.read(np.arange(len(pack)))[0] == first


def test_another_seed_takes_other_images(tmp_path):
    write_tree(tmp_path / "src", {"a": 100})
    taken = []
    for seed in 0, 1:
        run_pack(tmp_path / "src", tmp_path / str(seed), "--max-images-per-class", 30, "--seed", seed)
        taken.append(set(count_records(tmp_path / str(seed))))
    assert len(taken[0]) == len(taken[1]) == 30 and 0 < len(taken[0] & taken[1]) < 25  # 9 ± 2


def test_images_of_train_count_and_all_splits_follow(tmp_path, capsys):
    train = write_tree(tmp_path / "src" / "train", {"a": 4, "b": 2, "c": 7})
    test = write_tree(tmp_path / "src" / "test", {"a": 9, "b": 8, "c": 3, "new": 2}, first=50)
    run_pack(tmp_path / "src", tmp_path / "pack", "--min-images", 3, "--max-images-per-class", 5)
    assert facts(capsys)["left_out"] == {"few": 2 + 8 + 2, "many": 2}
    packs = open_splits(tmp_path / "pack")
    assert packs["train"].class_names(0, 2) == ["a", "c"] and packs["train"].class_counts.tolist() == [4, 5]
    assert packs["test"].class_counts.tolist() == [9, 3]
    for name, files in ("train", train), ("test", test):
        assert {image for split, _, image in count_records(tmp_path / "pack") if split == name} <= set(files.values())


def test_repeats_do_not_count(tmp_path):
    write_tree(tmp_path / "src", {"a": 3, "b": 3})
    (tmp_path / "src" / "a" / "2.png").write_bytes((tmp_path / "src" / "a" / "1.png").read_bytes())
    run_pack(tmp_path / "src", tmp_path / "pack", "--min-images", 3)
    assert Pack(tmp_path / "pack").class_names(0, 2) == ["a", "b"]
    run_pack(tmp_path / "src", tmp_path / "once", "--min-images", 3, "--duplicates", "drop")
    assert Pack(tmp_path / "once").class_names(0, 1) == ["b"] and Pack(tmp_path / "once").num_classes == 1


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_whole_classes_are_held_out(tmp_path, capsys, kind):
    rows = [("", f"k{label}", f"{label}-{i}.png", picture(10 * label + i))
            for label in range(60) for i in range(1 + label % 4)]
    source, _ = write_rows(tmp_path / "source", rows, kind)
    flags = ["--split", "test=0.3", "--split-by", "class"]
    for name, args in {"a": [], "b": ["--memory-mb", 1e-3, "--workers", 2], "c": ["--seed", 1]}.items():
        run_pack(source, tmp_path / name, *flags, *args)
        found = count_records(tmp_path / name)
        assert Counter({("", *one[1:]): count for one, count in found.items()}) == count_rows(rows)
        packs = open_splits(tmp_path / name)
        train, test = packs["train"].class_counts > 0, packs["test"].class_counts > 0
        assert (train ^ test).all() and len(train) == 60 and 6 < test.sum() < 30  # 18 ± 3.5
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")
    assert (open_splits(tmp_path / "a")["test"].class_counts > 0).tolist() != test.tolist()
    capsys.readouterr()
    run_pack(source, tmp_path / "large", *flags, "--min-images", 3)
    counts = sum(pack.class_counts for pack in open_splits(tmp_path / "large").values())
    assert facts(capsys)["left_out"] == {"few": 15 * 1 + 15 * 2} and sorted(counts) == [3] * 15 + [4] * 15
    assert open_splits(tmp_path / "large")["test"].class_counts.any()


@pytest.mark.parametrize("flags, words", [
    (["--min-images", 0], "not between"), (["--max-images-per-class", 0], "not between"),
    (["--min-images", 12], "no class has that many images; the largest has 11"),
    (["--split-by", "class"], "--split-by class says how --split draws"),
    (["--split", "test=0.000001"], "draws no image"),
    (["--split", "val=0.0001", "--split-by", "class"], "draws no class"),
    (["--duplicates", "remove"], "invalid choice")])
def test_flags_that_make_no_sense(tmp_path, capsys, flags, words):
    write_tree(tmp_path / "src", {"a": 11, "b": 4})
    assert words in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *flags)


def test_a_given_class_table_is_not_changed(tmp_path, capsys):
    write_tree(tmp_path / "src", {"a": 11, "b": 4})
    run_pack(tmp_path / "src", tmp_path / "given")
    capsys.readouterr()
    error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--classes", tmp_path / "given", "--min-images", 5)
    assert "would change the class table" in error
    run_pack(tmp_path / "src", tmp_path / "pack", "--classes", tmp_path / "given", "--max-images-per-class", 5)
    assert Pack(tmp_path / "pack").class_counts.tolist() == [5, 4]


def test_a_split_that_loses_all_its_images(tmp_path, capsys):
    write_tree(tmp_path / "src" / "train", {"a": 4, "b": 2})
    write_tree(tmp_path / "src" / "test", {"b": 3}, first=50)
    error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--min-images", 3).splitlines()[-1]
    assert "no image of test is left" in error


@pytest.mark.parametrize("count", [0, 1, 7])
def test_classes_that_only_a_held_out_split_has_are_counted(tmp_path, capsys, count):
    write_tree(tmp_path / "src" / "train", {"a": 3, **{f"c{i}": 1 for i in range(7)}})
    write_tree(tmp_path / "src" / "test", {"a": 1}, first=90)
    (tmp_path / "list.csv").write_text("path,label,split\n" + "".join(
        f"{path.relative_to(tmp_path)},{path.parent.name},{'test' if path.parent.name in held else 'train'}\n"
        for held in [[f"c{i}" for i in range(count)]] for path in sorted((tmp_path / "src" / "train").rglob("*.png")))
        + "".join(f"{path.relative_to(tmp_path)},a,test\n" for path in (tmp_path / "src" / "test").rglob("*.png")))
    names = tmp_path / "names"
    run_pack(tmp_path / "src" / "train", names)  # a table of all
    capsys.readouterr()
    run_pack(tmp_path / "list.csv", tmp_path / "pack", "--classes", names)
    assert (f"{count} classes have images in test and none in train" in capsys.readouterr().err) == (count > 0)
