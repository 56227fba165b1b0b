"""Heads that leave classes out: which are active, and what that does to the loss."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.heads import SEED, WORLDS, D, G, assert_like_dense, dense, examples, step, with_margin
from tests.support.worlds import run_ranks, write_files
from xc.comm.shard import Shard
from xc.comm.world import World
from xc.config import Config
from xc.errors import UserError
from xc.model.head_table import HEADS, build
from xc.model.initial_rows import initial_rows
from xc.model.knn import KnnHead, num_neighbors
from xc.model.sampled import budget

PARTIAL = ["knn", "sampled", "selective"]


def a_head(name, num_classes, world, active, **settings):
    if name == "knn":
        settings = {"num_neighbors": num_classes - 1, "near_share": 0.5, "graph": "exact"} | settings
    if name == "selective":
        settings = {"near_share": 0.5} | settings
    settings = {"seed": SEED, "dtype": torch.float64, "scale": 7.0} | settings
    kind = KnnHead if name == "knn" else HEADS[name]  # the choice by scores has its laws in test_scored.py
    return kind(num_classes, D, world, active_classes=active, **settings)


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("num_classes, sampling_correction", [(3, True), (10, False), (37, True), (37, False)])
@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
def test_all_classes_active_is_the_full_softmax(name, num_classes, sampling_correction, world_size,
                                                model_parallel_size):
    def body(world):
        head = a_head(name, num_classes, world, num_classes, sampling_correction=sampling_correction, logits_mb=1e-4)
        return *step(head), head.shard

    ranks = run_ranks(world_size, body, model_parallel_size)
    assert_like_dense(ranks, dense(num_classes, True, 7.0, "none", 0.0))


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("sampling_correction, margin, size", [
    (True, "none", 0.0), (False, "none", 0.0), (True, "arcface", 0.5)])
@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
def test_equals_the_dense_softmax_over_the_active_classes(name, sampling_correction, margin, size, world_size,
                                                          model_parallel_size):
    num_classes, active = 61, 23

    def body(world):
        head = a_head(name, num_classes, world, active, sampling_correction=sampling_correction, margin=margin,
                      margin_size=size)
        loss, feature_grad, row_grad = step(head)
        offset = torch.zeros(len(head.selection.active)) if head.selection.offset is None else head.selection.offset
        return loss, feature_grad, row_grad, head.selection.active + head.shard.first, offset

    ranks = run_ranks(world_size, body, model_parallel_size)
    copy = ranks[: model_parallel_size]
    active = torch.cat([r[3] for r in copy])
    features, labels = examples(num_classes)
    features.requires_grad_()
    rows = initial_rows(Shard(0, num_classes), D, SEED, torch.float64)[active].requires_grad_()
    column = (active == labels[:, None]).double().argmax(1)
    cos = with_margin(F.normalize(features) @ F.normalize(rows).T, F.one_hot(column, len(active)).bool(), margin, size)
    loss = F.cross_entropy(7.0 * cos + torch.cat([r[4] for r in copy]), column)
    loss.backward()
    torch.testing.assert_close(ranks[0][0], loss.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), features.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat([r[2] for r in copy]), rows.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PARTIAL)
def test_copies_of_the_classifier_choose_alike(name):
    """Four ranks with two copies of two shards give the numbers of two ranks with one copy."""
    def body(world):
        head = a_head(name, 61, world, 23)
        loss, _, row_grad = step(head)
        return loss, row_grad, head.selection.active

    for one, two in zip(run_ranks(2, body) * 2, run_ranks(4, body, 2), strict=True):
        assert torch.equal(one[2], two[2])
        torch.testing.assert_close(one[:2], two[:2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PARTIAL)
@pytest.mark.parametrize("world_size", [1, 3])
def test_corrected_partition_function_averages_to_the_full_one(name, world_size):
    num_classes, draws = 61, 600
    features, labels = examples(num_classes)
    logits = 7.0 * F.normalize(features) @ F.normalize(initial_rows(Shard(0, num_classes), D, SEED, torch.float64)).T
    full = logits.exp().sum(1)

    def body(world):
        head = a_head(name, num_classes, world, 25)
        step(head)
        candidates = head.candidates(labels) if name != "selective" else head._search(F.normalize(features), labels)
        sums = []
        for at in range(draws):
            head.selection = head.choose(labels, at, *candidates)
            assert len(head.selection.active) == max(head.quota, len(torch.unique(labels[head.shard.owns(labels)])) + 1)
            sums.append((logits[:, head.selection.active + head.shard.first] + head.selection.offset).exp().sum(1))
        return torch.stack(sums)

    sums = sum(run_ranks(world_size, body))  # (draws, G)
    error = (sums.mean(0) - full).abs()
    assert (error < 5 * sums.std(0) / draws**0.5 + 1e-9).all()
    assert (sums.std(0) > 1e-3 * full).all()  # or the average would prove nothing


@pytest.mark.parametrize("name", PARTIAL)
def test_without_the_sampling_correction_it_never_exceeds_the_full_loss(name):
    full = dense(61, True, 7.0, "none", 0.0)[0]
    for at in range(20):
        ranks = run_ranks(2, lambda w, at=at: step(a_head(name, 61, w, 23, sampling_correction=False), at))
        assert ranks[0][0] <= full


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_near_classes_by_best_place(world_size):
    """With room for some of the neighbours each shard takes its nearest, by places over all shards."""
    num_classes, share = 61, 0.4
    _, labels = examples(num_classes)
    rows = F.normalize(initial_rows(Shard(0, num_classes), D, SEED, torch.float64))
    similar = (rows @ rows.T).fill_diagonal_(-2)
    places = similar.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # [c, j]: place of j with c
    best = places[labels].amin(0)

    def body(world):
        head = a_head("knn", num_classes, world, 41, near_share=share)
        step(head)
        here = torch.arange(head.shard.first, head.shard.last)
        right = here[torch.isin(here, labels)] - head.shard.first
        room = int(share * (head.quota - len(right)))
        near = head._nearest(*head.candidates(labels), right, room, 1)
        assert torch.isin(torch.cat([right, near]), head.selection.active).all() and not torch.isin(near, right).any()
        others = here[~torch.isin(here, labels)]
        assert best[here[near]].tolist() == best[others].sort().values[:room].tolist()
        return room

    assert sum(run_ranks(world_size, body)) > 3


def test_of_one_place_each_class_has_its_turn():
    head = a_head("knn", 61, World(), 41)
    first = set()
    for at in range(200):
        candidates = torch.arange(10, 40)
        first.add(head._nearest(candidates, torch.zeros_like(candidates), candidates[:0], 1, at).item())
    assert len(first) > 25  # of 30 in 200 draws; by id it would be one


def test_quota_is_raised_for_right_classes():
    """All labels lie in the first of two shards, which has room for fewer."""
    def body(world, sampling_correction):
        head = HEADS["sampled"](40, D, world, active_classes=8, sampling_correction=sampling_correction)
        head.select(torch.arange(7)[world.rank :: 2], 0)
        return len(head.selection.active), head.quota

    assert run_ranks(2, lambda w: body(w, True)) == [(8, 4), (4, 4)]
    assert run_ranks(2, lambda w: body(w, False)) == [(7, 4), (4, 4)]


@pytest.mark.parametrize("world_size, model_parallel_size", [(1, 1), (3, 3), (4, 2)])
def test_selection_quality_counts_top_logits_and_the_gap(world_size, model_parallel_size):
    num_classes = 230
    features, labels = examples(num_classes)
    logits = 7.0 * F.normalize(features) @ F.normalize(initial_rows(Shard(0, num_classes), D, SEED, torch.float64)).T

    def body(world):
        head = a_head("knn", num_classes, world, 60, num_neighbors=20, logits_mb=1e-3)
        step(head)
        part = Shard.of(G, world.size, world.rank)
        found = head.selection_quality(features[part.first : part.last].detach(), labels[part.first : part.last])
        return found, head.selection.active + head.shard.first, head.selection.offset

    ranks = run_ranks(world_size, body, model_parallel_size)
    active, offset = (torch.cat([r[i] for r in ranks[:model_parallel_size]]) for i in (1, 2))
    covered = torch.isin(logits.topk(100).indices, active).double().mean().item()
    gap = ((logits[:, active] + offset).logsumexp(1) - logits.logsumexp(1)).mean().item()
    for found, *_ in ranks:
        assert found["active"] == found["active_per_example"] == len(active) == 60
        assert found["top100_covered"] == pytest.approx(covered, abs=1e-6)
        assert found["loss_gap"] == pytest.approx(gap, abs=1e-5)


@pytest.mark.parametrize("before, after", [(1, 3), (3, 2), (2, 2)])
def test_a_saved_graph_names_the_same_classes_to_any_ranks(before, after, tmp_path):
    _, labels = examples(61)

    def write(world):
        head = a_head("knn", 61, world, 30, num_neighbors=9)
        head.refresh(1, due=True)
        write_files(head, tmp_path)
        return near(head)

    def read(world):
        head = a_head("knn", 61, world, 30, num_neighbors=9)
        head.load(tmp_path)
        return near(head)

    def near(head):
        candidates, places = head.candidates(labels)
        return torch.stack([candidates + head.shard.first, places])

    def of_all(ranks):
        return sorted(zip(*torch.cat(ranks, 1).tolist(), strict=True))

    written = of_all(run_ranks(before, write))
    assert len(written) == 9 * G
    assert of_all(run_ranks(after, read)) == written


def test_with_sampling_correction_one_random_class_stays():
    head = a_head("knn", 61, World(), 30, near_share=1.0)
    step(head)
    assert (head.selection.offset > 0).sum() == 1


def settings(**flags):
    return Config(data="d", out="o", **flags)


@pytest.mark.parametrize("flags, text", [
    ({"active_classes": 1.5}, "--active-classes 1.5"),
    ({"active_classes": 100.0}, "can have 128 different"),
    ({"active_classes": 2000.0}, "more than the 1000 classes"),
    ({"active_classes": 0.05}, "is 50 of 1000 classes"),
])
def test_budgets_that_cannot_be(flags, text):
    with pytest.raises(UserError, match=text):
        budget(settings(head="knn", **flags), 1000)


def test_budget_and_neighbors():
    assert budget(settings(active_classes=0.07), 10000) == 700
    assert budget(settings(active_classes=0.2), 1001) == 201
    assert budget(settings(active_classes=1.0), 1001) == 1001
    assert budget(settings(active_classes=500.0), 1001) == 500
    assert num_neighbors(settings(neighbors=7), 1000) == 7
    assert 1 <= num_neighbors(settings(active_classes=1.0), 1000) < 1000
    with pytest.raises(UserError, match="at most 999"):
        num_neighbors(settings(neighbors=1000), 1000)


def test_a_flag_that_a_head_ignores_is_named(capsys):
    build(settings(head="sampled", neighbors=5, active_classes=128.0), 1000, World())
    assert "warning: --neighbors has no effect with --head sampled" in capsys.readouterr().err
    build(settings(head="knn", neighbors=5, active_classes=128.0), 1000, World())
    assert not capsys.readouterr().err
    build(settings(head="knn", select="labels", near_parts=2, active_classes=128.0), 1000, World())
    assert "warning: --near-parts has no effect with --select labels" in capsys.readouterr().err
