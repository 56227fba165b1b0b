"""Nothing is left out or repeated, at any number of ranks; batches do not depend on threads; distortion is a function
of the example."""

import contextlib
import dataclasses
import math
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data_tools.pack
import xc.data
from tests.test_pack import weighted
from tests.worlds import run_ranks
from xc.config import Config, UserError
from xc.data import Loader, _uniform, augment, open_splits, prepared
from xc.world import World

CFG = Config(data="x", out="x", loader_threads=2, prefetch=2)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A folder of packs: train with 9, 1 and 4 images of three classes, test with one of each."""
    folder = tmp_path_factory.mktemp("uneven")
    for split, counts in ("train", (9, 1, 4)), ("test", (1, 1, 1)):
        for label, count in enumerate(counts):
            (folder / "tree" / split / str(label)).mkdir(parents=True)
            for i in range(count):
                pixels = np.full((4, 4), 16 * i + label, np.uint8)
                Image.fromarray(pixels).save(folder / "tree" / split / str(label) / f"{i}.png")
    data_tools.pack.main([str(folder / "tree"), str(folder / "packs"), "--workers", "0"])
    return folder / "packs"


def sampled(packs, sampler, num_ranks):
    """Inputs and labels of three epochs of the 14 images, in steps of 7 on some ranks."""
    splits = open_splits(dataclasses.replace(CFG, data=str(packs), sampler=sampler))
    ranks = run_ranks(num_ranks, lambda w: Loader(splits["train"], dataclasses.replace(CFG, augment=0), w)
                      .train(0, 42, 7).take(6))
    inputs, labels = (torch.cat([rank[step][i] for step in range(6) for rank in ranks]) for i in (0, 1))
    return inputs, labels


@pytest.mark.parametrize("sampler, shares", [("natural", [9, 1, 4]), ("balanced", [14 / 3] * 3),
                                             ("sqrt", [7, 7 / 3, 14 / 3])])
def test_samplers_take_classes_by_their_share(sampler, shares, uneven):
    inputs, labels = sampled(uneven, sampler, 1)
    for epoch in labels.reshape(3, 14):
        assert (abs(epoch.bincount() - torch.tensor(shares)) < 1).all()
    assert {len(inputs[labels == label].unique(dim=0)) for label in (0, 1, 2)} == {9, 1, 4}  # all images came
    for found in (sampled(uneven, sampler, num_ranks) for num_ranks in (3, 8)):
        assert torch.equal(found[0], inputs) and torch.equal(found[1], labels)


def test_the_weighted_sampler_takes_images_by_their_weight(uneven, tmp_path):
    packs = Path(shutil.copytree(uneven, tmp_path / "packs"))
    assert weighted(packs / "train") == 14  # the record's number; the test pack needs none
    split = open_splits(dataclasses.replace(CFG, data=str(packs), sampler="weighted"))["train"]
    pixels = prepared(split.examples(np.arange(14))[0])
    inputs, labels = sampled(packs, "weighted", 1)
    records = (inputs[:, None] == pixels).all(4).all(3).all(2).nonzero()[:, 1]
    for epoch in records.reshape(3, 14):
        assert (abs(epoch.bincount(minlength=14) - 14 * torch.arange(14) / 91) < 1).all()
    assert torch.equal(labels, split.examples(np.arange(14))[1][records])
    found = sampled(packs, "weighted", 3)
    assert torch.equal(found[0], inputs) and torch.equal(found[1], labels)


def test_weights_that_are_missing_or_nothing_are_refused(uneven, tmp_path):
    packs = Path(shutil.copytree(uneven, tmp_path / "packs"))
    cfg = dataclasses.replace(CFG, data=str(packs), sampler="weighted")
    with pytest.raises(UserError, match="--sampler weighted: .*train has no weights"):
        open_splits(cfg)
    weighted(packs / "train")
    (shard,) = (packs / "train").glob("shard-*")
    with h5py.File(shard, "r+") as file:
        file["weights"][...] = 0
    with pytest.raises(UserError, match="--sampler weighted: all weights of .*train are 0"):
        open_splits(cfg)["train"].order(0)


def batches(world, packs, cfg=CFG, split="train", num_parts=1):
    """The micro-batches of twelve steps of 39 or 13 examples, or the whole test split."""
    loader = Loader(packs[split], cfg, world)
    if split == "test":
        return list(loader.test(13))
    queue, taken = loader.train(26, 26 + 13 * 12, 13), []
    while step := queue.take(num_parts):
        taken += step
    return taken


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 14])
@pytest.mark.parametrize("split", ["train", "test"])
def test_ranks_share_the_global_batch(world_size, split, tiny_packs):
    packs = open_splits(dataclasses.replace(CFG, data=str(tiny_packs)))
    (alone,) = run_ranks(1, lambda w: batches(w, packs, split=split))
    ranks = run_ranks(world_size, lambda w: batches(w, packs, split=split))
    assert {len(r) for r in ranks} == {len(alone)}
    for step, (images, labels) in enumerate(alone):
        assert torch.equal(torch.cat([r[step][0] for r in ranks]), images)  # distortion included
        assert torch.equal(torch.cat([r[step][1] for r in ranks]), labels)
    if split == "train":  # micro-batches are the same examples in the same order
        for rank, parts in zip(ranks, run_ranks(world_size, lambda w: batches(w, packs, num_parts=3)), strict=True):
            assert all(torch.equal(a, b) for x, y in zip(rank, parts, strict=True) for a, b in zip(x, y, strict=True))
    if split == "test":
        found = torch.cat([labels for _, labels in alone])
        assert found.bincount().tolist() == [3] * 10


@pytest.mark.parametrize("piece", [1, 3 * 32 * 32])
def test_batches_are_distorted_in_pieces(piece, tiny_packs, monkeypatch):
    packs = open_splits(dataclasses.replace(CFG, data=str(tiny_packs)))
    (whole,) = run_ranks(1, lambda w: batches(w, packs))
    monkeypatch.setitem(xc.data.PIECE, "cpu", piece)
    (pieces,) = run_ranks(1, lambda w: batches(w, packs))
    assert all(torch.equal(a, b) for x, y in zip(whole, pieces, strict=True) for a, b in zip(x, y, strict=True))


def test_threads_change_nothing(tiny_packs):
    packs = open_splits(dataclasses.replace(CFG, data=str(tiny_packs)))
    (one,) = run_ranks(1, lambda w: batches(w, packs, dataclasses.replace(CFG, loader_threads=1, prefetch=1)))
    (many,) = run_ranks(1, lambda w: batches(w, packs, dataclasses.replace(CFG, loader_threads=4, prefetch=7)))
    assert all(torch.equal(a, b) for x, y in zip(one, many, strict=True) for a, b in zip(x, y, strict=True))


def test_what_goes_to_a_gpu_are_pixels(tiny_packs, monkeypatch):
    """Threads pin bytes, and numbers are made of them behind the copy. Here the copy goes nowhere."""
    packs = open_splits(dataclasses.replace(CFG, data=str(tiny_packs)))
    expected, world, pinned, to = batches(World(), packs), World(), [], torch.Tensor.to
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.dtype) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, *rest, **options: tensor.clone() if (
        device == world.device) else to(tensor, device, *rest, **options))
    world.device = torch.device("cuda")
    found = batches(world, packs)
    assert set(pinned) == {torch.uint8, torch.int64} and len(pinned) == 2 * len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_a_gpu_gets_the_same_batches(tiny_packs):
    packs = open_splits(dataclasses.replace(CFG, data=str(tiny_packs)))
    on_cpu, on_gpu = (batches(World(device), packs) for device in ("cpu", "cuda"))
    for ours, theirs in zip(on_cpu, on_gpu, strict=True):
        assert all(b.device.type == "cuda" for b in theirs) and torch.equal(ours[1], theirs[1].cpu())
        torch.testing.assert_close(theirs[0].cpu(), ours[0], atol=1e-4, rtol=0)  # distorted there


def test_augmentation_is_light_seeded_and_can_be_off(tiny_packs):
    packs = open_splits(dataclasses.replace(CFG, data=str(tiny_packs)))
    (plain,) = run_ranks(1, lambda w: batches(w, packs, dataclasses.replace(CFG, augment=0.0)))
    (light,) = run_ranks(1, lambda w: batches(w, packs))
    (other,) = run_ranks(1, lambda w: batches(w, packs, dataclasses.replace(CFG, seed=1)))
    assert not torch.equal(light[0][0], plain[0][0]) and not torch.equal(light[0][0], other[0][0])
    images = torch.randn(50, 1, 32, 32)
    torch.testing.assert_close(augment(images, 0, 1e-6, 0), images, atol=1e-3, rtol=0)
    again = augment(images[20:], 20, 1.0, 3)
    torch.testing.assert_close(augment(images, 0, 1.0, 3)[20:], again)


@pytest.mark.parametrize("shape", [(5, 3, 9, 9), (0, 1, 4, 4), (4, 6)])
def test_pixels_become_numbers_from_minus_one_to_one(shape):
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    assert torch.equal(prepared(pixels), pixels.float() / 127.5 - 1)
    numbers = torch.randn(shape)
    assert torch.equal(prepared(numbers.clone()), numbers)
    if len(shape) == 4:
        assert torch.equal(prepared(numbers.clone(), 11, 0.5, 3), augment(numbers, 11, 0.5, 3))
    else:
        assert torch.equal(prepared(numbers.clone(), 11, 0.5, 3), numbers)  # vectors are not distorted


@pytest.mark.parametrize("shape", [(5, 1, 32, 32), (3, 3, 9, 9), (0, 1, 8, 8)])
def test_augmentation_is_an_affine_map_a_blur_and_a_factor(shape):
    images = torch.randn(shape)
    u = torch.from_numpy(_uniform(9, 100, len(images), 6)).float() * 2 - 1
    turn, zoom = math.radians(8) * u[:, 3], 1 + 0.12 * u[:, 2]
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    theta = torch.stack([cos, -sin, 0.16 * u[:, 0], sin, cos, 0.16 * u[:, 1]], 1).reshape(-1, 2, 3)
    moved = images
    if len(images):
        grid = F.affine_grid(theta, shape, align_corners=False)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight, factor = (0.5 * u[:, 4]).clamp(0, 1), 1 + 0.3 * u[:, 5]
    expected = (moved + weight[:, None, None, None] * (soft - moved)) * factor[:, None, None, None]
    torch.testing.assert_close(augment(images, 100, 1.0, 9), expected, atol=1e-4, rtol=0)


def test_uniform_numbers():
    u = _uniform(3, 0, 20000, 6)
    assert u.min() >= 0 and u.max() < 1
    assert np.allclose(u.mean(0), 0.5, atol=0.01) and np.allclose(u.var(0), 1 / 12, atol=0.003)
    assert np.abs(np.corrcoef(u.T) - np.eye(6)).max() < 0.03  # columns
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.03  # neighbours
    assert abs(np.corrcoef(u[:, 0], _uniform(4, 0, 20000, 6)[:, 0])[0, 1]) < 0.03  # seeds


def test_an_undecodable_record_is_named(tiny_packs, monkeypatch):
    packs = open_splits(dataclasses.replace(CFG, data=str(tiny_packs)))
    monkeypatch.setattr(packs["train"].pack, "read", lambda records: ([b"junk"] * len(records), np.zeros(len(records))))
    with pytest.raises(ValueError, match=r"record \d+ of .*train"):
        run_ranks(1, lambda w: batches(w, packs))
