"""Packing by several processes: the same records in the same order, each of them once."""

import json
import os
import random
import shutil
import signal

import pytest

import data_tools.common.progress
import data_tools.packing.job
from tests.support.commands import ended, pack_fails, run_pack
from tests.support.images import picture, write_tree
from tests.support.pack_jobs import (
    FLAGS,
    entries,
    kept,
    ordered_records,
    run_parts,
    stages,
    start_pack,
    write_source,
)
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
        for stage in "list", *order, "merge":
            assert not (tmp_path / name).exists()
            run_pack(src, tmp_path / name, *FLAGS, "--part", f"{stage}/{parts}")
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
    run_parts(6, tmp_path / "src", tmp_path / "pack", *FLAGS)
    assert ordered_records(tmp_path / "pack") == ordered_records(tmp_path / "whole")


@pytest.mark.parametrize("source", ["large"], indirect=True)
def test_parts_at_once(source, tmp_path):
    src, whole = source
    first, *parts, last = stages(4)
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", first)
    results = [ended(process) for process in [start_pack(src, tmp_path / "pack", "--part", part) for part in parts]]
    assert [code for code, *_ in results] == [0] * 4, results
    facts = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert sum(fact["records"] for fact in facts) == 93 and [fact["part"] for fact in facts] == parts
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", last)
    assert ordered_records(tmp_path / "pack") == ordered_records(whole) and os.listdir(tmp_path) == ["pack"]


def test_a_step_without_those_before_it_says_which(tmp_path, capsys):
    """And the steps before it can be made then."""
    src, out = write_source("folder", tmp_path / "src"), tmp_path / "pack"
    for part in "1/3", "merge/3":
        assert "run this command with --part list/3 first" in pack_fails(capsys, src, out, *FLAGS, "--part", part)
    run_pack(src, out, *FLAGS, "--part", "list/3")
    for missing, part in (["0, 1, 2", "1/3"], ["0, 2", "0/3"], ["2", "2/3"]):
        error = pack_fails(capsys, src, out, *FLAGS, "--part", "merge/3")
        assert f"{missing.count(',') + 1} of 3 parts are not written yet: {missing}; run them, as --part " in error
        run_pack(src, out, *FLAGS, "--part", part)
    run_pack(src, out, *FLAGS, "--part", "merge/3")
    assert sorted(os.listdir(tmp_path)) == ["pack", "src"]


@pytest.mark.parametrize("source", ["webdataset"], indirect=True)
def test_every_step_can_be_repeated(source, tmp_path, capsys, monkeypatch):
    """As where jobs are submitted again: what is done is not done anew."""
    src, whole = source
    monkeypatch.setattr(data_tools.common.progress.Progress, "line_seconds", 0)
    for part in stages(2)[:-1]:
        run_pack(src, tmp_path / "pack", *FLAGS, "--part", part)
        said = capsys.readouterr()
        assert ("listing: " in said.err) == part.startswith("list") and ("packing: " in said.err) == (part[0] in "01")
        run_pack(src, tmp_path / "pack", *FLAGS, "--part", part)
        again = capsys.readouterr()
        assert "listing: " not in again.err and "packing: " not in again.err
        assert [{**json.loads(one.out.splitlines()[-1]), "seconds": 0} for one in (said, again)][0] == {
            **json.loads(again.out.splitlines()[-1]), "seconds": 0}
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", "merge/2")
    assert ordered_records(tmp_path / "pack") == ordered_records(whole)


def test_a_source_that_cannot_be_listed_leaves_nothing(tmp_path, capsys):
    write_source("webdataset", tmp_path / "src")
    with open(tmp_path / "src" / "train.tar", "r+b") as file:
        file.truncate(30000)
    assert "cut short" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "list/3")


def test_to_begin_anew_is_for_the_list(tmp_path, capsys):
    src = write_tree(tmp_path / "src", {"a": 4}) and tmp_path / "src"
    for part in stages(2)[:2]:
        run_pack(src, tmp_path / "pack", "--part", part)
    error = pack_fails(capsys, src, tmp_path / "pack", "--part", "1/2", "--restart")
    assert "give it with --part list/N" in error
    run_pack(src, tmp_path / "pack", "--part", "list/2", "--restart", "--seed", 1)
    assert not entries(tmp_path / "pack")


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
    run_pack("list.csv", tmp_path / "pack", "--part", "list/2")
    for flag, value in OTHERS:
        args = (flag, value, *(() if flag == "--part" else ("--part", "1/2")))
        error = pack_fails(capsys, "list.csv", tmp_path / "pack", *args)
        assert f"{kept(tmp_path / 'pack')} was left by another command" in error and "--restart" in error
        assert ("parts 2, now 3" if flag == "--part" else f"{flag} ") in error
    for part in stages(2)[1:]:
        run_pack("list.csv", tmp_path / "pack", "--part", part, "--workers", 1, "--memory-mb", 5, "--max-skipped", 3)
    assert ordered_records(tmp_path / "pack")["train"]


@pytest.mark.parametrize("source", ["folder", "webdataset"], indirect=True)
def test_a_source_that_changed_is_noticed(source, tmp_path, capsys):
    src, whole = source
    shutil.copytree(src, tmp_path / "src")
    run_pack(tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "list/2")
    (tmp_path / "src" / "train" / "note.txt" if (src / "train").is_dir() else tmp_path / "src" / "a.tar").touch()
    capsys.readouterr()
    assert "state of SRC" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "1/2")
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
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", "list/2")
    change(src)
    capsys.readouterr()
    assert "state of SRC" in pack_fails(capsys, src, tmp_path / "pack", *FLAGS, "--part", "1/2")


@pytest.mark.parametrize("name", ["val", "validation", "valid"])
def test_shards_in_any_folder_of_a_split_are_watched(tmp_path, capsys, name):
    for split in "train", name:
        (tmp_path / "src" / split).mkdir(parents=True)
        write_tar(tmp_path / "src" / split / "0.tar", [("a.png", picture(len(split))), ("a.cls", b"x")])
    run_pack(tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "list/2")
    with open(tmp_path / "src" / name / "0.tar", "ab") as file:
        file.write(bytes(10240))
    assert "state of SRC" in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *FLAGS, "--part", "1/2")


@pytest.mark.parametrize("source, parts", [("folder", None), ("webdataset", 1), ("large", 2)], indirect=["source"])
def test_a_folder_that_appears_meanwhile_is_not_replaced(source, tmp_path, capsys, monkeypatch, parts):
    src, whole = source
    out, last = tmp_path / "pack", [] if parts is None else ["--part", f"merge/{parts}"]
    for part in [] if parts is None else stages(parts)[:-1]:
        run_pack(src, out, *FLAGS, "--part", part)
    capsys.readouterr()
    with monkeypatch.context() as context:
        catalogue = data_tools.packing.job.Catalogue
        context.setattr(data_tools.packing.job, "Catalogue", lambda folder: out.mkdir() or catalogue(folder))
        with pytest.raises(SystemExit) as exit:
            run_pack(src, out, *FLAGS, *last)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and "pack has appeared meanwhile" in error and "the same command resumes" in error
    out.rmdir()
    run_pack(src, out, *FLAGS, *last)
    assert ordered_records(out) == ordered_records(whole)


@pytest.mark.parametrize("source", ["folder"], indirect=True)
def test_a_late_step_finds_the_pack(source, tmp_path, capsys):
    """As where jobs are submitted again."""
    src, _ = source
    run_parts(2, src, tmp_path / "pack", *FLAGS)
    hashes = file_hashes(tmp_path / "pack")
    capsys.readouterr()
    for part in stages(2):
        error = pack_fails(capsys, src, tmp_path / "pack", *FLAGS, "--part", part)
        assert "if these parts made it, all is done" in error and "remove" not in error
    assert file_hashes(tmp_path / "pack") == hashes


@pytest.mark.parametrize("text", ["2/2", "-1/2", "1", "a/b", "0/0", "list/0", "merge", "lists/2"])
def test_a_part_that_cannot_be(tmp_path, capsys, text):
    (tmp_path / "src").mkdir()
    error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack", f"--part={text}")
    assert "is not list/16, merge/16 or like 0/16" in error


@pytest.mark.parametrize("source", ["webdataset"], indirect=True)
def test_readers_refuse_an_unfinished_pack(source, tmp_path):
    src, whole = source
    run_pack(src, tmp_path / "pack", *FLAGS, "--part", "list/2")
    shutil.copytree(whole, kept(tmp_path / "pack") / "pack")  # as just before the end
    with pytest.raises(PackError, match="did not end"):
        open_splits(kept(tmp_path / "pack") / "pack")
