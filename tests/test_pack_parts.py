"""Packing that is interrupted or done by several processes: the same records in the same order, each of them once."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import numpy as np
import pytest

import data_tools.claim
import data_tools.listing
import data_tools.pack
import data_tools.progress
from data_tools.external_sort import Sorter, merged
from data_tools.pack_writer import ShardWriter
from tests.processes import wait_until
from tests.test_faults import small_disk
from tests.test_pack import ROOT, fails, file_hashes, picture, run
from tests.test_sources import write_tar
from xc.pack import PackError, open_splits

KINDS = ["folder", "webdataset", "large"]  # images named by paths, those that come as bytes, and some of those large
LARGE_BYTES = 165  # two of five images have more


def write_source(kind, folder):
    """Two splits and three classes, images of 125 to 201 bytes; 3 of 96 are bad."""
    files = {f"{split}/c{i % 3}/{i}.png":
             b"bad" if i % 40 == 7 else picture(i + 1000 * len(split), size=(6, 3 + i % 5))
             for split, count in (("train", 71), ("test", 25)) for i in range(count)}
    if kind == "folder":
        for name, data in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    else:
        folder.mkdir()
        for split in "train", "test":
            members = [(name.replace("/", "-"), data) for name, data in files.items() if name.startswith(split)]
            write_tar(folder / f"{split}.tar", itertools.chain.from_iterable(
                ((name, data), (name.replace("png", "cls"), name.split("-")[1].encode())) for name, data in members))
    return folder


# Shards of three images, runs of few.
FLAGS = ["--shard-mb", 5e-4, "--max-skipped", 3, "--memory-mb", 0.002, "--workers", 0]


def start(*args, seconds=0.0, patience=90):
    """A real process of a pack, whose fsync takes so many seconds."""
    code = (f"import os, runpy, signal, time, data_tools.claim; os.fsync = lambda fd: time.sleep({seconds}); "
            f"data_tools.claim.LIFE_SECONDS = 0.1; data_tools.claim.PATIENCE_SECONDS = {patience}; "
            f"import data_tools.listing; data_tools.listing.LARGE_BYTES = {data_tools.listing.LARGE_BYTES}; "
            "runpy.run_module('data_tools.pack', run_name='__main__', alter_sys=True)")
    return subprocess.Popen([sys.executable, "-c", code, *map(str, (*args, *FLAGS))], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process):
    out, error = process.communicate(timeout=60)
    return process.returncode, out, error


def records(folder):
    """{split: [(image, class name)] in their order}; every record is checked."""
    found = {}
    for split, pack in open_splits(folder).items():
        assert pack.verify() == len(pack)
        images, labels = pack.read(np.arange(len(pack)))
        found[split] = [(image, pack.class_name(label)) for image, label in zip(images, labels, strict=True)]
    return found


@pytest.fixture(scope="module", params=KINDS)
def source(request, tmp_path_factory):
    """(a source, the pack that one process makes of it without interruption)."""
    folder = tmp_path_factory.mktemp("source")
    write_source(request.param, folder / "src")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "large":
            patch.setattr(data_tools.listing, "LARGE_BYTES", LARGE_BYTES)
        run(folder / "src", folder / "pack", *FLAGS)
        assert [len(images) for images in records(folder / "pack").values()] == [69, 24]
        yield folder / "src", folder / "pack"


def kept(out):
    return out.with_name(f".{out.name}.partial-pack")


# Interruptions.


def entries(out):
    """Whole shards in the journals of a pack that is being made."""
    count = 0
    for journal in kept(out).glob("part-*/journal"):
        try:
            count += journal.read_bytes().count(b"\n")
        except FileNotFoundError:  # just then it was done
            pass
    return count


@pytest.mark.parametrize("parts", [1, 3])
def test_a_pack_that_is_killed_again_and_again_is_the_unbroken_one(source, tmp_path, parts):
    """A random one of its processes, while it lists, writes shards or makes the pack of them."""
    src, _ = source
    for i in range(parts):
        run(src, tmp_path / "whole", *FLAGS, "--part", f"{i}/{parts}")
    chance, out, told = random.Random(parts), tmp_path / "pack", ""

    def launch(seconds=0.004):
        return [start(src, out, "--part", f"{i}/{parts}", seconds=seconds) for i in range(parts)]

    moments = [lambda: list(kept(out).glob("listing-part-*")), *[lambda n=n: entries(out) >= n for n in (2, 9, 17)],
               lambda: (kept(out) / "pack").exists()]
    for moment in moments:
        processes = launch()
        wait_until(lambda: moment() or out.exists())  # noqa: B023
        time.sleep(chance.uniform(0, 0.02))
        for process in processes:
            process.kill()
        told += "".join(ended(process)[2] for process in processes)
        assert not out.exists() and kept(out).exists()
        for journal in kept(out).glob("part-*/journal"):
            with open(journal, "ab") as file:
                file.write(chance.choice([b"", b'{"split": "tr']))  # cut in the middle of a line
    results = [ended(process) for process in launch(0)]
    assert [code for code, *_ in results].count(0) >= 1, results
    late = "pack is a pack: " if parts > 1 else "pack exists"  # one that began later
    assert all(code == 0 or late in error for code, _, error in results), results
    assert file_hashes(out) == file_hashes(tmp_path / "whole") and not kept(out).exists()
    assert "going on behind" in told


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_pack_goes_on(source, tmp_path, number):
    src, whole = source
    process = start(src, tmp_path / "pack", seconds=0.01)
    wait_until(lambda: entries(tmp_path / "pack") > 5)
    process.send_signal(number)
    assert ended(process)[0] == 130
    before = {path: path.stat().st_mtime_ns for path in kept(tmp_path / "pack").glob("part-0/*/shard-*.h5")}
    code, _, error = ended(start(src, tmp_path / "pack"))
    assert code == 0 and "going on behind" in error and "listing" not in error
    assert file_hashes(tmp_path / "pack") == file_hashes(whole)
    moved = {path.stat().st_mtime_ns for path in (tmp_path / "pack").glob("*/shard-*.h5")}
    assert sum(time in moved for time in before.values()) >= len(before) - 1 > 3  # they were not written anew


@pytest.mark.parametrize("parts", [1, 3])
def test_a_pack_does_not_show_which_images_were_large(tmp_path, monkeypatch, parts):
    """Nor where it was interrupted."""
    src, write, packs = write_source("webdataset", tmp_path / "src"), ShardWriter.write, []

    def pack(out):
        for i in range(parts):
            run(src, out, *FLAGS, "--part", f"{i}/{parts}")
        packs.append(file_hashes(out))

    for most in 2**16, LARGE_BYTES, 0:
        monkeypatch.setattr(data_tools.listing, "LARGE_BYTES", most)
        pack(tmp_path / f"{most}")
    monkeypatch.setattr(data_tools.listing, "LARGE_BYTES", LARGE_BYTES)
    for stop in 3, 0, 5:
        calls = itertools.count()

        def stopped(writer):
            if next(calls) == stop:  # noqa: B023
                raise KeyboardInterrupt
            return write(writer)

        monkeypatch.setattr(ShardWriter, "write", stopped)
        with pytest.raises(SystemExit):
            pack(tmp_path / "stopped")
    large = (kept(tmp_path / "stopped") / "listing" / data_tools.listing.LARGE_FILE).stat().st_size
    assert LARGE_BYTES * 30 < large < sum(path.stat().st_size for path in src.iterdir()) / 3
    monkeypatch.setattr(ShardWriter, "write", write)
    pack(tmp_path / "stopped")
    assert packs == packs[:1] * 4


def test_a_list_that_lost_bytes_of_images_is_one_line(tmp_path, monkeypatch, capsys):
    src = write_source("webdataset", tmp_path / "src")
    monkeypatch.setattr(data_tools.listing, "LARGE_BYTES", LARGE_BYTES)
    run(src, tmp_path / "pack", *FLAGS, "--part", "0/2")
    os.truncate(kept(tmp_path / "pack") / "listing" / data_tools.listing.LARGE_FILE, 1000)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run(src, tmp_path / "pack", *FLAGS, "--part", "1/2")
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "inside of an image" in error and not (tmp_path / "pack").exists()


@pytest.mark.parametrize("kilobytes", [60, 220])
def test_a_pack_goes_on_when_a_full_disk_has_room_again(source, tmp_path, kilobytes):
    """It was full while images were listed or while shards were written."""
    src, whole = source
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        code, _, error = ended(start(src, disk / "pack"))
        assert code == 2 and error.count("\n") == 1 and "No space left" in error
        assert not (disk / "pack").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert ended(start(src, disk / "pack"))[0] == 0
        assert file_hashes(disk / "pack") == file_hashes(whole) and os.listdir(disk) == ["pack"]


def test_more_skipped_images_can_be_allowed_later(source, tmp_path, capsys):
    src, whole = source
    with pytest.raises(SystemExit):
        run(src, tmp_path / "pack", *FLAGS, "--max-skipped", 2)
    error = capsys.readouterr().err
    assert "3 of 96 images cannot be used" in error and f"{kept(tmp_path / 'pack')} keeps what was done" in error
    run(src, tmp_path / "pack", *FLAGS)
    assert file_hashes(tmp_path / "pack") == file_hashes(whole)


# Parts.


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_number_of_parts_changes_no_record(source, tmp_path, capsys, parts):
    src, whole = source
    expected = records(whole)
    for name, order in ("a", range(parts)), ("b", random.Random(parts).sample(range(parts), parts)):
        for i in order:
            assert not (tmp_path / name).exists()
            run(src, tmp_path / name, *FLAGS, "--part", f"{i}/{parts}")
        assert records(tmp_path / name) == expected
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == 93
        skipped = [sorted((folder / "skipped.tsv").read_text().splitlines()) for folder in (whole, tmp_path / name)]
        assert skipped[0] == skipped[1] and len(skipped[0]) == 4
    assert file_hashes(tmp_path / "a") == file_hashes(tmp_path / "b")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_parts_of_which_some_have_no_image(tmp_path):
    write_source("folder", tmp_path / "src")
    for split in "train", "test":
        for path in sorted((tmp_path / "src" / split).rglob("*.png"))[1:]:
            path.unlink()
    run(tmp_path / "src", tmp_path / "whole", *FLAGS)
    for i in range(6):
        run(tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", f"{i}/6")
    assert records(tmp_path / "pack") == records(tmp_path / "whole")


def test_parts_at_once(source, tmp_path):
    src, whole = source
    results = [ended(process) for process in [start(src, tmp_path / "pack", "--part", f"{i}/4") for i in range(4)]]
    assert [code for code, *_ in results] == [0] * 4, results
    facts = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    [last] = [fact for fact in facts if "classes" in fact]  # one made the pack
    assert last["records"] == 93 and last["skipped"] == 3
    assert records(tmp_path / "pack") == records(whole) and os.listdir(tmp_path) == ["pack"]


def test_all_parts_give_up_where_the_sources_cannot_be_listed(tmp_path):
    write_source("webdataset", tmp_path / "src")
    with open(tmp_path / "src" / "train.tar", "r+b") as file:
        file.truncate(30000)
    for _, _, error in (results := [ended(process) for process in [
            start(tmp_path / "src", tmp_path / "pack", "--part", f"{i}/3") for i in range(3)]]):
        assert error.splitlines()[-1].startswith("data_tools.pack: error: ")
    assert [code for code, *_ in results] == [2] * 3, results
    assert any("cut short" in error for *_, error in results) and os.listdir(tmp_path) == ["src"]


def test_a_part_takes_over_from_one_that_shows_no_life(source, tmp_path, capsys, monkeypatch):
    """Which was killed on another node, so that only its claim tells of it."""
    src, whole = source
    process = start(src, tmp_path / "pack", "--part", "0/2", seconds=1)
    wait_until(lambda: list(kept(tmp_path / "pack").glob("listing.claim")))
    process.kill()
    ended(process)
    monkeypatch.setattr(data_tools.claim, "PATIENCE_SECONDS", 0.3)
    run(src, tmp_path / "pack", *FLAGS, "--part", "1/2")
    assert "part-0 shows no life for 0.3 s" in capsys.readouterr().err
    run(src, tmp_path / "pack", *FLAGS, "--part", "0/2")
    assert records(tmp_path / "pack") == records(whole)


def test_a_part_waits_for_one_that_is_alive(tmp_path, monkeypatch):
    monkeypatch.setattr(data_tools.claim, "LIFE_SECONDS", 0.05)
    monkeypatch.setattr(data_tools.claim, "PATIENCE_SECONDS", 0.5)
    claim, made, workers = tmp_path / "claim", tmp_path / "made", []

    def work(name):
        workers.append(name)
        time.sleep(1.5)  # longer than patience
        made.touch()

    threads = [threading.Thread(target=data_tools.claim.by_one, args=(claim, name, made.exists, partial(work, name)))
               for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(workers) == 1 and os.listdir(tmp_path) == ["made"]


# Whose the folder is.


def test_a_part_is_of_one_process(source, tmp_path, capsys):
    src, _ = source
    process = start(src, tmp_path / "pack", seconds=0.1)
    wait_until(lambda: entries(tmp_path / "pack"))
    for flags in [], ["--restart"]:
        assert f"process {process.pid} on " in fails(capsys, src, tmp_path / "pack", *FLAGS, *flags)
    process.kill()
    ended(process)
    run(src, tmp_path / "pack", *FLAGS)


OTHERS = [("--seed", 1), ("--shard-mb", 1), ("--max-pixels", 10**6), ("--resize", 3), ("--format", "png"),
          ("--quality", 50), ("--split", "val=0.5"), ("--part", "1/3"), ("--root", "."), ("--classes", "names"),
          ("--from", "manifest"), ("--check", "none"), ("--min-images", 2), ("--max-images-per-class", 5),
          ("--duplicates", "drop")]


@pytest.mark.parametrize("flag, value", OTHERS)
def test_another_command_is_refused(tmp_path, capsys, monkeypatch, flag, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names").write_text("c0\n")
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{i}.png,c\n" for i in range(9)))
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    run("list.csv", tmp_path / "pack", "--part", "0/2")
    capsys.readouterr()
    args = (flag, value, *(() if flag == "--part" else ("--part", "1/2")))
    error = fails(capsys, "list.csv", tmp_path / "pack", *args)
    assert f"{kept(tmp_path / 'pack')} was left by another command" in error and "--restart" in error
    assert ("parts 2, now 3" if flag == "--part" else f"{flag} ") in error
    run("list.csv", tmp_path / "pack", "--part", "1/2", "--workers", 1, "--memory-mb", 5, "--max-skipped", 3)
    assert records(tmp_path / "pack")["train"]


def test_a_source_that_changed_is_another(source, tmp_path, capsys):
    src, whole = source
    shutil.copytree(src, tmp_path / "src")
    run(tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "0/2")
    (tmp_path / "src" / "train" / "note.txt" if (src / "train").is_dir() else tmp_path / "src" / "a.tar").touch()
    capsys.readouterr()
    assert "state of SRC" in fails(capsys, tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "1/2")
    assert "remove" in fails(capsys, tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "1/2", "--restart")
    shutil.rmtree(tmp_path / "src")
    shutil.copytree(src, tmp_path / "src")
    run(tmp_path / "src", tmp_path / "pack", *FLAGS, "--restart")
    assert records(tmp_path / "pack") == records(whole)
    assert sorted(os.listdir(tmp_path)) == ["pack", "src"]


@pytest.mark.parametrize("change", [
    lambda src: (src / "train" / "new").mkdir(), lambda src: (src / "new.txt").touch(),
    lambda src: (src / "train" / "c0" / "new.png").write_bytes(picture(9)),
    lambda src: next((src / "test" / "c1").iterdir()).unlink(), lambda src: shutil.rmtree(src / "test")])
def test_a_folder_that_changed_is_another(tmp_path, capsys, change):
    src = write_source("folder", tmp_path / "src")
    run(src, tmp_path / "pack", *FLAGS, "--part", "0/2")
    change(src)
    capsys.readouterr()
    assert "state of SRC" in fails(capsys, src, tmp_path / "pack", *FLAGS, "--part", "1/2")


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_shards_in_any_folder_of_a_split_are_watched(tmp_path, capsys, name):
    for split in "train", name:
        (tmp_path / "src" / split).mkdir(parents=True)
        write_tar(tmp_path / "src" / split / "0.tar", [("a.png", picture(len(split))), ("a.cls", b"x")])
    run(tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "0/2")
    with open(tmp_path / "src" / name / "0.tar", "ab") as file:
        file.write(bytes(10240))
    capsys.readouterr()
    assert "state of SRC" in fails(capsys, tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "1/2")


@pytest.mark.parametrize("part", [[], ["--part", "0/1"], ["--part", "1/2"]])
def test_a_folder_that_appears_is_not_taken_for_the_pack(source, tmp_path, capsys, monkeypatch, part):
    src, whole = source
    out = tmp_path / "pack"
    if part == ["--part", "1/2"]:
        run(src, out, *FLAGS, "--part", "0/2")
    capsys.readouterr()
    with monkeypatch.context() as context:
        write = data_tools.pack.write_part
        context.setattr(data_tools.pack, "write_part", lambda *args: (write(*args), out.mkdir()))
        with pytest.raises(SystemExit) as exit:
            run(src, out, *FLAGS, *part)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "pack has appeared meanwhile" in error and "the same command goes on" in error
    out.rmdir()
    run(src, out, *FLAGS, *part)
    assert records(out) == records(whole)


def test_parts_that_come_late_find_the_pack(source, tmp_path, capsys):
    """As where an array of jobs is submitted again."""
    src, _ = source
    for part in "0/2", "1/2":
        run(src, tmp_path / "pack", *FLAGS, "--part", part)
    hashes = file_hashes(tmp_path / "pack")
    capsys.readouterr()
    error = fails(capsys, src, tmp_path / "pack", *FLAGS, "--part", "0/2")
    assert "if it is that of these parts, all is done" in error and "remove" not in error
    assert file_hashes(tmp_path / "pack") == hashes


def test_images_are_listed_once(source, tmp_path, capsys, monkeypatch):
    src, _ = source
    monkeypatch.setattr(data_tools.progress.Progress, "line_seconds", 0)
    listed = []
    for i in range(2):
        run(src, tmp_path / "pack", *FLAGS, "--part", f"{i}/2")
        listed.append("listing: " in capsys.readouterr().err)
    assert listed == [True, False]


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0"])
def test_a_part_that_cannot_be(tmp_path, capsys, text):
    (tmp_path / "src").mkdir()
    assert "is not like 0/16" in fails(capsys, tmp_path / "src", tmp_path / "pack", f"--part={text}")


def test_no_reader_takes_what_is_not_whole(source, tmp_path):
    src, whole = source
    run(src, tmp_path / "pack", *FLAGS, "--part", "0/2")
    shutil.copytree(whole, kept(tmp_path / "pack") / "pack")  # as just before the end
    with pytest.raises(PackError, match="did not end"):
        open_splits(kept(tmp_path / "pack") / "pack")


# Sorted runs.


@pytest.mark.parametrize("memory", [1, 300, 10**6])
def test_sorted_strings_from_any_of_them_on(tmp_path, memory):
    chance = random.Random(memory)
    items = [chance.randbytes(chance.randrange(6)) for _ in range(300)]
    sorter = Sorter(tmp_path / "runs", memory)
    for item in items:
        sorter.add(item)
    runs = sorter.runs()
    for start in [b"", *chance.sample(items, 20), b"\xff" * 6]:
        assert list(merged(runs, memory, start)) == sorted(item for item in items if item >= start)
    assert all(os.path.exists(path) for path in runs) and list(merged([], 1)) == []
