"""The full softmax against the dense single-process one, on any ranks."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.heads import SEED, WORLDS, D, G, assert_like_dense, dense, examples
from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.model.head_table import HEADS
from xc.model.initial_rows import initial_rows, initial_rows_of

MARGINS = [("none", 0.0), ("cosface", 0.35), ("arcface", 0.5)]


def sharded(world, num_classes, dtype=torch.float64, **settings):
    """(loss, this rank's feature gradient, this rank's row gradient, its shard) of the full head."""
    head = HEADS["full"](num_classes, D, world, seed=SEED, dtype=dtype, **settings)
    features, labels = examples(num_classes, dtype)
    part = Shard.of(G, world.size, world.rank)
    features = features[part.first : part.last].requires_grad_()
    loss = head(features, labels[part.first : part.last], G)
    loss.backward()
    head.reduce()
    return loss.detach(), features.grad, head.row_grad, head.shard


@pytest.mark.parametrize("world_size, model_parallel_size", [*WORLDS, (2, 2), (4, 4)])
@pytest.mark.parametrize("num_classes, logits_mb", [
    (1, 64), (3, 64), (10, 1e-4), (37, 64), (37, 1e-4)])  # 1e-4: several blocks of classes
@pytest.mark.parametrize("cosine, margin, size", [(False, "none", 0.0), *((True, *m) for m in MARGINS)])
def test_equals_dense(world_size, model_parallel_size, num_classes, logits_mb, cosine, margin, size):
    settings = dict(cosine=cosine, scale=7.0, margin=margin, margin_size=size)
    ranks = run_ranks(world_size, lambda w: sharded(w, num_classes, logits_mb=logits_mb, **settings),
                      model_parallel_size)
    assert_like_dense(ranks, dense(num_classes, cosine, 7.0, margin, size))


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("margin, size", MARGINS)
def test_float32_equals_dense_float64(world_size, margin, size):
    loss, feature_grad, row_grad = dense(37, True, 20.0, margin, size)
    ranks = run_ranks(world_size, lambda w: sharded(
        w, 37, torch.float32, cosine=True, scale=20.0, margin=margin, margin_size=size))
    grad = torch.cat([r[1] for r in ranks]).double()
    rows = torch.cat([r[2] for r in ranks]).double()
    assert abs(ranks[0][0].double() - loss) < 1e-5 * abs(loss)
    # relative to the size of the whole: single entries are differences of nearly equal numbers
    assert (grad - feature_grad).norm() < 1e-5 * feature_grad.norm()
    assert (rows - row_grad).norm() < 1e-5 * row_grad.norm()


def test_huge_logits_stay_finite():
    def body(world):
        head = HEADS["full"](9, D, world, cosine=False, seed=SEED)
        features = torch.full((1, D), 1e4).requires_grad_()
        loss = head(features, torch.tensor([8]), world.size)
        loss.backward()
        return torch.isfinite(loss) and torch.isfinite(features.grad).all() and torch.isfinite(head.row_grad).all()

    assert all(run_ranks(3, body))


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("logits_mb", [0.0, 1e-4])  # all rows kept from one micro-batch to the next; one block of them
def test_micro_batches_add_up(cosine, logits_mb):
    def body(world, cuts):
        head = HEADS["full"](10, D, world, seed=SEED, dtype=torch.float64, cosine=cosine, logits_mb=logits_mb)
        features, labels = examples(10)
        for first, last in zip([0, *cuts], [*cuts, G], strict=True):
            part = Shard.of(last - first, world.size, world.rank)
            own = slice(first + part.first, first + part.last)
            head(features[own].requires_grad_(), labels[own], G, last=last == G).backward()
        return head.row_grad

    for whole, split in zip(run_ranks(2, lambda w: body(w, [])), run_ranks(2, lambda w: body(w, [4, 5])), strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
@pytest.mark.parametrize("num_classes", [1, 3, 37])
def test_label_places_are_exact(world_size, model_parallel_size, num_classes):
    features, labels = examples(num_classes)
    rows = initial_rows(Shard(0, num_classes), D, SEED, torch.float64)
    scores = F.normalize(features) @ F.normalize(rows).T
    order = scores.argsort(dim=1, descending=True, stable=True)  # stable: of equal scores the lower id first
    expected = (order == labels[:, None]).nonzero()[:, 1]

    def body(world):
        head = HEADS["full"](num_classes, D, world, seed=SEED, dtype=torch.float64, logits_mb=2e-4)
        part = Shard.of(G, world.size, world.rank)
        return head.num_scores_above_target(features[part.first : part.last], labels[part.first : part.last])

    assert torch.cat(run_ranks(world_size, body, model_parallel_size)).tolist() == expected.tolist()


def test_of_equal_scores_the_lower_id_wins():
    def body(world):
        head = HEADS["full"](4, 2, world, dtype=torch.float64)
        head.weight[:] = torch.tensor([1.0, 0.0])
        features = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
        return head.num_scores_above_target(features, torch.arange(4)).tolist()

    assert run_ranks(2, body) == [[0, 1, 2, 3]] * 2


def test_initial_rows_do_not_depend_on_the_shard():
    whole = initial_rows(Shard(0, 10000), 3, 1)
    assert torch.equal(torch.cat([initial_rows(Shard.of(10000, 7, r), 3, 1) for r in range(7)]), whole)
    some = torch.tensor([9999, 0, 4095, 4096, 5000, 0])
    assert torch.equal(initial_rows_of(some, 3, 1), whole[some]) and initial_rows_of(some[:0], 3, 1).shape == (0, 3)
    of_seeds = torch.stack([initial_rows(Shard(0, 5000), 3, seed)[[0, 4999], 0] for seed in range(20)])
    assert len(of_seeds.flatten().unique()) == 40  # no two seeds, nor blocks, begin alike
