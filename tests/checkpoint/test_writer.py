"""Any world reads any world's checkpoint, bit for bit; what is not whole is refused by name."""

import copy
import errno
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tests.support.worlds import run_ranks
from xc import backbone as backbones
from xc import checkpoint, data, tensor_file
from xc import saver as savers
from xc.config import Config, UserError
from xc.exchange import AllReduce
from xc.heads import HEADS
from xc.losses import Losses
from xc.noise_scale import NoiseScale
from xc.optim import RowSGD
from xc.schedule import Position, Schedule
from xc.world import World

C, D = 10, 4
# Ranks, and how many of them hold one copy of the classifier. Of twelve two own no class.
GRIDS = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4), (12, 12)]
HEAD_SETTINGS = {"full": {}, "knn": {"active_classes": 6, "num_neighbors": 3, "graph_angle": 5.0},
                 "selective": {"active_classes": 6}, "mach": {"buckets": 7, "repetitions": 2}}


# outside of the threads, which share torch's random generator
NETS = {seed: backbones.build("small", (1, 16, 16), D, seed, World()) for seed in (1, 2)}


def state_of(world, seed, num_classes=C, head="full"):
    net = copy.deepcopy(NETS[seed])
    head = HEADS[head](num_classes, D, world, seed=seed, **HEAD_SETTINGS[head])
    state = checkpoint.State(net, torch.optim.SGD(net.parameters(), 0.1, 0.9), head, RowSGD(head, 0.9, 0.0),
                             AllReduce(net, world), NoiseScale(), Losses())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    state.body_optimizer.step()
    state.head_optimizer.momentum_rows.copy_(head.weight * 2)
    return state


IDENTITY = {"seed": 5, "classes_digest": "abc"}


def position(step):
    return Position(step, 7 * step, 7)


def save(world, run, step=3, keep=2, top1=None, num_classes=C, head="full", seed=1):
    saver = savers.Saver(run, world, IDENTITY, keep)
    state = state_of(world, seed, num_classes, head)
    state.head.refresh(0, due=True)
    saver.save(state, position(step), top1)
    saver.finish(last=True)


def everything(state):
    """{name: tensor} of this rank."""
    return {"weight": state.head.weight, "momentum": state.head_optimizer.momentum_rows,
            **{f"net.{k}": v for k, v in state.backbone.state_dict().items()},
            **{f"sgd.{i}": s["momentum_buffer"] for i, s in enumerate(state.body_optimizer.state.values())}}


def graph_of(head):
    """Edges (class, place, neighbour) of the graph of all shards, and what this shard's rows were when indexed."""
    if not hasattr(head, "graph"):
        return None
    classes, neighbors, places = head.graph.lookup(torch.arange(head.num_classes))
    edges = torch.stack([classes, places, neighbors + head.shard.first], 1).tolist()
    edges = sorted(edge for of_rank in head.world.shards.all_gather_object(edges) for edge in of_rank)
    return edges, head.graph.num_neighbors, head.graph.indexed.codes.tolist(), head.graph.indexed.recall


def assert_holds_what_was_saved(folder, readers, width, head="full", num_classes=C):
    """In a world of so many ranks, every rank reads what a run of that world would have had."""
    def read(world):
        state, original = state_of(world, 2, num_classes, head), state_of(world, 1, num_classes, head)
        original.head.refresh(0, due=True)
        assert not torch.equal(state.head.weight, original.head.weight) or not len(state.head.weight)
        assert checkpoint.load(folder, state, IDENTITY) == position(3)
        found, expected = everything(state), everything(original)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert graph_of(state.head) == graph_of(original.head)
        files, expected = state.head.files(), original.head.files()
        assert files.keys() == expected.keys()
        for name, tables in expected.items():
            assert files[name].keys() == tables.keys()
            assert all(torch.equal(files[name][key], tables[key]) for key in tables)

    run_ranks(readers, read, width)


@pytest.mark.parametrize("head", HEAD_SETTINGS)
@pytest.mark.parametrize("writers, width", GRIDS)
def test_any_world_reads_any_worlds(writers, width, head, tmp_path):
    run_ranks(writers, lambda w: save(w, tmp_path, head=head), width)
    folder = checkpoint.to_resume("auto", tmp_path, World())
    for readers, reader_width in GRIDS:
        assert_holds_what_was_saved(folder, readers, reader_width, head)


@pytest.mark.parametrize("batch, most", [(13, 13), (13, 52), (30, 60)])
@pytest.mark.parametrize("worlds", [(1, 4, 2), (3, 2, 4), (4, 1, 3), (2, 2, 2)])
def test_every_example_is_seen_once_an_epoch_whoever_goes_on(worlds, batch, most, tiny_packs, tmp_path):
    """From one world to another in the midst of an epoch, twice; also while the batch grows."""
    cfg = Config(data=str(tiny_packs), out="x", epochs=5.0, global_batch=batch, warmup="0.5epochs", augment=0.0,
                 **({"schedule": "fccs", "max_batch": most, "hold": "10%"} if most > batch else {}))
    split = data.open_splits(cfg)["train"]
    images = data.prepared(split.examples(range(len(split)))[0])
    record_of = {image.numpy().tobytes(): record for record, image in enumerate(images)}
    assert len(record_of) == len(split) == 120

    def part(world, num_steps):
        """Some steps from the last checkpoint on: the records that this rank was given, by micro-batch."""
        schedule, state, position = Schedule.of(cfg, len(split), world.size), state_of(world, seed=1), Position()
        if folder := checkpoint.to_resume("auto", tmp_path, world):
            position = schedule.resume(checkpoint.load(folder, state, IDENTITY))
        queue, given = data.Loader(split, cfg, world).train(position.examples, schedule.examples, batch), []
        last = position.step + num_steps
        while position.examples < schedule.examples and position.step < last:
            now = schedule.at(position)
            given += [[record_of[image.numpy().tobytes()] for image in images]
                      for images, _ in queue.take(now.micro_batches)]
            position = position.after(now)
        saver = savers.Saver(tmp_path, world, IDENTITY, keep=1)
        saver.save(state, position)
        saver.finish(last=True)
        return given, position

    seen, places = [], []
    for size, num_steps in zip(worlds, (7, 3, 1000), strict=True):
        ranks = run_ranks(size, lambda world, num_steps=num_steps: part(world, num_steps))
        for micro_batch in zip(*(given for given, _ in ranks), strict=True):
            seen += [record for of_rank in micro_batch for record in of_rank]
        places.append(ranks[0][1].examples)
    assert places[0] % 120 and places[1] % 120 and places[2] == len(seen) >= 590
    for first in range(0, len(seen), 120):
        epoch = seen[first : first + 120]
        assert len(set(epoch)) == len(epoch)
    assert sorted(seen[:480]) == sorted([*range(120)] * 4)


def test_newest_are_kept_and_found(tmp_path):
    def saved_after(*steps):
        for step in steps:
            run_ranks(2, lambda w, step=step: save(w, tmp_path, step))
        return [folder.name for folder in sorted((tmp_path / "checkpoints").iterdir(), key=lambda f: int(f.name[5:]))]

    assert saved_after(5, 9, 99999999, 100000000) == ["step-99999999", "step-100000000"]
    assert checkpoint.to_resume("auto", tmp_path, World()).name == "step-100000000"
    # one that goes on from an earlier step gives up the later ones
    assert saved_after(11) == ["step-00000011"]
    assert saved_after(12, 12, 13) == ["step-00000012", "step-00000013"]
    assert checkpoint.to_resume("auto", tmp_path, World()).name == "step-00000013"
    assert checkpoint.to_resume("auto", tmp_path / "elsewhere", World()) is None
    assert checkpoint.to_resume("", tmp_path, World()) is None


def test_a_save_that_fails_leaves_the_last_one_and_is_not_taken_for_whole(tmp_path, monkeypatch):
    run_ranks(2, lambda w: save(w, tmp_path, 1))

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file, "write", no_space)
    with pytest.raises(UserError, match="No space left"):
        run_ranks(2, lambda w: save(w, tmp_path, 2))
    assert checkpoint.to_resume("auto", tmp_path, World()).name == "step-00000001"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device"),
                                   MemoryError("No space left on device")])
def test_training_goes_on_after_a_save_that_failed(error, tmp_path, monkeypatch, capsys):
    """On one rank of three, twice; the third time in a row all ranks stop. One that succeeds in between is counted."""
    fails, write = {2, 3, 5, 6, 7}, tensor_file.write

    def body(world):
        saver = savers.Saver(tmp_path, world, IDENTITY, keep=9)

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


def test_what_is_no_number_is_not_saved(tmp_path, capsys):
    """On whichever rank it is; what was saved before is there to go back to."""
    def body(world):
        saver, state = savers.Saver(tmp_path, world, IDENTITY, 2), state_of(world, seed=1)
        saver.save(state, position(1))
        if world.rank == 2:
            state.head.weight[1, 2] = torch.nan
        saver.save(state, position(2))
        saver.finish()

    run_ranks(3, body)
    assert "weight of rows-000000000007-000000000010.safetensors is not finite" in capsys.readouterr().err
    assert [folder.name for folder in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_the_state_may_change_while_it_is_written(tmp_path, monkeypatch):
    begun, write = threading.Event(), tensor_file.write

    def slow(path, *rest, **progress):
        begun.wait(20)
        return write(path, *rest, **progress)

    monkeypatch.setattr(tensor_file, "write", slow)

    def body(world):
        saver, state = savers.Saver(tmp_path, world, IDENTITY, 2), state_of(world, seed=1)
        saver.save(state, position(3))
        for tensor in everything(state).values():
            tensor.fill_(9)
        world.everyone.all_gather_object(None)
        begun.set()
        saver.finish()

    run_ranks(3, body)
    state = state_of(World(), seed=2)
    checkpoint.load(checkpoint.to_resume("auto", tmp_path, World()), state, IDENTITY)
    assert all(torch.equal(a, b) for a, b in zip(everything(state).values(),
                                                 everything(state_of(World(), seed=1)).values(), strict=True))


def test_the_best_is_kept_beside_the_last(tmp_path):
    for step, top1 in enumerate([0.5, 0.9, None, 0.7, 0.9, None, 0.2], 1):
        run_ranks(2, lambda w, step=step, top1=top1: save(w, tmp_path, step, top1=top1))
    assert sorted(int(f.name[5:]) for f in (tmp_path / "checkpoints").iterdir()) == [2, 6, 7]


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
    for size in 1, 2, 4:
        found = run_ranks(size, lambda w: checkpoint.to_resume("auto", tmp_path, w))
        assert {folder.name for folder in found} == {"step-00000001"}
        error = capsys.readouterr().err
        assert error.count("is damaged") == 1 and file in error
    (tmp_path / "checkpoints" / "step-00000001" / "meta.json").write_text("{")
    with pytest.raises(UserError, match="no older one is whole"):
        run_ranks(2, lambda w: checkpoint.to_resume("auto", tmp_path, w))


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "another's", "pipe", "pipe for meta"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_checkpoint_by_name_is_looked_at_as_closely(ranks, damage, tmp_path):
    for step in 1, 2:
        run_ranks(3, lambda w, step=step: save(w, tmp_path, step, seed=step))
    folder = tmp_path / "checkpoints" / "step-00000002"
    assert run_ranks(ranks, lambda w: checkpoint.to_resume(folder, tmp_path, w)) == [folder] * ranks
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
        run_ranks(ranks, lambda w: checkpoint.to_resume(folder, tmp_path, w))


def test_one_that_cannot_be_deleted_does_not_keep_the_others(tmp_path, monkeypatch, capsys):
    def refuse(path, *rest, **options):
        if ".step-00000001.removed-" in str(path):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return remove(path, *rest, **options)

    remove = shutil.rmtree
    monkeypatch.setattr(savers.shutil, "rmtree", refuse)
    for step in range(1, 7):
        run_ranks(2, lambda w, step=step: save(w, tmp_path, step, keep=1))
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
        saver = savers.Saver(tmp_path, world, IDENTITY, 1)
        saver.save(state_of(world, 2), position(1))
        saver.finish()

    run_ranks(1, body)
    assert "Input/output error" in capsys.readouterr().err and renamed
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]
    checkpoint.check(tmp_path / "checkpoints" / "step-00000001")


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
        saver, state = savers.Saver(tmp_path, world, IDENTITY, keep=1), state_of(world, seed=1)
        for step in 2, 3, 4, 5, 5:
            saver.save(state, position(step))
        saver.finish(last=True)

    run_ranks(2, body)
    said = capsys.readouterr().err
    assert said.count("an old checkpoint could not be deleted") == (5 if hindrance == "busy" else 0)
    assert "could not be written" not in said
    assert [f.name for f in checkpoint.folders(folder)] == ["step-00000005"]
    checkpoint.check(folder / "step-00000005")
    assert hindrance != "link" or (tmp_path / "elsewhere" / "meta.json").exists()
    monkeypatch.undo()
    run_ranks(2, lambda w: save(w, tmp_path, 6, keep=1))  # now it can be
    assert os.listdir(folder) == ["step-00000006"]


@pytest.mark.parametrize("readers", [1, 2, 3, 4])
def test_buffers_that_differ_between_ranks_are_kept(readers, tmp_path):
    """Each rank goes on with its own; another number of ranks with the mean."""
    def of(world, step):
        state = state_of(world, seed=1)
        state.backbone.add_module("norm", torch.nn.BatchNorm1d(3))
        state.backbone.norm.running_mean[:] = torch.tensor([1.0, 2.0, 5.0]) * (1 + world.rank) * step
        state.backbone.norm.running_var[:] = 7 * step
        return state

    def write(world):
        state = of(world, 1)
        state.exchange.begin(None)  # a step
        saver = savers.Saver(tmp_path, world, IDENTITY, 2)
        saver.save(state, position(1))
        saver.finish()

    def read(world):
        state = of(world, 0)
        checkpoint.load(checkpoint.to_resume("auto", tmp_path, world), state, IDENTITY)
        files = state.exchange.files()
        assert bool(files) == (world.size == 3)  # they still differ, and are kept so
        return state.backbone.norm.running_mean.clone(), state.backbone.norm.running_var.clone()

    run_ranks(3, write)
    for rank, (mean, var) in enumerate(run_ranks(readers, read)):
        assert torch.equal(mean, torch.tensor([1.0, 2.0, 5.0]) * (1 + rank if readers == 3 else 2))
        assert torch.equal(var, torch.full((3,), 7.0))


def spoil(folder, what):
    meta = json.loads((folder / "meta.json").read_text())
    rows = folder / meta["rows"][0]
    match what:
        case "no meta":
            (folder / "meta.json").unlink()
        case "meta is no json":
            (folder / "meta.json").write_text("{")
        case "version":
            checkpoint.write_meta(folder, meta | {"version": 2})
        case "gap":
            checkpoint.write_meta(folder, meta | {"rows": meta["rows"][1:]})
        case "path":
            checkpoint.write_meta(folder, meta | {"rows": ["../" + name for name in meta["rows"]]})
        case "rows are no list":
            checkpoint.write_meta(folder, meta | {"rows": 5})
        case "no momentum":
            momentum = load_file(folder / "optimizer.safetensors")
            save_file(dict(list(momentum.items())[1:]), folder / "optimizer.safetensors")
        case "other momentum":
            momentum = load_file(folder / "optimizer.safetensors")
            save_file({name: m.flatten()[:1].clone() for name, m in momentum.items()}, folder / "optimizer.safetensors")
        case "position":
            checkpoint.write_meta(folder, meta | {"step": -1})
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
    ("gap", "cover the class rows"), ("path", "cover the class rows"), ("position", "no position"),
    ("rows are no list", "cover the class rows"),
    ("no momentum", "optimizer.safetensors"), ("other momentum", "optimizer.safetensors"),
    ("cut rows", "rows-000000000000"), ("cut backbone", "backbone.safetensors"), ("no rows", "rows-000000000000"),
    ("bit of meta", "meta.json is damaged"), ("stranger", "was written without neighbors-"),
])
def test_a_broken_checkpoint_is_named(what, text, tmp_path):
    run_ranks(3, lambda w: save(w, tmp_path))
    folder = checkpoint.to_resume("auto", tmp_path, World())
    spoil(folder, what)
    with pytest.raises(ValueError, match=text) as error:
        run_ranks(1, lambda w: checkpoint.load(folder, state_of(w, 2), IDENTITY))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("num_classes, identity, text", [
    (C + 1, {}, "num_classes 10, this run 11"), (C, {"seed": 6}, "seed 5, this run 6"),
    (C, {"classes_digest": "xyz"}, "classes_digest abc, this run xyz")])
def test_a_checkpoint_of_another_run_is_refused(num_classes, identity, text, tmp_path):
    run_ranks(2, lambda w: save(w, tmp_path))
    folder = checkpoint.to_resume("auto", tmp_path, World())
    with pytest.raises(ValueError, match=text):
        run_ranks(2, lambda w: checkpoint.load(folder, state_of(w, 2, num_classes), IDENTITY | identity))
