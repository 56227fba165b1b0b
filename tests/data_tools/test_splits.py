"""Splits are recognised however they are spelled and whatever carries them, refused where they are not clear, and never
merged nor taken for classes."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

import data_tools.pack
from data_tools.sources.splits import SplitNames, split_in, split_of
from tests.support.commands import pack_fails, refused, run_pack
from tests.support.images import by_class, picture, write_tree
from tests.support.packs import contents
from tests.support.sources import image_record, table, write_parquet, write_rec, write_tar
from xc.data.pack import Pack, open_splits

SPELLINGS = {"train": ["train", "Training", "TRAIN", "train_images", "Train-Set", "trainset", "training data",
                       "train2017", "images_train", "TrainImages", "trn"],
             "val": ["val", "valid", "Validation", "VAL", "valset", "val_images", "validation-256"],
             "test": ["test", "Testing", "TEST", "Test Set", "testset", "test-images"]}
NO_SPLITS = ["dev", "eval", "extra", "trainval", "bullet_train", "test_tube", "contest", "latest", "", "1", "images",
             "train_val", "training_day"]


def test_split_names():
    for split, names in SPELLINGS.items():
        for name in names:
            assert split_of(name) == split, name
    for name in NO_SPLITS:
        assert split_of(name) == "", name
    for name, split in {"imagenet1k-validation-07.tar": "val", "Train-0.tar": "train", "images_TEST_0.parquet": "test",
                        "train-val-0.tar": "train", "my-val-train-0.tar": "", "shard-0.tar": "", "trainval-0.tar": "",
                        "latest.tar": "", "test2.csv": "test"}.items():
        assert split_in(name) == split, name


def test_what_the_user_says_about_splits():
    names = SplitNames({"dev": "val", "test": "train"}, ["extra", "val"])
    found = [names.of(name) for name in ("Dev", "Testing", "EXTRA", "valid", "x")]
    assert found == ["val", "train", "EXTRA", "val", ""]
    assert [split for split in ("val", "train", "EXTRA", "") if names.leaves_out(split)] == ["val", "EXTRA"]
    assert names.unused() == []
    assert SplitNames({"dev": "val"}, ["extra"]).unused() == ["dev", "extra"]


@pytest.mark.parametrize("train, val, test", [("Training", "Validation", "Test"), ("train", "val", "TEST"),
                                              ("TRAIN", "VALID", "testset"), ("images_train", "val2017", "Test Set")])
def test_folders_of_splits_are_found_however_they_are_spelled(tmp_path, capsys, train, val, test):
    names = {"train": train, "val": val, "test": test}
    files = {split: write_tree(tmp_path / "src" / name, {"a": 2, "b": 1}, first=10 * number)
             for number, (split, name) in enumerate(names.items())}
    run_pack(tmp_path / "src", tmp_path / "packs")
    assert {split: contents(pack) for split, pack in open_splits(tmp_path / "packs").items()} == {
        split: by_class(of_split) for split, of_split in files.items()}
    assert f"{train} = train" in capsys.readouterr().err


@pytest.mark.parametrize("folders, words", [
    (["train/a", "test/a", "extra/a"], "'test', 'train' name splits, but 'extra' stands beside"),
    (["train/a", "other/a"], "'train' name splits, but 'other' stands beside"),
    (["val/a", "test/a"], "there is no split train"), (["Testing/a"], "there is no split train"),
    (["val/a", "valid/a", "train/a"], "'val', 'valid' are all split val"),
    (["a/train", "a/test", "b/train", "b/test"], "src/a: 'test', 'train' name splits below the folder of a class"),
    (["photos/train/a", "photos/val/a"], "name splits below the folder of a class"),
    (["train_apple", "test_apple"], "'test_apple', 'train_apple' look like one class in two splits"),
    (["Apple-Train", "apple-val"], "look like one class in two splits"),
    (["train", "test"], "an image without a class")])
def test_folders_whose_splits_are_not_clear_are_one_line(tmp_path, capsys, folders, words):
    write_tree(tmp_path / "src", dict.fromkeys(folders, 2))
    assert words in pack_fails(capsys, tmp_path / "src", tmp_path / "pack")


def test_names_of_files_in_a_class_do_not_merge_splits(tmp_path, capsys):
    for name, count in {"train_0": 1, "train_1": 2, "test_0": 3}.items():
        (tmp_path / "src" / "a").mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / "a" / f"{name}.png").write_bytes(picture(count))
    error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack")
    assert "a/test_0.png and a/train_0.png are named after different splits" in error
    run_pack(tmp_path / "src", tmp_path / "pack", "--rename-split", "test=train")
    assert len(Pack(tmp_path / "pack")) == 3


def test_a_split_can_be_left_out_or_renamed(tmp_path, capsys):
    train = write_tree(tmp_path / "src" / "train", {"a": 2, "b": 2})
    extra = write_tree(tmp_path / "src" / "Extra", {"a": 3}, first=50)
    write_tree(tmp_path / "src" / "val", {".": 2}, first=80)  # images without classes, as ImageNet's
    run_pack(tmp_path / "src", tmp_path / "two", "--without", "extra", "--without", "val")
    assert contents(Pack(tmp_path / "two" / "train")) == by_class(train)
    assert (tmp_path / "two" / "left_out.tsv").read_text().splitlines()[1:] == [
        *(f"Extra/a/{i}.png\tits split is Extra (--without)" for i in range(3)),
        *(f"val/{i}.png\tits split is val (--without)" for i in range(2))]
    assert "left out 5 images of splits" in capsys.readouterr().err
    run_pack(tmp_path / "src", tmp_path / "all", "--rename-split", "extra=train", "--without", "val")
    assert contents(Pack(tmp_path / "all" / "train")) == by_class(train) | by_class(extra)
    for flags in ("--without", "tset"), ("--rename-split", "dev=val"):
        error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--without", "extra", "--without", "val",
                           *flags)
        assert f"no split is called {flags[1].partition('=')[0]}, which --without or --rename-split names" in error
    assert "dev=devel is not like dev=val" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--rename-split",
                                                         "dev=devel")


def shard(path, number):
    """A source with one image in a file."""
    suffix = path.suffix[1:]
    if suffix == "csv":
        path.with_name(f"{number}.png").write_bytes(picture(number))
        path.write_text(f"path,label\n{number}.png,k\n")
    elif suffix == "tar":
        write_tar(path, [("0.png", picture(number)), ("0.cls", b"k")])
    elif suffix == "rec":
        write_rec(path, [image_record(0.0, picture(number))])
    else:
        write_parquet(path, image=[picture(number)], label=["k"])
    return path


@pytest.mark.parametrize("suffix", ["csv", "tar", "rec", "parquet"])
def test_several_sources_belong_to_the_splits_that_they_name(tmp_path, capsys, suffix):
    paths = {name: shard(tmp_path / f"{name}.{suffix}", number)
             for number, name in enumerate(("Train", "validation", "test-0", "first", "second"))}
    run_pack(paths["Train"], paths["validation"], paths["test-0"], tmp_path / "named")
    run_pack(f"train={paths['first']}", f"val={paths['second']}", tmp_path / "given")
    for name, numbers in {"named": (0, 1, 2), "given": (3, 4)}.items():
        packs = open_splits(tmp_path / name)
        assert {split: [*contents(pack)] for split, pack in packs.items()} == {
            split: [picture(number)] for split, number in zip(("train", "val", "test"), numbers, strict=False)}


def fails(capsys, *sources_and_out):
    """The one line of a pack of several sources."""
    return refused(capsys, data_tools.pack.main, *sources_and_out, "--workers", 0, folder=sources_and_out[-1].parent)


def test_sources_whose_splits_are_not_clear_are_one_line(tmp_path, capsys):
    train, test, other = (shard(tmp_path / f"{name}.csv", number) for number, name in enumerate(("train", "test", "x")))
    out = tmp_path / "out"
    assert f"{other}: its name gives no split" in fails(capsys, train, test, other, out)
    assert f"{other}: no split, but other sources have one" in fails(capsys, f"train={train}", other, out)
    assert "'dev' is no split" in fails(capsys, f"dev={train}", f"test={test}", out)
    (tmp_path / "train.csv").write_text("path,label,split\n0.png,k,test\n")
    assert "given as split train, but 0.png is of split test" in fails(capsys, f"train={train}", f"test={test}", out)
    run_pack(f"dev={test}", f"train={other}", out, "--rename-split", "dev=val")
    assert [*open_splits(out)] == ["train", "val"]


def test_a_single_source_has_the_split_that_its_content_says(tmp_path):
    """Its own name says where it comes from, not that there are others."""
    run_pack(shard(tmp_path / "train.csv", 0), tmp_path / "one")
    files = write_tree(tmp_path / "test", {"a": 2})
    run_pack(tmp_path / "test", tmp_path / "two")
    assert len(Pack(tmp_path / "one")) == 1 and contents(Pack(tmp_path / "two")) == by_class(files)


def test_shards_lie_however_deep(tmp_path, capsys):
    (tmp_path / "src" / "data" / "Train" / "0").mkdir(parents=True)
    (tmp_path / "src" / "data" / "0000").mkdir()
    shard(tmp_path / "src" / "data" / "Train" / "0" / "a.parquet", 0)
    shard(tmp_path / "src" / "data" / "0000" / "test-00000-of-00001.parquet", 1)
    (tmp_path / "src" / "README.md").write_text("text")
    (tmp_path / "src" / "dataset_info.json").write_text("{}")
    run_pack(tmp_path / "src", tmp_path / "packs", "--max-skipped", 0)
    packs = open_splits(tmp_path / "packs")
    assert [*contents(packs["train"])] == [picture(0)] and [*contents(packs["test"])] == [picture(1)]
    shard(tmp_path / "src" / "data" / "Train" / "test-1.parquet", 2)
    assert "names the splits test and train" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack")


@pytest.mark.parametrize("name", ["a/x.tar", "x.zip", "a/x.parquet"])
def test_archives_among_images_are_one_line(tmp_path, capsys, name):
    write_tree(tmp_path / "src", {"a": 2, "b": 1})
    (tmp_path / "src" / name).write_bytes(b"x")
    error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--from", "folder")
    assert f"{name}: an archive or a shard in a tree of images" in error
    shard(tmp_path / "src" / "z.tar", 3)
    error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--from", "webdataset")
    assert "stands among files of .tar" in error


@pytest.mark.parametrize("column, values, flags", [
    ("split", ("Train", "TEST", "Validation"), []), ("subset", ("train", "test", "val"), ["--split-column", "Subset"]),
    ("phase", ("train", "dev", "test"), ["--split-column", "phase", "--rename-split", "dev=val"])])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_column_carries_the_splits(tmp_path, capsys, kind, column, values, flags):
    names = list(write_tree(tmp_path, {"k": 6}))
    rows = {"path": names, "label": ["k"] * 6, column: [values[i % 3] for i in range(6)]}
    source = table(tmp_path / f"a.{kind}", rows)
    run_pack(source, tmp_path / "packs", *flags)
    assert {split: len(pack) for split, pack in open_splits(tmp_path / "packs").items()} == dict.fromkeys(
        ("train", "val", "test"), 2)
    if column == "subset":  # says itself what it is, so that it cannot be overlooked
        error = pack_fails(capsys, source, tmp_path / "pack")
        assert "column 'subset' may hold the splits" in error and "--split-column subset" in error
        run_pack(source, tmp_path / "merged", "--split-column", "")
        assert len(Pack(tmp_path / "merged")) == 6
    run_pack(source, tmp_path / "fewer", *flags, "--without", "test")
    assert [*open_splits(tmp_path / "fewer")] == ["train", "val"]


def test_a_column_of_numbers_may_carry_the_splits(tmp_path, capsys):
    names = list(write_tree(tmp_path, {"k": 2}))
    for column in "is_train", "is_training_image", "Test", "fold", "Partition", "train_test":
        source = table(tmp_path / "a.csv", {"path": names, "label": ["k", "k"], column: ["0", "1"]})
        assert f"column {column.lower()!r} may hold the splits" in pack_fails(capsys, source, tmp_path / "pack")
    run_pack(source, tmp_path / "pack", "--split-column", "")
    assert len(Pack(tmp_path / "pack")) == 2


def listed(path, paths, kind):
    """A table of these paths, all of class k, without splits."""
    if kind == "txt":
        path.write_text("".join(f"{name} k\n" for name in paths))
    elif kind == "lst":
        path.write_text("".join(f"{number}\t1\t{name}\n" for number, name in enumerate(paths)))
    else:
        return table(path, {"path": paths, "label": ["k"] * len(paths)})
    return path


PAIRS = {"folders": ("train/a.png", "test/b.png"), "deep": ("a/Train/a.png", "a/validation/b.png"),
         "names": ("a/train_1.png", "a/test_2.png"), "words": ("img_train_1.png", "img_test_1.png")}


@pytest.mark.parametrize("names", PAIRS)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "txt", "lst", "tar", "tar of labels"])
def test_splits_in_paths_are_not_merged(tmp_path, capsys, kind, names):
    paths = PAIRS[names]
    for number, name in enumerate(paths):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    if kind.startswith("tar"):
        members = [("k/" * (kind == "tar") + name, picture(number)) for number, name in enumerate(paths)]
        if kind == "tar of labels":
            members = [one for member in members for one in (member, (member[0][:-4] + ".cls", b"k"))]
        source = write_tar(tmp_path / "list.tar", members)
    else:
        source = listed(tmp_path / f"list.{kind}", paths, kind)
    error = pack_fails(capsys, source, tmp_path / "pack")
    assert "different splits" in error or "names split" in error
    if names != "deep" and not kind.startswith("tar"):
        run_pack(source, tmp_path / "pack", "--rename-split", "test=train")
        assert len(Pack(tmp_path / "pack")) == 2


def test_one_name_of_a_split_in_paths_is_no_split(tmp_path):
    for number, name in enumerate(("train/a.png", "train/test_tube_1.png", "train/bullet_train_1.png", "latest/c.png")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(picture(number))
    paths = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")]
    run_pack(listed(tmp_path / "list.csv", paths, "csv"), tmp_path / "pack")
    assert len(Pack(tmp_path / "pack")) == 4


def test_sources_have_the_splits_of_their_folders(tmp_path, capsys):
    for number, name in enumerate(("train", "Validation")):
        (tmp_path / name).mkdir()
        shard(tmp_path / name / "metadata.csv", number)
    run_pack(tmp_path / "train" / "metadata.csv", tmp_path / "Validation" / "metadata.csv", tmp_path / "packs")
    assert [*open_splits(tmp_path / "packs")] == ["train", "val"]
    for one, other in ("photos", "photos_test"), ("list_train", "list_dev"):
        sources = [shard(tmp_path / f"{name}.csv", number) for number, name in enumerate((one, other))]
        assert "its name gives no split, but that of" in fails(capsys, *sources, tmp_path / "out")


@pytest.mark.parametrize("column, values", [
    ("usage", ["Training", "PublicTest", "PrivateTest"]), ("set", ["train", "dev", "dev"]),
    ("subset", ["train", "test", ""]), ("partition", [0, 1, 1]), ("tag", ["train-a", "test-a", "train-a"]),
    ("is_holdout", ["true", "false", "true"]), ("eval", [0, 1, 0])])
def test_columns_that_may_hold_the_splits_are_named(tmp_path, capsys, column, values):
    names = list(write_tree(tmp_path, {"k": 3}))
    for kind in "csv", "jsonl", "parquet":
        source = table(tmp_path / f"a.{kind}", {"path": names, "label": ["k"] * 3, column: values})
        assert f"column {column!r} may hold the splits" in pack_fails(capsys, source, tmp_path / "pack")
        run_pack(source, tmp_path / f"pack-{kind}", "--split-column", "")
        assert len(Pack(tmp_path / f"pack-{kind}")) == 3


@pytest.mark.parametrize("column, values", [
    ("usage", ["home", "office", "home"]), ("color", ["red", "blue", "red"]), ("test_score", [0.5, 0.25, 1.0]),
    ("vehicle", ["train", "train", "train"]), ("year", [2017, 2018, 2019]), ("note", ["", "", ""])])
def test_other_columns_do_not_matter(tmp_path, column, values):
    names = list(write_tree(tmp_path, {"k": 3}))
    for kind in "csv", "jsonl", "parquet":
        run_pack(table(tmp_path / f"a.{kind}", {"path": names, "label": ["k"] * 3, column: values}), tmp_path / kind)
        assert len(Pack(tmp_path / kind)) == 3


def test_values_of_a_column_of_splits_can_be_renamed(tmp_path):
    names = list(write_tree(tmp_path, {"k": 3}))
    for kind, values in ("csv", [0, 1, 0]), ("jsonl", [False, True, False]), ("parquet", [False, True, False]), (
            "parquet", [0, 1, 0]):
        source = table(tmp_path / f"a.{kind}", {"path": names, "label": ["k"] * 3, "is_test": values})
        out = tmp_path / f"{kind}{values[0]}"
        run_pack(source, out, "--split-column", "is_test", "--rename-split", f"{values[0]}=train", "--rename-split",
                 f"{values[1]}=test")
        assert {split: len(pack) for split, pack in open_splits(out).items()} == {"train": 2, "test": 1}


def test_fields_that_come_later_are_not_overlooked(tmp_path, capsys):
    names = list(write_tree(tmp_path, {"k": 2}))
    for late in "split", "weight", "subset":
        rows = [{"path": names[0], "label": "k"}, {"path": names[1], "label": "k", late: "test"}]
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert f"line 2: field {late!r}, which line 1 lacks" in pack_fails(capsys, tmp_path / "a.jsonl", tmp_path / "p")


def test_contradicting_flags_are_one_line(tmp_path, capsys):
    write_tree(tmp_path / "src", {"a": 1})
    twice = "--rename-split", "x=train", "--rename-split", "X=test"
    assert "says twice what x is" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *twice)
    both = "--rename-split", "x=train", "--without", "x"
    assert "leaves out what --rename-split x=" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *both)


def test_classes_may_be_called_as_files_that_are_no_data(tmp_path):
    files = write_tree(tmp_path / "src", {"license": 1, "Authors": 2, "cat": 1, "notice": 1})
    run_pack(tmp_path / "src", tmp_path / "pack", "--max-skipped", 0)
    assert contents(Pack(tmp_path / "pack")) == by_class(files)
    run_pack(write_tar(tmp_path / "a.tar", list(files.items())), tmp_path / "tar", "--max-skipped", 0)
    assert contents(Pack(tmp_path / "tar")) == by_class(files)


def test_folders_of_splits_may_be_doubled(tmp_path):
    """As archives unpack to training_set/training_set/cat."""
    files = write_tree(tmp_path / "src", {"training_set/training_set/cat": 2, "test_set/test_set/cat": 1})
    run_pack(tmp_path / "src", tmp_path / "packs")
    packs = open_splits(tmp_path / "packs")
    assert {split: len(pack) for split, pack in packs.items()} == {"train": 2, "test": 1} and len(files) == 3
    assert packs["train"].class_names(0, 1) == ["cat"]


def test_parquet_files_with_names_and_with_bare_numbers_do_not_mix(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    info = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    for name, metadata in ("a", {"huggingface": json.dumps(info)}), ("b", {}):
        data = pa.table({"image": [picture(0), picture(1)], "label": pa.array([0, 1], pa.int64())})
        pyarrow.parquet.write_table(data.replace_schema_metadata(metadata), tmp_path / "src" / f"{name}.parquet")
    assert "b.parquet has only numbers" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack")
