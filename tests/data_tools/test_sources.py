"""The same images give the same records whatever they come as."""

import codecs
import os
import shutil
import tracemalloc

import numpy as np
import pytest

from data_tools.packing.class_table import name_hash
from data_tools.packing.select import names_in
from data_tools.sources import detect, recordio
from data_tools.sources.detect import KINDS
from tests.support.commands import pack_fails, peak_kib_of, run_pack
from tests.support.images import by_class, picture, png, write_tree
from tests.support.packs import contents, file_hashes
from tests.support.sources import SOURCES, image_record, make_source, samples, write_parquet, write_rec, write_tar
from xc.data.pack import Pack, open_splits

CLASSES = {"0": 5, "1": 11, "2": 1, "3": 7}  # numbers, since RecordIO has nothing else


@pytest.fixture
def files(tmp_path):
    files = write_tree(tmp_path / "files", CLASSES)
    files["3/magic.png"] = png(2, 2, 6, (b"teXt", b"\0\0\0" + recordio.MAGIC * 9))  # which RecordIO must escape
    return files


@pytest.mark.parametrize("kind", SOURCES)
def test_every_kind_of_source_gives_the_same_records(tmp_path, files, kind):
    source = make_source(kind, tmp_path / "source", files)
    assert detect.kind_of(str(source)) == kind.split()[0]
    for name, args in {"whole": [], "spilled": ["--memory-mb", 1e-3, "--workers", 2], "shards": ["--shard-mb", 1e-3],
                       "named": ["--from", kind.split()[0]], "seed": ["--seed", 1]}.items():
        run_pack(source, tmp_path / name, *args)
        pack = Pack(tmp_path / name)
        assert contents(pack) == by_class(files) and pack.verify() == len(files) and pack.skipped == 0
        assert pack.class_names(0, 4) == ["0", "1", "2", "3"] and os.listdir(tmp_path / name).count("work") == 0
    assert file_hashes(tmp_path / "whole") == file_hashes(tmp_path / "spilled") == file_hashes(tmp_path / "named")
    assert Pack(tmp_path / "whole").read([0, 1, 2, 3, 4])[0] != Pack(tmp_path / "seed").read([0, 1, 2, 3, 4])[0]


def test_packs_are_merged_by_the_names_of_their_classes(tmp_path):
    one, two = write_tree(tmp_path / "one", {"a": 3, "c": 2}), write_tree(tmp_path / "two", {"b": 4, "c": 3}, first=50)
    for name in ("one", "two"):
        run_pack(tmp_path / name, tmp_path / f"{name}.pack")
    write_tar(tmp_path / "three.tar", [("x.png", picture(90)), ("x.cls", b"d")])
    run_pack(tmp_path / "one.pack", tmp_path / "two.pack", tmp_path / "three.tar", tmp_path / "all")
    pack = Pack(tmp_path / "all")
    assert contents(pack) == by_class(one) | by_class(two) | {picture(90): "d"}
    assert pack.class_names(0, 4) == ["a", "b", "c", "d"] and pack.class_counts.tolist() == [3, 4, 5, 1]


def test_trees_are_merged_too(tmp_path):
    one, two = write_tree(tmp_path / "one", {"a": 3}), write_tree(tmp_path / "two", {"a": 4}, first=50)
    run_pack(tmp_path / "one", tmp_path / "two", tmp_path / "all")
    images, labels = Pack(tmp_path / "all").read(np.arange(7))
    assert set(images) == {*one.values(), *two.values()} and set(labels) == {0}


@pytest.mark.parametrize("memory_mb", [1e-3, 1024])
def test_a_list_of_classes_takes_those_only(tmp_path, capsys, files, memory_mb):
    source = make_source("pack", tmp_path / "source", files)
    (tmp_path / "list").write_bytes(b"3\r\n\n0\n17\n0\n" + b"x" * 5000 + b"\n")
    run_pack(source, tmp_path / "pack", "--classes", tmp_path / "list", "--memory-mb", memory_mb)
    pack = Pack(tmp_path / "pack")
    assert contents(pack) == {data: name for data, name in by_class(files).items() if name in "03"}
    assert pack.class_names(0, pack.num_classes) == ["0", "3"] and pack.skipped == 0
    said = capsys.readouterr().err
    assert "left out 12 images of classes that --classes does not name" in said and "have no images" in said
    (tmp_path / "list").write_bytes(codecs.BOM_UTF8 + b"3\n0")
    run_pack(source, tmp_path / "marked", "--classes", tmp_path / "list")
    assert contents(Pack(tmp_path / "marked")) == contents(pack)
    (tmp_path / "list").write_text("17\n")
    capsys.readouterr()
    assert "no images" in pack_fails(capsys, source, tmp_path / "none", "--classes", tmp_path / "list")


def test_a_long_list_of_classes_takes_some_bytes_each(tmp_path):
    (tmp_path / "list").write_text("".join(f"{number % 99_990}\n" for number in range(100_000)))
    tracemalloc.start()
    try:
        hashes = names_in(tmp_path / "list")
        assert tracemalloc.get_traced_memory()[1] < 100_000 * 40
    finally:
        tracemalloc.stop()
    assert hashes.tolist() == sorted({name_hash(b"%d" % number) for number in range(99_990)})


@pytest.mark.parametrize("names", [("train-0.tar", "train-1.tar", "test-0.tar"),
                                   ("train/0.tar", "train/1.tar", "test/x.tar"),
                                   ("a-train-0.tar", "b.train_7.tar", "crops_test.tar"),
                                   ("train-of-the-test-0.tar", "train.tar", "test-train.tar")])
def test_shards_are_of_the_split_they_are_named_after(tmp_path, capsys, names):
    made = [write_tree(tmp_path / str(i), {"0": 2, "1": 1}, first=10 * i) for i in range(3)]
    for name, some in zip(names, made, strict=True):
        (tmp_path / "tars" / name).parent.mkdir(parents=True, exist_ok=True)
        write_tar(tmp_path / "tars" / name, samples(some))
    run_pack(tmp_path / "tars", tmp_path / "packs")
    packs = open_splits(tmp_path / "packs")
    assert contents(packs["train"]) == by_class(made[0]) | by_class(made[1])
    assert contents(packs["test"]) == by_class(made[2])
    run_pack(tmp_path / "packs", tmp_path / "again", "--seed", 9)  # and a pack with splits keeps them
    for split, pack in open_splits(tmp_path / "again").items():
        assert contents(pack) == contents(packs[split])
    write_tar(tmp_path / "tars" / "more.tar", samples(made[0]))
    assert "more.tar: its name gives no split" in pack_fails(capsys, tmp_path / "tars", tmp_path / "new")


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
@pytest.mark.parametrize("kind", ["folder", "shards", "folders of shards", "manifest"])
def test_validation_and_valid_are_names_of_val(tmp_path, kind, name):
    files = {split: write_tree(tmp_path / "src" / split, {"0": 2, "1": 1}, first=10 * i)
             for i, split in enumerate(("train", name))}
    source = tmp_path / "src"
    if kind == "manifest":
        source = tmp_path / "src" / "list.csv"
        source.write_text("path,label,split\n" + "".join(
            f"{split}/{path},{path[0]},{split}\n" for split, some in files.items() for path in some))
    elif kind != "folder":
        source = tmp_path / "tars"
        for split, some in files.items():
            path = source / (f"set-{split}-00.tar" if kind == "shards" else f"{split}/00.tar")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tar(path, samples(some))
    run_pack(source, tmp_path / "packs")
    packs = open_splits(tmp_path / "packs")
    assert packs.keys() == {"train", "val"}
    assert contents(packs["train"]) == by_class(files["train"]) and contents(packs["val"]) == by_class(files[name])


@pytest.mark.parametrize("suffix", ["tar", "rec", "parquet"])
def test_shards_of_several_splits_are_not_merged(tmp_path, capsys, suffix):
    paths = [tmp_path / f"{name}.{suffix}" for name in ("train-0", "train-1", "test-0")]
    for i, path in enumerate(paths):
        if suffix == "tar":
            write_tar(path, samples({"0/a": picture(i)}))
        elif suffix == "rec":
            write_rec(path, [image_record(0.0, picture(i))])
        else:
            write_parquet(path, image=[picture(i)], label=["0"])
    run_pack(*paths, tmp_path / "packs")
    assert f"{paths[2]} = test" in capsys.readouterr().err
    packs = open_splits(tmp_path / "packs")
    assert contents(packs["train"]) == {picture(0): "0", picture(1): "0"}
    assert contents(packs["test"]) == {picture(2): "0"}
    run_pack(*paths[:2], tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == {picture(0): "0", picture(1): "0"}


def test_splits_of_a_tree_are_not_lost_without_a_word(tmp_path, capsys):
    train, test = write_tree(tmp_path / "src" / "train", {"a": 3}), write_tree(tmp_path / "src" / "test", {"a": 2}, 50)
    write_tree(tmp_path / "src" / "__MACOSX" / "train", {"a": 1}, first=90)
    run_pack(tmp_path / "src", tmp_path / "packs")
    packs = open_splits(tmp_path / "packs")
    assert contents(packs["train"]) == by_class(train) and contents(packs["test"]) == by_class(test)
    write_tree(tmp_path / "src" / "more", {"b": 1}, first=80)
    error = pack_fails(capsys, tmp_path / "src", tmp_path / "one")
    assert "'test', 'train' name splits, but 'more' stands beside" in error and "--without more" in error


def test_sources_with_and_without_splits_do_not_mix(tmp_path, capsys):
    write_tree(tmp_path / "one" / "train", {"a": 2})
    write_tree(tmp_path / "two", {"a": 2})
    assert "some images have a split" in pack_fails(capsys, tmp_path / "one", tmp_path / "two", tmp_path / "pack")


@pytest.mark.long
def test_large_images_take_the_memory_of_some_of_them(tmp_path):
    """50 of about 4 MB, 200 MB together."""
    def members():
        for number in range(50):
            yield f"{number}.bmp", picture(number, "BMP", (1000 + 20 * (number % 8), 1200))
            yield f"{number}.cls", str(number % 3).encode()

    write_tar(tmp_path / "a.tar", members())
    few = "--shard-mb", 8
    peaks = [peak_kib_of("data_tools.pack", tmp_path / "a.tar", tmp_path / "a", "--workers", 0, "--memory-mb", 4, *few)]
    (tmp_path / "a.tar").unlink()
    for module, *flags in (("pack", "--workers", 0, "--memory-mb", 4, *few), ("split", "--test", 0.2, *few),
                           ("export", "--to", "webdataset"), ("export", "--to", "folder")):
        peaks.append(peak_kib_of(f"data_tools.{module}", tmp_path / "a", tmp_path / "b", *flags))
        shutil.rmtree(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert max(peaks) < 150_000, peaks  # Python and its libraries take 60,000


def test_a_damaged_pack_is_one_line(tmp_path, capsys, files):
    source = make_source("pack", tmp_path / "source", files)
    with open(source / "shard-00000.h5", "r+b") as file:
        data = file.read()
        file.seek(data.index(b"IDAT") + 9)
        file.write(b"damage")
    assert "wrong checksum" in pack_fails(capsys, source, tmp_path / "pack")


@pytest.mark.parametrize("kind", SOURCES)
def test_another_kind_is_not_read_as_this_one(tmp_path, capsys, files, kind):
    source = make_source(kind, tmp_path / "source", files)
    for other in {name.split()[0] for name in SOURCES} - {kind.split()[0]}:
        if not (source.is_dir() and other == "folder"):  # any folder may hold images
            pack_fails(capsys, source, tmp_path / "pack", "--from", other)
    if source.is_dir() or kind.split()[0] not in ("manifest", "parquet"):
        assert "--root" in pack_fails(capsys, source, tmp_path / "pack", "--root", tmp_path)


def test_a_class_may_have_the_name_of_a_packs_index(tmp_path):
    files = write_tree(tmp_path / "src", {"index.h5": 2, "a/index.h5": 1})
    assert detect.kind_of(str(tmp_path / "src")) == "folder"
    run_pack(tmp_path / "src", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == by_class(files)


def test_a_folder_is_no_manifest_and_a_file_no_folder(tmp_path, capsys):
    write_tree(tmp_path / "src", {"a": 1})
    write_tar(tmp_path / "a.tar", [])
    error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--from", "manifest")
    assert f"{tmp_path / 'src'}: a folder, but --from manifest needs a file" in error
    for kind in "folder", "pack":
        error = pack_fails(capsys, tmp_path / "a.tar", tmp_path / "pack", "--from", kind)
        assert f"{tmp_path / 'a.tar'}: a file, but --from {kind} needs a folder" in error


@pytest.mark.parametrize("name, words", [("a.tar", "cut short or not a tar file"), ("a.csv", "empty"), ("a", "empty"),
                                         ("a.rec", "empty"), ("a.parquet", "empty")])
def test_an_empty_source_is_one_line(tmp_path, capsys, name, words):
    (tmp_path / name).touch()
    assert words in pack_fails(capsys, tmp_path / name, tmp_path / "pack")
    for kind in KINDS:
        pack_fails(capsys, tmp_path / name, tmp_path / "pack", "--from", kind)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_source_that_is_no_file_is_one_line(tmp_path, capsys, make):
    """Opening a pipe would wait for its writer."""
    (tmp_path / "tars").mkdir()
    (tmp_path / "list.csv").write_text("path,label\n")
    for name in "a", "tars/train-0.tar", "a.rec":
        make(tmp_path / name)
        source = tmp_path / name.partition("/")[0]
        assert f"{name}: neither a file nor a folder" in pack_fails(capsys, source, tmp_path / "pack")
    write_rec(tmp_path / "b.rec", [image_record(1.0, picture(0))], index=False)
    make(tmp_path / "b.idx")
    assert "b.idx: neither a file nor a folder" in pack_fails(capsys, tmp_path / "b.rec", tmp_path / "pack")


def test_any_number_of_sources(tmp_path):
    sources = [write_parquet(tmp_path / f"{number:03}-{'n' * 150}.parquet", image=[picture(number)], label=["k"])
               for number in range(450)]  # their names are more than HDF5 takes for an attribute
    run_pack(*sources, tmp_path / "pack")
    assert Pack(tmp_path / "pack").verify() == 450 and Pack(tmp_path / "pack").source.endswith(" and 445 more")
