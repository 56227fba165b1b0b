"""Synthetic classes: numbers of (seed, id) alone, near neighbours, balance, the best possible score."""

import dataclasses
import json
import resource
import sys
import time

import numpy as np
import pytest
import torch

from tests.support.launch import run
from tests.support.worlds import run_ranks
from xc.comm.world import World
from xc.config import Config
from xc.data import synthetic as synth
from xc.data.hashing import keys_of
from xc.data.loader import Loader, open_splits
from xc.data.synthetic import Spec
from xc.errors import UserError
from xc.model import backbone

CFG = Config(data="x", out="x", loader_threads=2)


def splits(data, **changes):
    return open_splits(dataclasses.replace(CFG, data=data, **changes))


def batches(world, data, split="train", **changes):
    cfg = dataclasses.replace(CFG, data=data, **changes)
    loader = Loader(open_splits(cfg)[split], cfg, world)
    if split != "train":
        return list(loader.test(13))
    queue = loader.train(26, 26 + 39, 13)
    return [part for [part] in iter(lambda: queue.take(1), [])]


@pytest.mark.parametrize("world_size", [1, 2, 3, 14])
@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("kind", ["", ",images=1"])
def test_batches_depend_on_neither_ranks_nor_threads(world_size, split, kind):
    data = "synth:classes=21,test=30,val=31,examples=2" + kind
    (alone,) = run_ranks(1, lambda w: batches(w, data, split, loader_threads=1))
    ranks = run_ranks(world_size, lambda w: batches(w, data, split))
    assert {len(r) for r in ranks} == {len(alone)} == {3}
    for step, (inputs, labels) in enumerate(alone):
        assert torch.equal(torch.cat([r[step][0] for r in ranks]), inputs)
        assert torch.equal(torch.cat([r[step][1] for r in ranks]), labels)


@pytest.mark.parametrize("drawn", [0, 1, 8, 21])
@pytest.mark.parametrize("test, val", [(1, 22), (21, 20), (43, 64)])
def test_counts_of_classes_are_those_of_the_examples(test, val, drawn):
    found = splits(f"synth:classes=21,examples=3,test={test},val={val},drawn={drawn}")
    for name, split in found.items():
        counts = np.bincount(split.examples(np.arange(len(split)))[1], minlength=21)
        for first, last in (0, 21), (4, 17), (20, 21), (5, 5):
            assert np.array_equal(split.class_counts(first, last), counts[first:last]), name
    counts = found["train"].class_counts(0, 21)
    assert sorted(counts)[-(drawn or 21) :] == [3] * (drawn or 21) and sum(counts) == len(found["train"])
    assert found["train"].names.class_names(2, 5) == ["2", "3", "4"]


def test_drawn_classes_are_scattered_and_the_same_in_every_split():
    found = splits("synth:classes=1000000,drawn=50,examples=2,test=200,val=100")
    labels = {name: set(split.examples(np.arange(len(split)))[1].tolist()) for name, split in found.items()}
    assert labels["train"] == labels["test"] == labels["val"] and len(labels["train"]) == 50
    assert len({label // 50_000 for label in labels["train"]}) > 12  # of 20 twentieths; 50 random ones leave out 1 or 2
    plain = splits("synth:classes=1000000")["train"]
    assert plain.classes_digest == found["train"].classes_digest  # the classes themselves are the same
    assert np.array_equal(plain.prototypes([7, 999_999]), found["train"].prototypes([7, 999_999]))


def test_the_best_guess_is_among_the_classes_that_are_drawn():
    few = splits("synth:classes=100000,drawn=3,noise=1.2,test=200")["test"]
    assert synth.best_accuracy(few, 200)[0] == 1.0


def test_a_split_of_its_own_changes_no_other():
    plain, more = splits("synth:classes=21,test=30"), splits("synth:classes=21,test=30,val=9")
    assert list(plain) == ["train", "test"] and list(more) == ["train", "val", "test"]
    for name in plain:
        assert plain[name].classes_digest == more[name].classes_digest
        for one, other in zip(plain[name].examples(np.arange(9)), more[name].examples(np.arange(9)), strict=True):
            assert torch.equal(one, other)
    inputs = [split.examples(np.arange(9))[0] for split in more.values()]
    assert not any(torch.equal(inputs[a], inputs[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_the_seed_of_the_run_reorders_and_that_of_the_data_renews():
    train = splits("synth:classes=50")["train"]
    first, other = train.order(0).records(7, 50), train.order(1).records(7, 50)
    assert not np.array_equal(train.labels(first), train.labels(other))
    renewed = splits("synth:classes=50,seed=1")["train"]
    ids = np.arange(50)
    assert abs(np.corrcoef(train.prototypes(ids).ravel(), renewed.prototypes(ids).ravel())[0, 1]) < 0.1
    assert train.classes_digest != renewed.classes_digest
    assert train.classes_digest == splits("synth:classes=50,examples=3,test=7")["train"].classes_digest


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_a_prototype_depends_on_seed_and_id_alone(dim):
    both = splits(f"synth:classes=1000,dim={dim}")
    ids = np.random.default_rng(0).integers(0, 1000, 57)
    whole = both["train"].prototypes(np.arange(1000))
    assert whole.dtype == np.float32 and whole.shape == (1000, dim)
    assert np.array_equal(both["test"].prototypes(ids), whole[ids])
    assert all(np.array_equal(both["train"].prototypes(ids[[i]]), whole[ids[[i]]]) for i in range(57))


def test_siblings_are_nearer_than_strangers_and_ids_do_not_tell():
    train = splits("synth:classes=10000,levels=3,branching=10")["train"]
    ids = np.arange(10000)
    clusters = train.clusters(ids)
    assert (np.bincount(clusters) == 10).all() and np.array_equal(np.sort(train.clusters(ids, 0)), ids)
    points = train.prototypes(ids)
    order = np.argsort(clusters, kind="stable")

    def distance(places):
        return np.linalg.norm(points[order[places]] - points[order[places + 1]], axis=1).mean()

    sibling, cousin, stranger = (distance(np.arange(at, 9999, 100)) for at in (4, 9, 99))
    assert sibling < 0.8 * cousin < 0.8 * 0.9 * stranger
    assert abs(points.std() - 1) < 0.05
    assert (clusters[1:] == clusters[:-1]).mean() < 0.01  # 0.001 by chance


def test_mistakes_are_among_siblings():
    test = splits("synth:classes=2000,noise=1")["test"]
    inputs, labels = test.examples(np.arange(2000))
    guess = torch.cdist(inputs, test.means(np.arange(2000))).argmin(1)
    wrong = guess != labels
    assert wrong.sum() > 100
    assert (test.clusters(guess[wrong].numpy()) == test.clusters(labels[wrong].numpy())).mean() > 0.8


def test_gaussians():
    x = synth.gaussians(keys_of(3, 9, np.arange(20000)), 7)
    assert x.shape == (20000, 7) and np.isfinite(x).all()
    assert np.allclose(x.mean(0), 0, atol=0.03) and np.allclose(x.std(0), 1, atol=0.03)
    assert np.allclose((x**4).mean(0), 3, atol=0.25) and np.abs(x).max() > 4
    assert np.abs(np.corrcoef(x.T) - np.eye(7)).max() < 0.03  # columns
    assert abs(np.corrcoef(x[1:, 0], x[:-1, 0])[0, 1]) < 0.03  # neighbours
    assert abs(np.corrcoef(x[:, 0], synth.gaussians(keys_of(4, 9, np.arange(20000)), 7)[:, 0])[0, 1]) < 0.03


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_every_round_has_each_class_once_in_another_order(classes):
    for split in splits(f"synth:classes={classes}").values():
        rounds = split.labels(np.arange(3 * classes)).reshape(3, classes)
        assert all(np.array_equal(np.sort(labels), np.arange(classes)) for labels in rounds)
        assert classes < 16 or not np.array_equal(rounds[0], rounds[1])


def test_labels_of_a_batch_look_drawn_at_random():
    train = splits("synth:classes=1000003")["train"]
    counts = np.bincount(train.labels(np.arange(100000)) // 10001, minlength=100)
    assert ((counts - 1000) ** 2 / 1000).sum() < 160  # chi-square of 99 degrees: 142 once in 400 times


def test_a_hundred_million_classes_cost_no_memory():
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    both = splits("synth:classes=100000000,dim=128")
    records = both["train"].order(2**32 - 1).records(10**9 - 128, 128)
    inputs, labels = both["train"].examples(records)
    assert inputs.shape == (128, 128) and labels.unique().numel() == 128 and 0 <= labels.min() < labels.max() < 10**8
    assert time.thread_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB; a byte per class were 100,000


def test_best_accuracy_is_that_of_the_bayes_rule_and_falls_with_noise():
    found = []
    for noise in 0.3, 0.8, 1.5, 4:
        test = splits(f"synth:classes=300,dim=16,noise={noise}")["test"]
        inputs, labels = test.examples(np.arange(2000))
        likelihood = -torch.cdist(inputs.double(), test.means(np.arange(300)).double()).square() / (2 * noise**2)
        right = (likelihood.softmax(1).argmax(1) == labels).double()
        accuracy, error = synth.best_accuracy(test, 2000, block=77)
        assert accuracy == pytest.approx(right.mean().item())
        assert error == pytest.approx(right.std().item() / 2000**0.5, rel=0.01)
        found.append(accuracy)
    assert found == sorted(found, reverse=True) and found[0] > 0.95 > 0.3 > found[-1]


def test_noise_is_fresh_in_every_round_and_split():
    both = splits("synth:classes=40")
    noises = []
    for split in both.values():
        inputs, labels = split.examples(np.arange(120))
        noises.append((inputs - split.means(labels.numpy())) / split.spec.noise)
    noise = torch.cat(noises)
    assert abs(noise.std() - 1) < 0.02
    assert (torch.corrcoef(noise) - torch.eye(240)).abs().max() < 0.7


@pytest.mark.parametrize("spec, text", [
    ("", "'' is not known: give key=value of classes, dim"), ("dim=3", "give classes="),
    ("classes=0", "1 to 100000000"), ("classes=100000001", "1 to 100000000"), ("classes=ten", "classes=ten"),
    ("classes=10,classes=11", "twice"), ("classes=10,colour=1", "'colour' is not known"),
    ("classes=10,dim=0", "dim=0"), ("classes=10,noise=-1", "noise=-1.0"), ("classes=10,noise=nan", "noise=nan"),
    ("classes=10,spread=1.5", "above 0, at most 1"), ("classes=10,branching=1", "branching=1"),
    ("classes=100001,images=1", "with images, 1 to 100000"), ("classes=10,images=1,dim=60", "a square number"),
])
def test_a_bad_description_is_one_line(spec, text):
    with pytest.raises(UserError) as error:
        Spec.parse("synth:" + spec)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_synthetic_classes_take_no_sampler():
    with pytest.raises(UserError, match="--sampler sqrt is for packs"):
        open_splits(Config(data="synth:classes=10", out="x", sampler="sqrt"))


def test_no_test_split_where_none_is_wanted():
    assert set(splits("synth:classes=5,test=0")) == {"train"}


@pytest.mark.long
@pytest.mark.parametrize("data", ["synth:classes=40,test=200", "synth:classes=20,test=200,examples=20,images=1"])
def test_a_run_learns_them(data, tmp_path):
    process = run(sys.executable, "train.py", "--data", data, "--out", tmp_path / "run", "--epochs", 10, "--augment", 0,
                  "--global-batch", 20, "--feature-dim", 32, "--image-size", 16, "--device", "cpu")
    assert json.loads(process.stdout.splitlines()[-1])["top1"] > 0.75


def test_the_wrong_network_is_one_line():
    shape = splits("synth:classes=50")["train"].input_shape
    with pytest.raises(UserError, match="--backbone small takes images, but the data are vectors"):
        backbone.build("small", shape, 8, 0, World())
