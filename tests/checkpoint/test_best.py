"""The checkpoint that test is evaluated with: all ranks find the same one, or hear the same reason."""

import pytest
import torch

from tests.support.checkpoints import IDENTITY, C, everything, save, state_of
from tests.support.worlds import run_ranks
from xc.checkpoint import layout
from xc.checkpoint import state as checkpoint
from xc.checkpoint.best import best_valid
from xc.errors import UserError

RANKS = [1, 2, 3]


def saved(run, top1_of):
    for step, top1 in top1_of.items():
        run_ranks(2, lambda world, step=step: save(world, run, step, keep_checkpoints=9, seed=1 + step % 2))
        if top1 is not None:
            layout.add_top1(folder(run, step), top1, "val")


def folder(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def found(run, ranks, split="val", most_steps=99):
    names = {one.name for one in run_ranks(ranks, lambda world: best_valid(run, split, most_steps, world))}
    assert len(names) == 1
    return int(names.pop()[5:])


@pytest.mark.parametrize("ranks", RANKS)
def test_the_highest_of_its_split_up_to_a_step(ranks, tmp_path):
    saved(tmp_path, {2: 0.5, 4: None, 5: 0.7, 7: None, 9: 0.7, 11: 0.9})
    layout.add_top1(folder(tmp_path, 4), 0.99, "test")
    assert found(tmp_path, ranks) == 11
    assert found(tmp_path, ranks, most_steps=10) == 5  # the first of equal ones
    assert found(tmp_path, ranks, most_steps=4) == 2
    assert found(tmp_path, ranks, split="test") == 4
    # Without a name: on the data of the last evaluation. A score on other data cannot be compared with it.
    assert layout.best_of(layout.folders(tmp_path / "checkpoints")) == folder(tmp_path, 11)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_checkpoint_of_code_that_knew_test_alone_was_evaluated_on_test(ranks, tmp_path):
    saved(tmp_path, {3: 0.5})
    meta = layout.read_meta(folder(tmp_path, 3))
    del meta["evaluated_on"]
    layout.write_meta(folder(tmp_path, 3), meta)
    assert found(tmp_path, ranks, split="test") == 3
    with pytest.raises(UserError, match="no checkpoint of .* was evaluated on val"):
        found(tmp_path, ranks)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name, text", [
    ("backbone.safetensors", "its checksum does not match"), ("meta.json", "is not a checkpoint")])
def test_what_is_damaged_is_named(ranks, name, text, tmp_path):
    saved(tmp_path, {2: 0.9, 5: 0.5})
    data = bytearray((folder(tmp_path, 2) / name).read_bytes())
    data[-3] ^= 255
    (folder(tmp_path, 2) / name).write_bytes(data)
    with pytest.raises(UserError, match=f"step-00000002.*{text}"):
        found(tmp_path, ranks)


@pytest.mark.parametrize("ranks", RANKS)
def test_nothing_but_the_weights_is_loaded(ranks, tmp_path):
    run_ranks(3, lambda world: save(world, tmp_path, 3, seed=1))

    def body(world):
        state, before, there = (state_of(world, seed) for seed in (2, 2, 1))
        checkpoint.load_weights(folder(tmp_path, 3), state, IDENTITY)
        for name, tensor in everything(state).items():
            is_weight = name == "weight" or name.startswith("net.")
            assert torch.equal(tensor, everything(there if is_weight else before)[name]), name
        assert len(state.head.weight) <= C and vars(state.losses).keys() == vars(before.losses).keys()

    run_ranks(ranks, body)


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_not_finite_is_named_on_all_ranks(ranks):
    def body(world):
        state = state_of(world, seed=1)
        state.head.weight[:] = 3e38  # whose sum is infinite
        assert checkpoint.not_finite(state, world) is None
        if world.rank == world.size - 1:
            state.head.weight[-1, 2] = torch.nan
        return checkpoint.not_finite(state, world), state.head.shard

    names, shards = zip(*run_ranks(ranks, body), strict=True)
    assert set(names) == {f"weight of {layout.rows_name(shards[-1].first, shards[-1].last)}"}
