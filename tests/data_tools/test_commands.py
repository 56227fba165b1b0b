"""What all commands do alike: print a result, report progress, and end cleanly on a full disk or a signal."""

import importlib
import io
import json
import os
import re
import subprocess
import sys

import pytest

import data_tools.checkpoint
import data_tools.common.progress
import data_tools.export
import data_tools.pack
import data_tools.show
import data_tools.split
from tests.support.checkpoints import save
from tests.support.commands import call, ended, largest_file, names_in, refused, run_pack, start_slow
from tests.support.images import CLASSES, picture, write_tree
from tests.support.launch import ROOT
from tests.support.packs import write_pack
from tests.support.sources import samples, write_tar
from xc.checkpoint import layout as checkpoint
from xc.comm.world import World


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tree, a tar, a pack of images of 1200 bytes, a checkpoint and folders of packs: {name: path}."""
    folder = tmp_path_factory.mktemp("inputs")
    write_tree(folder / "tree", {"a": 60})
    write_tar(folder / "a.tar", samples(write_tree(folder / "files", {"0": 60})))
    write_pack(folder / "pack", ["a"], [(picture(i, "BMP", (20, 20)), 0) for i in range(9)])
    write_tree(folder / "src" / "train", CLASSES)
    write_tree(folder / "src" / "test", {"b": 2}, first=100)
    run_pack(folder / "src", folder / "packs")
    save(World(), folder / "run")
    [saved] = checkpoint.folders(folder / "run" / "checkpoints")
    return {name: folder / name for name in ("tree", "a.tar", "pack", "packs")} | {"checkpoint": saved}


NOTHING = "too large; nothing was kept"


@pytest.mark.parametrize("main, arguments, limit, said", [
    (data_tools.pack.main, ["tree", "OUT", "--workers", 0], 60_000, "too large; OUT keeps what was done"),
    (data_tools.pack.main, ["a.tar", "OUT", "--workers", 0, "--memory-mb", 0.005], 900,
     "the list of images: disk I/O error; nothing was kept"),
    (data_tools.split.main, ["pack", "OUT", "--test", 0.3], 5000, NOTHING),
    (data_tools.export.main, ["pack", "OUT", "--to", "folder"], 1000, NOTHING),
    (data_tools.export.main, ["pack", "OUT", "--to", "webdataset"], 1000, NOTHING),
    (data_tools.show.main, ["packs", "--sheet", "OUT.png"], 1000, "too large"),
    (data_tools.checkpoint.main, ["merge", "checkpoint", "OUT.safetensors"], 300, NOTHING),
    (data_tools.checkpoint.main, ["reshard", "checkpoint", "OUT", "--files", 2], 300, NOTHING)])
def test_a_full_disk_is_one_line(inputs, tmp_path, capsys, main, arguments, limit, said):
    """Here the system refuses larger files. Only a pack keeps what was done, from when all images are listed."""
    kept = tmp_path / ".out.partial-pack"
    arguments = [str(inputs.get(one, one)).replace("OUT", f"{tmp_path}/out") for one in arguments]
    with largest_file(limit):
        error = refused(capsys, main, *arguments, folder=None if "keeps" in said else tmp_path)
    assert said.replace("OUT", str(kept)) in error
    assert names_in(tmp_path) == ([kept.name] if "keeps" in said else [])
    call(main, *arguments)  # and where there is room
    assert len(names_in(tmp_path)) == 1


@pytest.mark.parametrize("tool, arguments, begun, said", [
    ("split", ["pack", "OUT", "--test", 0.3, "--shard-mb", 1e-6], ".out.partial-*/train/shard-00002.h5",
     "data_tools.split: interrupted; nothing was kept\n"),
    ("export", ["pack", "OUT", "--to", "webdataset", "--shard-mb", 1e-6], ".out.partial-*/images-000002.tar",
     "data_tools.export: interrupted; nothing was kept\n"),
    ("checkpoint", ["merge", "checkpoint", "OUT.safetensors"], ".*", "")])
def test_a_signal_leaves_nothing(inputs, tmp_path, tool, arguments, begun, said):
    arguments = [str(inputs.get(one, one)).replace("OUT", f"{tmp_path}/out") for one in arguments]
    process = start_slow(f"data_tools.{tool}", *arguments, seconds=30 if tool == "checkpoint" else 0.2,
                         until=lambda: list(tmp_path.glob(begun)))
    process.terminate()
    code, _, error = ended(process)
    assert code == 130 and error == said
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("tool, output, code, said", [
    ("pack", "/dev/full", 2, "all is done, but the result cannot be printed"), ("show", "pipe", 141, ""),
    ("split", "pipe", 141, "")])
def test_a_result_that_cannot_be_printed(inputs, tmp_path, tool, output, code, said):
    arguments = {"show": [inputs["packs"]], "pack": [inputs["tree"], tmp_path / "out", "--workers", "0"],
                 "split": [inputs["packs"] / "train", tmp_path / "out", "--test", "0.3"]}[tool]
    if output == "pipe":
        reading, output = os.pipe()
        os.close(reading)
    else:
        output = os.open(output, os.O_WRONLY)
    done = subprocess.run([sys.executable, "-m", f"data_tools.{tool}", *arguments], stdout=output,
                          stderr=subprocess.PIPE, text=True, cwd=ROOT)
    os.close(output)
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr
    assert "kept" not in done.stderr and "Exception" not in done.stderr
    assert tool == "show" or list((tmp_path / "out").rglob("index.h5"))


@pytest.mark.parametrize("tool, flags", [("show", ["--verify", "--sample", 20]), ("split", ["out", "--test", 0.2]),
                                         ("export", ["out", "--to", "folder"])])
def test_progress_goes_to_stderr_and_the_result_to_stdout(inputs, tmp_path, monkeypatch, capsys, tool, flags):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_tools.common.progress.Progress, "line_seconds", 0)
    call(importlib.import_module(f"data_tools.{tool}").main, inputs["packs"] / "train", *flags, "--json")
    said = capsys.readouterr()
    json.loads(said.out)
    assert said.out.count("\n") == 1
    lines = said.err.splitlines()
    assert len(lines) >= 1 and all(re.match(r"(sampling|verifying train|splitting|exporting): \d+ of \d+", line)
                                   for line in lines)


def test_paths_that_are_not_utf8_are_printed(inputs, tmp_path, monkeypatch):
    """The output takes strict UTF-8; a path may hold bytes that are none."""
    out = os.fsdecode(os.fsencode(tmp_path) + b"/pack\xe9")
    for main, *arguments in ((data_tools.pack.main, inputs["tree"], out, "--workers", 0),
                             (data_tools.split.main, out, out + "2", "--test", 0.3),
                             (data_tools.export.main, out, out + "3", "--to", "folder")):
        printed = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(printed, "utf-8", "strict"))
        call(main, *arguments)
        sys.stdout.flush()
        assert rb"pack\udce9" in printed.getvalue()
