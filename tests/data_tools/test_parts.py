"""Packing by several processes: the same records in the same order, each of them once."""

import json
import os
import random
import shutil
import signal
import threading
from functools import partial

import pytest

import data_tools.common.progress
import data_tools.packing.job
import data_tools.packing.lease
from tests.support.commands import ended, pack_fails, run_pack
from tests.support.images import picture
from tests.support.pack_jobs import FLAGS, entries, kept, ordered_records, start_pack, write_source
from tests.support.packs import file_hashes
from tests.support.processes import wait_until
from tests.support.sources import write_tar
from xc.data.pack import PackError, open_splits


@pytest.mark.parametrize("source, parts", [
    ("folder", 3), ("webdataset", 2), ("large", 1), pytest.param("large", 5, marks=pytest.mark.long)],
                         indirect=["source"])
def test_the_number_of_parts_changes_no_record(source, tmp_path, capsys, parts):
    src, whole = source
    expected = ordered_records(whole)
    for name, order in ("a", range(parts)), ("b", random.Random(parts).sample(range(parts), parts)):
        for i in order:
            assert not (tmp_path / name).exists()
            run_pack(src, tmp_path / name, *FLAGS, "--part", f"{i}/{parts}")
        assert ordered_records(tmp_path / name) == expected
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
    run_pack(tmp_path / "src", tmp_path / "whole", *FLAGS)
    for i in range(6):
        run_pack(tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", f"{i}/6")
    assert ordered_records(tmp_path / "pack") == ordered_records(tmp_path / "whole")


@pytest.mark.parametrize("source", ["large"], indirect=True)
def test_parts_at_once(source, tmp_path):
    src, whole = source
    results = [ended(process) for process in [start_pack(src, tmp_path / "pack", "--part", f"{i}/4") for i in range(4)]]
    assert [code for code, *_ in results] == [0] * 4, results
    facts = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    [last] = [fact for fact in facts if "classes" in fact]  # one made the pack
    assert last["records"] == 93 and last["skipped"] == 3
    assert ordered_records(tmp_path / "pack") == ordered_records(whole) and os.listdir(tmp_path) == ["pack"]


def test_all_parts_give_up_where_the_sources_cannot_be_listed(tmp_path):
    write_source("webdataset", tmp_path / "src")
    with open(tmp_path / "src" / "train.tar", "r+b") as file:
        file.truncate(30000)
    for _, _, error in (results := [ended(process) for process in [
            start_pack(tmp_path / "src", tmp_path / "pack", "--part", f"{i}/3") for i in range(3)]]):
        assert error.splitlines()[-1].startswith("data_tools.pack: error: ")
    assert [code for code, *_ in results] == [2] * 3, results
    assert any("cut short" in error for *_, error in results) and os.listdir(tmp_path) == ["src"]


@pytest.mark.parametrize("source", ["webdataset"], indirect=True)
def test_a_part_takes_over_from_one_that_shows_no_life(source, tmp_path, capsys, monkeypatch):
    """Which was killed on another node, so that only its claim tells of it."""
    src, whole = source
    process = start_pack(src, tmp_path / "pack", "--part", "0/2", seconds=1)
    wait_until(lambda: list(kept(tmp_path / "pack").glob("listing.claim")))
    process.kill()
    ended(process)
    monkeypatch.setattr(data_tools.packing.lease, "PATIENCE_SECONDS", 0.3)
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", "1/2")
    assert "part-0 gave no sign of life for 0.3 s" in capsys.readouterr().err
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", "0/2")
    assert ordered_records(tmp_path / "pack") == ordered_records(whole)


def test_one_of_several_works_and_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(data_tools.packing.lease, "LIFE_SECONDS", 0.01)
    claim, made, workers, signs = tmp_path / "claim", tmp_path / "made", [], set()

    def work(name):
        workers.append(name)
        wait_until(lambda: signs.add(claim.read_text()) or len(signs) > 7)
        made.touch()

    threads = [threading.Thread(target=data_tools.packing.lease.run_once,
                                args=(claim, name, made.exists, partial(work, name))) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(workers) == 1 and os.listdir(tmp_path) == ["made"]


class Clock:
    """A time that goes on by a minute whenever somebody sleeps, and what happens then."""

    def __init__(self, happens):
        self.minutes, self._happens = 0, happens

    def monotonic(self):
        return 60 * self.minutes

    def sleep(self, seconds):
        self.minutes += 1
        self._happens(self.minutes)


def test_a_part_waits_as_long_as_another_lives(tmp_path, monkeypatch, capsys):
    """Here its last sign of life is in the minute 9; patience is of 90 s."""
    claim, worked = tmp_path / "claim", []
    clock = Clock(lambda minute: minute < 10 and claim.write_text(f"other {minute}"))
    monkeypatch.setattr("data_tools.packing.lease.time", clock)
    claim.write_text("other 0")
    data_tools.packing.lease.run_once(claim, "me", lambda: bool(worked), lambda: worked.append(clock.minutes))
    assert len(worked) == 1 and 9 + 1.5 < worked[0] <= 9 + 3 and not list(tmp_path.iterdir())
    assert capsys.readouterr().err.count("other gave no sign of life for 90 s: taking over") == 1


@pytest.mark.parametrize("source", ["folder"], indirect=True)
def test_two_processes_cannot_make_the_same_part(source, tmp_path, capsys):
    src, _ = source
    process = start_pack(src, tmp_path / "pack", seconds=0.1)
    wait_until(lambda: entries(tmp_path / "pack"))
    process.send_signal(signal.SIGSTOP)
    for flags in [], ["--restart"]:
        assert f"process {process.pid} on " in pack_fails(capsys, src, tmp_path / "pack", *FLAGS, *flags)
    process.kill()
    ended(process)
    run_pack(src, tmp_path / "pack", *FLAGS)


OTHERS = [("--seed", 1), ("--shard-mb", 1), ("--max-pixels", 10**6), ("--resize", 3), ("--format", "png"),
          ("--quality", 50), ("--split", "val=0.5"), ("--part", "1/3"), ("--root", "."), ("--classes", "names"),
          ("--from", "manifest"), ("--check", "none"), ("--min-images", 2), ("--max-images-per-class", 5),
          ("--duplicates", "drop")]


def test_a_part_with_other_flags_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names").write_text("c0\n")
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(f"{i}.png,c\n" for i in range(9)))
    for i in range(9):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
    run_pack("list.csv", tmp_path / "pack", "--part", "0/2")
    for flag, value in OTHERS:
        args = (flag, value, *(() if flag == "--part" else ("--part", "1/2")))
        error = pack_fails(capsys, "list.csv", tmp_path / "pack", *args)
        assert f"{kept(tmp_path / 'pack')} was left by another command" in error and "--restart" in error
        assert ("parts 2, now 3" if flag == "--part" else f"{flag} ") in error
    run_pack("list.csv", tmp_path / "pack", "--part", "1/2", "--workers", 1, "--memory-mb", 5, "--max-skipped", 3)
    assert ordered_records(tmp_path / "pack")["train"]


@pytest.mark.parametrize("source", ["folder", "webdataset"], indirect=True)
def test_a_source_that_changed_is_noticed(source, tmp_path, capsys):
    src, whole = source
    shutil.copytree(src, tmp_path / "src")
    run_pack(tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "0/2")
    (tmp_path / "src" / "train" / "note.txt" if (src / "train").is_dir() else tmp_path / "src" / "a.tar").touch()
    capsys.readouterr()
    assert "state of SRC" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "1/2")
    assert "remove" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "1/2", "--restart")
    shutil.rmtree(tmp_path / "src")
    shutil.copytree(src, tmp_path / "src")
    run_pack(tmp_path / "src", tmp_path / "pack", *FLAGS, "--restart")
    assert ordered_records(tmp_path / "pack") == ordered_records(whole)
    assert sorted(os.listdir(tmp_path)) == ["pack", "src"]


@pytest.mark.parametrize("change", [
    lambda src: (src / "train" / "new").mkdir(), lambda src: (src / "new.txt").touch(),
    lambda src: (src / "train" / "c0" / "new.png").write_bytes(picture(9)),
    lambda src: next((src / "test" / "c1").iterdir()).unlink(), lambda src: shutil.rmtree(src / "test")])
def test_a_folder_that_changed_is_noticed(tmp_path, capsys, change):
    src = write_source("folder", tmp_path / "src")
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", "0/2")
    change(src)
    capsys.readouterr()
    assert "state of SRC" in pack_fails(capsys, src, tmp_path / "pack", *FLAGS, "--part", "1/2")


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_shards_in_any_folder_of_a_split_are_watched(tmp_path, capsys, name):
    for split in "train", name:
        (tmp_path / "src" / split).mkdir(parents=True)
        write_tar(tmp_path / "src" / split / "0.tar", [("a.png", picture(len(split))), ("a.cls", b"x")])
    run_pack(tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "0/2")
    with open(tmp_path / "src" / name / "0.tar", "ab") as file:
        file.write(bytes(10240))
    assert "state of SRC" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "1/2")


@pytest.mark.parametrize("source, part", [
    ("folder", []), ("webdataset", ["--part", "0/1"]), ("large", ["--part", "1/2"])], indirect=["source"])
def test_a_folder_that_appears_meanwhile_is_not_replaced(source, tmp_path, capsys, monkeypatch, part):
    src, whole = source
    out = tmp_path / "pack"
    if part == ["--part", "1/2"]:
        run_pack(src, out, *FLAGS, "--part", "0/2")
    capsys.readouterr()
    with monkeypatch.context() as context:
        write = data_tools.packing.job.write_part
        context.setattr(data_tools.packing.job, "write_part", lambda *args: (write(*args), out.mkdir()))
        with pytest.raises(SystemExit) as exit:
            run_pack(src, out, *FLAGS, *part)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "pack has appeared meanwhile" in error and "the same command resumes" in error
    out.rmdir()
    run_pack(src, out, *FLAGS, *part)
    assert ordered_records(out) == ordered_records(whole)


@pytest.mark.parametrize("source", ["folder"], indirect=True)
def test_a_late_part_finds_the_pack(source, tmp_path, capsys):
    """As where an array of jobs is submitted again."""
    src, _ = source
    for part in "0/2", "1/2":
        run_pack(src, tmp_path / "pack", *FLAGS, "--part", part)
    hashes = file_hashes(tmp_path / "pack")
    capsys.readouterr()
    error = pack_fails(capsys, src, tmp_path / "pack", *FLAGS, "--part", "0/2")
    assert "if these parts made it, all is done" in error and "remove" not in error
    assert file_hashes(tmp_path / "pack") == hashes


@pytest.mark.parametrize("source", ["large"], indirect=True)
def test_images_are_listed_once(source, tmp_path, capsys, monkeypatch):
    src, _ = source
    monkeypatch.setattr(data_tools.common.progress.Progress, "line_seconds", 0)
    listed = []
    for i in range(2):
        run_pack(src, tmp_path / "pack", *FLAGS, "--part", f"{i}/2")
        listed.append("listing: " in capsys.readouterr().err)
    assert listed == [True, False]


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0"])
def test_a_part_that_cannot_be(tmp_path, capsys, text):
    (tmp_path / "src").mkdir()
    assert "is not like 0/16" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", f"--part={text}")


@pytest.mark.parametrize("source", ["webdataset"], indirect=True)
def test_readers_refuse_an_unfinished_pack(source, tmp_path):
    src, whole = source
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", "0/2")
    shutil.copytree(whole, kept(tmp_path / "pack") / "pack")  # as just before the end
    with pytest.raises(PackError, match="did not end"):
        open_splits(kept(tmp_path / "pack") / "pack")
