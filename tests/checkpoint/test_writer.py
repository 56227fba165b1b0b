"""Checkpoints are written beside the steps: what fails, what is kept, and what is deleted."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from tests.support.checkpoints import IDENTITY, everything, position, save, state_of
from tests.support.processes import wait_until
from tests.support.worlds import run_ranks
from xc.checkpoint import layout, newest, tensor_file
from xc.checkpoint import snapshot as snapshots
from xc.checkpoint import state as checkpoint
from xc.checkpoint import writer as savers
from xc.comm.world import World
from xc.errors import UserError
from xc.optim.optimizers import set_lr


def test_newest_are_kept_and_found(tmp_path):
    def saved_after(*steps):
        for step in steps:
            run_ranks(2, lambda w, step=step: save(w, tmp_path, step))
        return [folder.name for folder in sorted((tmp_path / "checkpoints").iterdir(), key=lambda f: int(f.name[5:]))]

    assert saved_after(5, 9, 99999999, 100000000) == ["step-99999999", "step-100000000"]
    assert newest.to_resume("auto", tmp_path, World()).name == "step-100000000"
    # one that goes on from an earlier step gives up the later ones
    assert saved_after(11) == ["step-00000011"]
    assert saved_after(12, 12, 13) == ["step-00000012", "step-00000013"]
    assert newest.to_resume("auto", tmp_path, World()).name == "step-00000013"
    assert newest.to_resume("auto", tmp_path / "elsewhere", World()) is None
    assert newest.to_resume("", tmp_path, World()) is None


def test_a_save_that_fails_leaves_the_last_one_and_is_not_taken_for_whole(tmp_path, monkeypatch):
    run_ranks(2, lambda w: save(w, tmp_path, 1))

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", no_space)
    with pytest.raises(UserError, match="No space left"):
        run_ranks(2, lambda w: save(w, tmp_path, 2))
    assert newest.to_resume("auto", tmp_path, World()).name == "step-00000001"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device"),
                                   MemoryError("No space left on device")])
def test_training_goes_on_after_a_save_that_failed(error, tmp_path, monkeypatch, capsys):
    """On one rank of three, twice; the third time in a row all ranks stop. One that succeeds in between is counted."""
    fails, write = {2, 3, 5, 6, 7}, tensor_file.write

    def body(world):
        saver = savers.CheckpointWriter(tmp_path, world, IDENTITY, keep=9)

        def failing(path, *rest, **progress):
            if world.rank == 1 and int(path.parent.name[6:14]) in fails:
                path.write_bytes(b"half")
                raise error
            return write(path, *rest, **progress)

        checkpoints[world.rank] = failing
        for step in range(1, 8):
            saver.save(state_of(world, seed=1), position(step))
        saver.finish()

    checkpoints = {}
    monkeypatch.setattr(tensor_file, "write", lambda path, *rest, **progress: checkpoints[
        1 if path.name.startswith("rows-000000000004") else 0](path, *rest, **progress))
    with pytest.raises(UserError, match="3 checkpoint.* in a row .*No space left"):
        run_ranks(3, body)
    assert capsys.readouterr().err.count("warning: a checkpoint could not be written") == 4
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["step-00000001", "step-00000004"]


def held_back(monkeypatch):
    """An Event until which no file is written."""
    begun, write = threading.Event(), tensor_file.write

    def slow(path, *rest, **progress):
        begun.wait(20)
        return write(path, *rest, **progress)

    monkeypatch.setattr(tensor_file, "write", slow)
    return begun


def test_the_state_may_change_while_it_is_written(tmp_path, monkeypatch):
    begun = held_back(monkeypatch)

    def body(world):
        saver, state = savers.CheckpointWriter(tmp_path, world, IDENTITY, 2), state_of(world, seed=1)
        saver.save(state, position(3))
        state.head_optimizer.before_update(slice(0, len(state.head.weight)))
        for tensor in everything(state).values():
            tensor.fill_(9)
        world.all_ranks.all_gather_object(None)
        begun.set()
        saver.finish()

    run_ranks(3, body)
    state = state_of(World(), seed=2)
    checkpoint.load(newest.to_resume("auto", tmp_path, World()), state, IDENTITY)
    assert all(torch.equal(a, b) for a, b in zip(everything(state).values(),
                                                 everything(state_of(World(), seed=1)).values(), strict=True))


@pytest.mark.parametrize("head", ["full", "knn"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_steps_go_on_while_their_rows_are_written(head, ranks, tmp_path, monkeypatch):
    """The file has the rows of the step at which the save began, whatever the steps after it did."""
    monkeypatch.setattr(snapshots, "_BLOCK_BYTES", 20)
    begun = held_back(monkeypatch)

    def body(world):
        saver, state = savers.CheckpointWriter(tmp_path, world, IDENTITY, 2), state_of(world, seed=1, head=head)
        state.head.refresh(0, due=True)
        set_lr(state.head_optimizer, 0.5)
        saver.save(state, position(3))
        before = state.head.weight.clone()
        for step in range(4):
            labels = torch.tensor([step, 9 - step])
            state.head.select(labels, step)
            state.head(torch.randn(2, 4, generator=torch.Generator().manual_seed(step)).requires_grad_(), labels, 2)
            state.head.reduce()
            state.head_optimizer.step()
            state.head.zero_grad()
            if step == 1:
                world.all_ranks.all_gather_object(None)
                begun.set()
        assert not torch.equal(before, state.head.weight) and state.head_optimizer.before_update
        saver.finish()
        assert state.head_optimizer.before_update is None

    run_ranks(ranks, body)
    state = state_of(World(), seed=2, head=head)
    checkpoint.load(newest.to_resume("auto", tmp_path, World()), state, IDENTITY)
    expected = state_of(World(), seed=1, head=head)
    assert torch.equal(state.head.weight, expected.head.weight)
    assert torch.equal(state.head_optimizer.momentum_rows, expected.head_optimizer.momentum_rows)


@pytest.mark.parametrize("room, waits_for_it", [(0, "an update"), (2**28, "the end")])
def test_a_save_that_rests_hurries_when_it_is_waited_for(room, waits_for_it, tmp_path, monkeypatch):
    """Else this would take for ever."""
    monkeypatch.setattr(savers, "_WORK_SECONDS", 0.0)
    monkeypatch.setattr(savers, "_REST", 1e8)
    monkeypatch.setattr(savers, "Snapshot", lambda tables, on_wait: snapshots.Snapshot(tables, room, on_wait))
    monkeypatch.setattr(tensor_file, "PIECE", 64)
    monkeypatch.setattr(snapshots, "_BLOCK_BYTES", 64)

    def body(world):
        state = state_of(world, seed=1)
        saver = savers.CheckpointWriter(tmp_path, world, IDENTITY, keep=1)
        saver._rests = True
        saver.save(state, position(3))
        if waits_for_it == "an update":
            state.head_optimizer.before_update(slice(0, len(state.head.weight)))
        saver.finish(last=True)

    run_ranks(2, body)
    assert newest.to_resume("auto", tmp_path, World()).name == "step-00000003"


def test_the_best_is_kept_beside_the_last(tmp_path):
    for step, top1 in enumerate([0.5, 0.9, None, 0.7, 0.9, None, 0.2], 1):
        run_ranks(2, lambda w, step=step, top1=top1: save(w, tmp_path, step, top1=top1))
    assert sorted(int(f.name[5:]) for f in (tmp_path / "checkpoints").iterdir()) == [2, 6, 7]


def test_one_that_cannot_be_deleted_does_not_keep_the_others(tmp_path, monkeypatch, capsys):
    def refuse(path, *rest, **options):
        if ".step-00000001.removed-" in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return remove(path, *rest, **options)

    remove = shutil.rmtree
    monkeypatch.setattr(savers.shutil, "rmtree", refuse)
    for step in range(1, 7):
        run_ranks(2, lambda w, step=step: save(w, tmp_path, step, keep_checkpoints=1))
    left = sorted(os.listdir(tmp_path / "checkpoints"))
    assert len(left) == 2 and left[0].startswith(".step-00000001.removed-") and left[1] == "step-00000006"


def test_a_checkpoint_stays_where_another_cannot_take_its_place(tmp_path, monkeypatch, capsys):
    def refuse(path, target):
        if path.name.endswith(".partial") and len(renamed) < 1:
            renamed.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    rename, renamed = Path.rename, []
    run_ranks(1, lambda w: save(w, tmp_path, 1, seed=1))
    monkeypatch.setattr(Path, "rename", refuse)

    def body(world):
        saver = savers.CheckpointWriter(tmp_path, world, IDENTITY, 1)
        saver.save(state_of(world, 2), position(1))
        saver.finish()

    run_ranks(1, body)
    assert "Input/output error" in capsys.readouterr().err and renamed
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    layout.check(tmp_path / "checkpoints" / "step-00000001")


@pytest.mark.parametrize("hindrance", ["busy", "link", "none"])
def test_an_old_checkpoint_that_cannot_be_deleted_costs_nothing(hindrance, tmp_path, capsys, monkeypatch):
    def refuse(path, *rest, **options):
        if ".removed-" in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return remove(path, *rest, **options)

    remove = shutil.rmtree
    folder = tmp_path / "checkpoints"
    run_ranks(2, lambda w: save(w, tmp_path, 1))
    if hindrance == "link":
        (folder / "step-00000001").rename(tmp_path / "elsewhere")
        (folder / "step-00000001").symlink_to(tmp_path / "elsewhere")
    elif hindrance == "busy":
        monkeypatch.setattr(savers.shutil, "rmtree", refuse)

    def body(world):
        saver, state = savers.CheckpointWriter(tmp_path, world, IDENTITY, keep=1), state_of(world, seed=1)
        for step in 2, 3, 4, 5, 5:
            saver.save(state, position(step))
        saver.finish(last=True)

    run_ranks(2, body)
    said = capsys.readouterr().err
    assert said.count("an old checkpoint could not be deleted") == (5 if hindrance == "busy" else 0)
    assert "could not be written" not in said
    assert [f.name for f in layout.folders(folder)] == ["step-00000005"]
    layout.check(folder / "step-00000005")
    assert hindrance != "link" or (tmp_path / "elsewhere" / "meta.json").exists()
    monkeypatch.undo()
    run_ranks(2, lambda w: save(w, tmp_path, 6, keep_checkpoints=1))  # now it can be
    assert os.listdir(folder) == ["step-00000006"]


def test_every_slow_file_is_progress_to_the_watchdog(tmp_path, monkeypatch):
    """A disk that is slow, one file after the other, is no stall: the main thread, which waits for the writing one,
    says after each file that this works."""
    said, write = [], tensor_file.write

    def hear(what, waits=False):
        if what == "writing a checkpoint" and not waits:
            said.append(what)

    def slow(path, *rest, **progress):
        before, result = len(said), write(path, *rest, **progress)
        wait_until(lambda: len(said) > before)
        files.append(path.name)
        return result

    files = []
    monkeypatch.setattr(savers.watchdog, "heartbeat", hear)
    monkeypatch.setattr(tensor_file, "write", slow)
    save(World(), tmp_path)
    assert len(files) == 3 and len(said) >= 3
    layout.check(tmp_path / "checkpoints" / "step-00000003")
