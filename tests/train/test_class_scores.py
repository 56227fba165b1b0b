"""Accuracy by class against a count by hand, the same on any number of ranks."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.comm.world import World
from xc.data import evaluated
from xc.model.head_table import HEADS
from xc.train.class_scores import FREQUENCIES, ClassScores, frequencies_of
from xc.train.evaluate import evaluate

C, D, G = 23, 5, 7
# Images of each class in train: both ends of every frequency, and classes that train has none of.
IN_TRAIN = np.array([0, 1, 2, 9, 10, 99, 100, 10**6, 0, 3, 50, 1, 7, 300, 0, 1, 12, 5, 1, 0, 101, 98, 11])
BOUNDS = {"0": (0, 0), "1": (1, 1), "2-9": (2, 9), "10-99": (10, 99), "100+": (100, 10**9)}
TRAIN = SimpleNamespace(class_counts=lambda first, last: IN_TRAIN[first:last], num_classes=C)


def examples(num, seed):
    """Features near the class rows, in part, and labels; some classes have many examples and most have few or none."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(num, generator=generator) ** 2 * C).long()
    rows = HEADS["full"](C, D, World(), seed=5).weight
    return rows[labels] + 0.4 * torch.randn(num, D, generator=generator), labels


def scores(world, num, seed):
    features, labels = examples(num, seed)
    head = HEADS["full"](C, D, world, seed=5)
    batches = []
    for first in range(0, num, G):
        mine = Shard.of(min(G, num - first), world.size, world.rank)
        here = slice(first + mine.first, first + mine.last)
        batches.append((features[here], labels[here]))
    by_class = ClassScores(frequencies_of(TRAIN, head.shard), head)
    return evaluate(torch.nn.Identity(), head, batches, world, lambda: False, by_class)


@pytest.mark.parametrize("num, seed", [(1, 0), (20, 1), (65, 2), (200, 3)])
def test_scores_are_those_counted_by_hand(num, seed):
    features, labels = (part.numpy() for part in examples(num, seed))
    rows = HEADS["full"](C, D, World(), seed=5).weight
    unit = torch.nn.functional.normalize(rows).numpy()
    hits = (features / np.linalg.norm(features, axis=1, keepdims=True) @ unit.T).argmax(1) == labels
    (found,) = run_ranks(1, lambda world: scores(world, num, seed))
    assert num == 1 or 0 < hits.sum() < num
    assert found["examples"] == num and found["top1"] == hits.mean()
    assert found["classes"] == len(set(labels.tolist()))
    assert found["top1_class_mean"] == pytest.approx(np.mean([hits[labels == c].mean() for c in set(labels.tolist())]))
    for name, (least, most) in BOUNDS.items():
        of_these = (least <= IN_TRAIN[labels]) & (IN_TRAIN[labels] <= most)
        assert found["examples_by_frequency"].get(name, 0) == of_these.sum()
        assert (name in found["top1_by_frequency"]) == of_these.any()
        assert not of_these.any() or found["top1_by_frequency"][name] == hits[of_these].mean()


@pytest.mark.parametrize("ranks, width", [(2, 0), (3, 0), (4, 2), (3, 1), (29, 0)])
@pytest.mark.parametrize("num", [1, 65, 200])
def test_they_are_the_same_bit_for_bit_on_any_number_of_ranks(ranks, width, num):
    """With empty parts of a batch, copies of the classifier, and more ranks than classes."""
    (alone,) = run_ranks(1, lambda world: scores(world, num, 2))
    assert run_ranks(ranks, lambda world: scores(world, num, 2), width) == [alone] * ranks
    assert list(alone["top1_by_frequency"]) == list(alone["examples_by_frequency"])
    assert sum(alone["examples_by_frequency"].values()) == num  # no example is dropped
    hits = [alone["top1_by_frequency"][name] * n for name, n in alone["examples_by_frequency"].items()]
    assert sum(hits) == pytest.approx(alone["top1"] * num)


def test_no_example_has_no_scores_to_divide():
    (found,) = run_ranks(1, lambda world: scores(world, 0, 2))
    assert found["examples"] == found["classes"] == found["top1_class_mean"] == 0
    assert found["top1_by_frequency"] == found["examples_by_frequency"] == {}


@pytest.mark.parametrize("block", [1, 5, 23, 2**20])
@pytest.mark.parametrize("parts", [1, 3, 29])
def test_frequencies_do_not_depend_on_how_the_counts_are_read(block, parts, monkeypatch):
    monkeypatch.setattr(evaluated, "_BLOCK", block)
    found = np.concatenate([frequencies_of(TRAIN, Shard.of(C, parts, part)) for part in range(parts)])
    for count, place in zip(IN_TRAIN, found, strict=True):
        least, most = BOUNDS[FREQUENCIES[place]]
        assert least <= count <= most


@pytest.mark.parametrize("block", [1, 5, 2**20])
def test_classes_that_train_has_no_image_of(block, monkeypatch):
    monkeypatch.setattr(evaluated, "_BLOCK", block)
    for seed in range(9):
        counts = np.random.default_rng(seed).integers(0, 2, C)
        split = SimpleNamespace(class_counts=lambda first, last, counts=counts: counts[first:last])
        found = evaluated.classes_without_images(TRAIN, split)
        assert found.tolist() == [c for c in range(C) if counts[c] and not IN_TRAIN[c]]
