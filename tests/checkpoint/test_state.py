"""Any world reads any world's checkpoint, bit for bit, and sees every example once."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import IDENTITY, D, assert_holds_what_was_saved, position, save, state_of
from tests.support.worlds import run_ranks
from xc.checkpoint import newest
from xc.checkpoint import state as checkpoint
from xc.checkpoint import writer as savers
from xc.comm.world import World
from xc.config import Config
from xc.data import augment
from xc.data import loader as data
from xc.gradients.allreduce import AllReduce
from xc.model import backbone as backbones
from xc.optim.schedule import Progress, Schedule

# Ranks, and how many of them hold one copy of the classifier. Of twelve two own no class.
GRIDS = [(1, 1), (2, 1), (3, 3), (4, 2), (12, 12)]


@pytest.mark.parametrize("head, grids", [
    ("full", GRIDS), ("knn", GRIDS), ("selective", GRIDS[::2])])
def test_any_world_reads_any_worlds(head, grids, tmp_path):
    for writers, width in grids:
        run = tmp_path / f"{writers}-{width}"
        run_ranks(writers, lambda w, run=run: save(w, run, head=head), width)
        folder = newest.to_resume("auto", run, World())
        for readers, reader_width in grids:
            assert_holds_what_was_saved(folder, readers, reader_width, head)


@pytest.mark.parametrize("worlds, batch, most", [
    ((1, 4, 2), 13, 13), ((3, 2, 4), 13, 52), ((4, 1, 3), 30, 60), ((2, 2, 2), 13, 52)])
def test_every_example_is_seen_once_an_epoch_whoever_goes_on(worlds, batch, most, tiny_packs, tmp_path):
    """From one world to another in the midst of an epoch, twice; also while the batch grows."""
    cfg = Config(data=str(tiny_packs), out="x", epochs=5.0, global_batch=batch, warmup="0.5epochs", augment=0.0,
                 **({"schedule": "fccs", "max_batch": most, "fccs_hold": "10%"} if most > batch else {}))
    split = data.open_splits(cfg)["train"]
    images = augment.prepared(split.examples(range(len(split)))[0])
    record_of = {image.numpy().tobytes(): record for record, image in enumerate(images)}
    assert len(record_of) == len(split) == 120

    def part(world, num_steps):
        """Some steps from the last checkpoint on: the records that this rank was given, by micro-batch."""
        schedule, state, position = Schedule.of(cfg, len(split), world.size), state_of(world, seed=1), Progress()
        if folder := newest.to_resume("auto", tmp_path, world):
            position = schedule.resume(checkpoint.load(folder, state, IDENTITY))
        queue, given = data.Loader(split, cfg, world).train(position.examples, schedule.examples, batch), []
        last = position.step + num_steps
        while position.examples < schedule.examples and position.step < last:
            now = schedule.plan(position)
            given += [[record_of[image.numpy().tobytes()] for image in images]
                      for images, _ in queue.take(now.micro_batches)]
            position = position.after(now)
        saver = savers.CheckpointWriter(tmp_path, world, IDENTITY, keep=1)
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


@pytest.mark.parametrize("readers", [1, 3, 4])
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
        state.exchange.before_last_backward(None)  # a step
        saver = savers.CheckpointWriter(tmp_path, world, IDENTITY, 2)
        saver.save(state, position(1))
        saver.finish()

    def read(world):
        state = of(world, 0)
        checkpoint.load(newest.to_resume("auto", tmp_path, world), state, IDENTITY)
        files = state.exchange.files()
        assert bool(files) == (world.size == 3)  # they still differ, and are kept so
        return state.backbone.norm.running_mean.clone(), state.backbone.norm.running_var.clone()

    run_ranks(3, write)
    for rank, (mean, var) in enumerate(run_ranks(readers, read)):
        assert torch.equal(mean, torch.tensor([1.0, 2.0, 5.0]) * (1 + rank if readers == 3 else 2))
        assert torch.equal(var, torch.full((3,), 7.0))


@pytest.mark.parametrize("readers", [1, 3])
def test_any_world_reads_the_moments_of_adamw(readers, tmp_path):
    """And then steps alike, bit for bit: the number of steps is among them."""
    def of(world, seed):
        state = state_of(world, seed)
        state.backbone_optimizer = torch.optim.AdamW(state.backbone.parameters(), 0.01, fused=True)
        return state

    def step(state, size):
        for p in state.backbone.parameters():
            p.grad = size * torch.linspace(-1, 2, p.numel()).view_as(p)
        state.backbone_optimizer.step()

    def write(world):
        state = of(world, 1)
        step(state, 1)
        step(state, 0.1)
        saver = savers.CheckpointWriter(tmp_path, world, IDENTITY, 2)
        saver.save(state, position(2))
        saver.finish(last=True)

    def read(world):
        state = of(world, 2)
        folder = newest.to_resume("auto", tmp_path, world)
        checkpoint.load(folder, state, IDENTITY)
        step(state, 3)
        other = state_of(world, 2)
        with pytest.raises(ValueError, match="--optimizer, --momentum and --freeze") as error:
            checkpoint.load(folder, other, IDENTITY)
        assert "\n" not in str(error.value)
        return state.backbone.state_dict()

    run_ranks(2, write)
    whole = of(World(), 1)
    for size in (1, 0.1, 3):
        step(whole, size)
    for found in run_ranks(readers, read):
        assert all(torch.equal(found[name], tensor) for name, tensor in whole.backbone.state_dict().items())


def test_checkpoints_with_the_old_names_of_resnets_load(tmp_path):
    """Weights, momentum and the statistics of each rank."""
    nets = [backbones.build("resnet18", (3, 16, 16), D, seed, World()) for seed in (1, 2)]

    def of(world, seed):
        state = state_of(world, 1)
        state.backbone = copy.deepcopy(nets[seed - 1])
        state.backbone_optimizer = torch.optim.SGD(state.backbone.parameters(), 0.1, 0.9)
        state.exchange = AllReduce(state.backbone, world)
        return state

    to_old = {f"0.{new}": f"0.{old}" for old, new in nets[0][0].old_names().items()}

    def old(tensors):
        split = {name: name.rsplit(".", 1) for name in tensors}
        return {f"{to_old.get(module, module)}.{leaf}": tensors[name] for name, (module, leaf) in split.items()}

    def tensors_of(state):
        momentum = {name: state.backbone_optimizer.state[p]["momentum_buffer"]
                    for name, p in state.backbone.named_parameters()}
        return [state.backbone.state_dict(), momentum]

    def write(world):
        state = of(world, 1)
        for p in state.backbone.parameters():
            p.grad = p.detach().clone()
        state.backbone_optimizer.step()
        state.exchange.before_last_backward(None)
        state.backbone[0].bn1.running_mean.fill_(world.rank)
        saver = savers.CheckpointWriter(tmp_path, world, IDENTITY, 2)
        saver.save(state, position(1))
        saver.finish(last=True)
        return tensors_of(state)

    def read(world):
        state = of(world, 2)
        checkpoint.load(folder, state, IDENTITY)
        return tensors_of(state)

    before = run_ranks(2, write)
    folder = newest.to_resume("auto", tmp_path, World())
    for path in [*folder.glob("b*.safetensors"), folder / "optimizer.safetensors"]:
        renamed = old(load_file(path))
        assert any(name.startswith("0.layers.") for name in renamed)
        save_file(renamed, path)
    for old_ones, new_ones in zip(before, run_ranks(2, read), strict=True):
        for old_one, new_one in zip(old_ones, new_ones, strict=True):
            assert old_one.keys() == new_one.keys()
            assert all(torch.equal(tensor, new_one[name]) for name, tensor in old_one.items())
