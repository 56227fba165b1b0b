"""What is not a valid checkpoint of this run is refused by name."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import IDENTITY, C, save, state_of
from tests.support.worlds import run_ranks
from xc.checkpoint import layout, newest
from xc.checkpoint import state as checkpoint
from xc.comm.world import World
from xc.errors import UserError


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
@pytest.mark.parametrize("file", ["rows-000000000004-000000000007.safetensors", "backbone.safetensors"])
def test_damage_is_found_and_an_older_one_is_taken(damage, file, tmp_path, capsys):
    for step in 1, 2:
        run_ranks(3, lambda w, step=step: save(w, tmp_path, step))
    path = tmp_path / "checkpoints" / "step-00000002" / file
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data if damage == "bit" else data[:-1])
    for size in 1, 4:
        found = run_ranks(size, lambda w: newest.to_resume("auto", tmp_path, w))
        assert {folder.name for folder in found} == {"step-00000001"}
        error = capsys.readouterr().err
        assert error.count("is damaged") == 1 and file in error
    (tmp_path / "checkpoints" / "step-00000001" / "meta.json").write_text("{")
    with pytest.raises(UserError, match="no older checkpoint is valid"):
        run_ranks(2, lambda w: newest.to_resume("auto", tmp_path, w))


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "another's", "pipe", "pipe for meta"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_by_name_is_looked_at_as_closely(ranks, damage, tmp_path):
    for step in 1, 2:
        run_ranks(3, lambda w, step=step: save(w, tmp_path, step, seed=step))
    folder = tmp_path / "checkpoints" / "step-00000002"
    assert run_ranks(ranks, lambda w: newest.to_resume(folder, tmp_path, w)) == [folder] * ranks
    path, words = folder / "rows-000000000004-000000000007.safetensors", "rows-000000000004.* is damaged"
    data = bytearray(path.read_bytes())
    match damage:
        case "bit":
            data[-3] ^= 64
            path.write_bytes(data)
        case "cut":
            path.write_bytes(data[:-1])
        case "another's":
            shutil.copy(tmp_path / "checkpoints" / "step-00000001" / path.name, path)
        case "pipe for meta":
            (folder / "meta.json").unlink()
            os.mkfifo(folder / "meta.json")
            words = "not a checkpoint"
        case _:
            path.unlink()
            if damage == "pipe":
                os.mkfifo(path)
    with pytest.raises(UserError, match=words):
        run_ranks(ranks, lambda w: newest.to_resume(folder, tmp_path, w))


def spoil(folder, what):
    meta = json.loads((folder / "meta.json").read_text())
    rows = folder / meta["rows"][0]
    match what:
        case "no meta":
            (folder / "meta.json").unlink()
        case "meta is no json":
            (folder / "meta.json").write_text("{")
        case "version":
            layout.write_meta(folder, meta | {"version": 2})
        case "gap":
            layout.write_meta(folder, meta | {"rows": meta["rows"][1:]})
        case "path":
            layout.write_meta(folder, meta | {"rows": ["../" + name for name in meta["rows"]]})
        case "rows are no list":
            layout.write_meta(folder, meta | {"rows": 5})
        case "no momentum":
            momentum = load_file(folder / "optimizer.safetensors")
            save_file(dict(list(momentum.items())[1:]), folder / "optimizer.safetensors")
        case "other momentum":
            momentum = load_file(folder / "optimizer.safetensors")
            save_file({name: m.flatten()[:1].clone() for name, m in momentum.items()}, folder / "optimizer.safetensors")
        case "position":
            layout.write_meta(folder, meta | {"step": -1})
        case "bit of meta":
            (folder / "meta.json").write_text(json.dumps(meta | {"examples": meta["examples"] ^ 4}))
        case "cut rows":
            rows.write_bytes(rows.read_bytes()[:-20])
        case "cut backbone":
            (folder / "backbone.safetensors").write_bytes(b"")
        case "no rows":
            rows.unlink()
        case "stranger":
            save_file({}, folder / "neighbors-000000000000-000000000010.safetensors")


@pytest.mark.parametrize("what, text", [
    ("no meta", "not a checkpoint"), ("meta is no json", "not a checkpoint"), ("version", "version 5"),
    ("gap", "cover the class rows"), ("path", "cover the class rows"), ("position", "no progress"),
    ("rows are no list", "cover the class rows"),
    ("no momentum", "optimizer.safetensors"), ("other momentum", "optimizer.safetensors"),
    ("cut rows", "rows-000000000000"), ("cut backbone", "backbone.safetensors"), ("no rows", "rows-000000000000"),
    ("bit of meta", "meta.json is damaged"), ("stranger", "was written without neighbors-"),
])
def test_a_broken_checkpoint_is_named(what, text, tmp_path):
    run_ranks(3, lambda w: save(w, tmp_path))
    folder = newest.to_resume("auto", tmp_path, World())
    spoil(folder, what)
    with pytest.raises(ValueError, match=text) as error:
        run_ranks(1, lambda w: checkpoint.load(folder, state_of(w, 2), IDENTITY))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_classes, identity, text", [
    (C + 1, {}, "num_classes 10, this run 11"), (C, {"seed": 6}, "seed 5, this run 6"),
    (C, {"classes_digest": "xyz"}, "classes_digest abc, this run xyz")])
def test_a_checkpoint_of_another_run_is_refused(num_classes, identity, text, tmp_path):
    run_ranks(2, lambda w: save(w, tmp_path))
    folder = newest.to_resume("auto", tmp_path, World())
    with pytest.raises(ValueError, match=text):
        run_ranks(2, lambda w: checkpoint.load(folder, state_of(w, 2, num_classes), IDENTITY | identity))
