"""Packing that is killed, interrupted or out of space: nothing looks whole, and the same command goes on."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest

import data_tools.pack
import data_tools.packing.catalogue
import data_tools.packing.image_file
import data_tools.packing.workers
from data_tools.packing.catalogue import zeros_file
from data_tools.packing.writer import ShardWriter
from tests.support.commands import ended, pack_fails, run_pack, start_slow
from tests.support.disks import small_disk
from tests.support.images import png, write_tree
from tests.support.launch import ROOT
from tests.support.pack_jobs import FLAGS, LARGE_EXTENT, entries, kept, run_parts, stages, start_pack, write_source
from tests.support.packs import file_hashes
from tests.support.processes import wait_until
from xc.data.pack import Pack, PackError, open_splits


def slow_pack(tmp_path, *args):
    """Start a process that packs slowly, one image per shard; returns it when it is at work."""
    write_tree(tmp_path / "src", {"a": 60})
    return start_slow("data_tools.pack", tmp_path / "src", tmp_path / "pack", "--shard-mb", "1e-6", *args,
                      until=lambda: list(tmp_path.glob(".pack.partial-*/*/shard-00002.h5")))


def alive(process):
    """Whether it runs; who ends without a parent may stay a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def test_a_killed_pack_leaves_nothing_that_looks_whole(tmp_path):
    process = slow_pack(tmp_path, "--workers", "2")
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    process.kill()
    process.wait()
    assert not (tmp_path / "pack").exists()
    [left] = tmp_path.glob(".pack.partial-*")
    for use in (Pack, open_splits):
        with pytest.raises(PackError):
            use(left)
    shutil.copytree(left, tmp_path / "renamed")
    with pytest.raises(PackError, match="index.h5: no such file"):
        Pack(tmp_path / "renamed")
    run_pack(tmp_path / "src", tmp_path / "pack", "--shard-mb", "1e-6")
    assert Pack(tmp_path / "pack").verify() == 60 and not left.exists()
    shutil.copytree(tmp_path / "pack", left / "pack" / "train")  # killed later still
    with pytest.raises(PackError, match="did not end"):
        Pack(left / "pack" / "train")
    wait_until(lambda: not any(map(alive, workers)))  # workers do not outlive their parent


@pytest.mark.parametrize("number, send", [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_an_interrupted_pack_says_what_it_keeps(tmp_path, number, send):
    process = slow_pack(tmp_path, "--workers", "1")
    send(process.pid, number)  # a terminal's Ctrl-C reaches the workers too
    code, _, error = ended(process)
    assert code == 130 and error == (
        f"data_tools.pack: interrupted; {tmp_path}/.pack.partial-pack keeps what was done: the same command resumes "
        "from there\n")
    assert sorted(os.listdir(tmp_path)) == [".pack.partial-pack", "src"]


def test_a_dead_worker_is_one_line(tmp_path, capsys, monkeypatch):
    write_tree(tmp_path / "src")
    monkeypatch.setattr(data_tools.packing.workers, "_start_worker", os.abort)
    assert "a worker died" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--workers", 1)


@pytest.mark.long
@pytest.mark.parametrize("source, parts", [("folder", None), ("webdataset", 3), ("large", 3)], indirect=["source"])
def test_a_pack_killed_again_and_again_equals_an_unbroken_one(source, tmp_path, parts):
    """While it lists, writes shards or makes the pack of them."""
    src, whole = source
    if parts is not None:
        run_parts(parts, src, whole := tmp_path / "whole", *FLAGS)
    chance, out, told = random.Random(parts or 1), tmp_path / "pack", ""

    def launch(seconds, names):
        return [start_pack(src, out, *(["--part", name] if name else []), seconds=seconds) for name in names]

    first, *others, last = [None] * 3 if parts is None else stages(parts)
    for names, moments in (
            ([first], [lambda: list(kept(out).glob("listing-*"))]),
            (others, [lambda n=n: entries(out) >= n for n in (2, 9, 17)]),
            ([last], [lambda: (kept(out) / "pack").exists()])):
        for moment in moments:
            processes = launch(0.05, names)
            wait_until(lambda: moment() or out.exists())  # noqa: B023
            time.sleep(chance.uniform(0, 0.02))
            for process in processes:
                process.kill()
            told += "".join(ended(process)[2] for process in processes)
            assert not out.exists() and kept(out).exists()
            for journal in kept(out).glob("part-*/journal"):
                with open(journal, "ab") as file:
                    file.write(chance.choice([b"", b'{"split": "tr']))  # cut in the middle of a line
        if parts is not None and names != [last]:
            assert [ended(process)[0] for process in launch(0, names)] == [0] * len(names)
    assert ended(*launch(0, [last]))[0] == 0
    assert file_hashes(out) == file_hashes(whole) and not kept(out).exists()
    assert "resuming after" in told


@pytest.mark.parametrize("source, number", [("folder", signal.SIGINT), ("large", signal.SIGTERM)], indirect=["source"])
def test_an_interrupted_pack_resumes(source, tmp_path, number):
    src, whole = source
    process = start_pack(src, tmp_path / "pack", seconds=0.05)
    wait_until(lambda: entries(tmp_path / "pack") > 5)
    process.send_signal(number)
    assert ended(process)[0] == 130
    before = {path: path.stat().st_mtime_ns for path in kept(tmp_path / "pack").glob("part-0/*/shard-*.h5")}
    code, _, error = ended(start_pack(src, tmp_path / "pack"))
    assert code == 0 and "resuming after" in error and "listing" not in error
    assert file_hashes(tmp_path / "pack") == file_hashes(whole)
    moved = {path.stat().st_mtime_ns for path in (tmp_path / "pack").glob("*/shard-*.h5")}
    assert sum(time in moved for time in before.values()) >= len(before) - 1 > 3  # they were not written anew


@pytest.mark.parametrize("parts", [1, 3])
def test_a_pack_does_not_show_where_images_were_kept(tmp_path, monkeypatch, parts):
    """Nor where it was interrupted."""
    src, write, packs = write_source("webdataset", tmp_path / "src"), ShardWriter.write, []
    for most in data_tools.packing.image_file.MOST_EXTENT, LARGE_EXTENT, 0:
        monkeypatch.setattr(data_tools.packing.image_file, "MOST_EXTENT", most)
        run_parts(parts, src, tmp_path / f"{most}", *FLAGS)
        packs.append(file_hashes(tmp_path / f"{most}"))
    calls = itertools.count()

    def stopped(writer):
        if next(calls) in (3, 4, 9):
            raise KeyboardInterrupt
        return write(writer)

    monkeypatch.setattr(ShardWriter, "write", stopped)
    for part in stages(parts):
        with contextlib.suppress(SystemExit):
            run_pack(src, tmp_path / "stopped", *FLAGS, "--part", part)
    monkeypatch.setattr(ShardWriter, "write", write)
    assert next(calls) > 3 and not (tmp_path / "stopped").exists()
    run_parts(parts, src, tmp_path / "stopped", *FLAGS)
    assert [*packs, file_hashes(tmp_path / "stopped")] == packs[:1] * 4


def test_a_list_that_lost_bytes_of_images_is_one_line(tmp_path, monkeypatch, capsys):
    src = write_source("webdataset", tmp_path / "src")
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", "list/2")
    os.truncate(kept(tmp_path / "pack") / "listing" / data_tools.packing.catalogue.IMAGES_FILE, 1000)
    error = pack_fails(capsys, src, tmp_path / "pack", *FLAGS, "--part", "1/2")
    assert "inside an image" in error and not (tmp_path / "pack").exists()


def test_a_list_that_is_damaged_is_one_line(tmp_path, capsys):
    src = write_source("folder", tmp_path / "src")
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", "list/2")
    table = kept(tmp_path / "pack") / "listing" / data_tools.packing.catalogue.TABLE_FILE
    whole = table.read_bytes()
    for damaged in whole[:3000], b"x" * len(whole), whole[:4096] + bytes(len(whole) - 4096):
        table.write_bytes(damaged)
        assert "is damaged" in pack_fails(capsys, src, tmp_path / "pack", *FLAGS, "--part", "1/2")


@pytest.mark.parametrize("source, kilobytes", [
    ("folder", 60), ("large", 220), pytest.param("webdataset", 220, marks=pytest.mark.long),
    pytest.param("large", 60, marks=pytest.mark.long)], indirect=["source"])
def test_a_pack_resumes_when_a_full_disk_has_room_again(source, tmp_path, kilobytes):
    """It was full while images were listed or while shards were written."""
    src, whole = source
    with small_disk(tmp_path / "disk", kilobytes) as disk:
        code, _, error = ended(start_pack(src, disk / "pack"))
        assert code == 2 and error.count("\n") == 1 and "No space left" in error
        assert not (disk / "pack").exists()
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        assert ended(start_pack(src, disk / "pack"))[0] == 0
        assert file_hashes(disk / "pack") == file_hashes(whole) and os.listdir(disk) == ["pack"]


@pytest.mark.parametrize("source", ["webdataset"], indirect=True)
def test_more_skipped_images_can_be_allowed_later(source, tmp_path, capsys):
    src, whole = source
    with pytest.raises(SystemExit):
        run_pack(src, tmp_path / "pack", *FLAGS, "--max-skipped", 2)
    error = capsys.readouterr().err
    assert "3 of 96 images cannot be used" in error and f"{kept(tmp_path / 'pack')} keeps what was done" in error
    run_pack(src, tmp_path / "pack", *FLAGS)
    assert file_hashes(tmp_path / "pack") == file_hashes(whole)


@pytest.mark.long
def test_a_disk_that_fills_up_in_any_phase_is_one_line(tmp_path):
    for i in range(700):
        (tmp_path / "src" / f"{i}").mkdir(parents=True)
        (tmp_path / "src" / f"{i}" / "0.png").write_bytes(png(1, 1, 2, (b"teXt", b"x\0%d" % i + b"n" * 2000)))
    flags = ["--workers", "0", "--memory-mb", "0.02", "--shard-mb", "0.05"]
    run_pack(tmp_path / "src", tmp_path / "unbroken", *flags)
    with small_disk(tmp_path / "disk", 64) as disk:
        refused, kilobytes, before = Counter(), 8, sorted(os.listdir(tmp_path))
        while True:
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)
            done = subprocess.run([sys.executable, "-m", "data_tools.pack", tmp_path / "src", disk / "pack", *flags],
                                  cwd=ROOT, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                break
            *others, error = done.stderr.splitlines()
            assert done.returncode == 2 and "No space left on device" in error, (kilobytes, done.stderr)
            assert all(line.startswith("resuming after ") for line in others)
            kept = os.listdir(disk)  # when all images are listed, and from then on
            assert error.endswith("the same command resumes from there" if kept else "nothing was kept")
            assert kept == [".pack.partial-pack"] or not (kept or refused[True])
            assert sorted(os.listdir(tmp_path)) == before
            refused[bool(kept)] += 1
            kilobytes = kilobytes * 5 // 4
        assert refused[False] > 8 and refused[True] > 1 and os.listdir(disk) == ["pack"]
        assert file_hashes(disk / "pack") == file_hashes(tmp_path / "unbroken")


def test_counts_find_no_space_before_they_are_counted(tmp_path):
    """A page of a file that the disk has no room for would kill the process when it is touched."""
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(OSError, match="No space left"):
            zeros_file(disk / "counts", 10**6)
        assert not zeros_file(disk / "few", 1000).any()

