"""Every head against the dense single-process softmax, at any world."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.worlds import run_ranks
from xc.heads import HEADS
from xc.heads.base import initial_rows
from xc.optim import RowSGD
from xc.shard import Shard

D, G, SEED = 5, 11, 3
WORLDS = [(w, m) for w in (1, 2, 3, 4) for m in (1, 2, w) if w % m == 0]
MARGINS = [("none", 0.0), ("cosface", 0.35), ("arcface", 0.5)]


def examples(num_classes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(G, D, generator=generator)  # the same numbers in any dtype
    return features.to(dtype), torch.randint(num_classes, (G,), generator=generator)


def dense(num_classes, cosine, scale, margin, size, dtype=torch.float64):
    """(loss, feature gradient, row gradient) by plain torch, with the margins written out anew."""
    features, labels = examples(num_classes, dtype)
    features.requires_grad_()
    rows = initial_rows(Shard(0, num_classes), D, SEED, dtype).requires_grad_()
    if cosine:
        cos = F.normalize(features) @ F.normalize(rows).T
        right = F.one_hot(labels, num_classes).bool()
        if margin == "cosface":
            cos = torch.where(right, cos - size, cos)
        if margin == "arcface":
            angle = torch.acos(cos.clamp(-1 + 1e-12, 1 - 1e-12))
            over = angle + size > math.pi
            cos = torch.where(right, torch.where(over, cos - size * math.sin(size), torch.cos(angle + size)), cos)
        logits = scale * cos
    else:
        logits = features @ rows.T
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return loss.detach(), features.grad, rows.grad


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


@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
@pytest.mark.parametrize("num_classes", [1, 3, 10, 37])
@pytest.mark.parametrize("cosine, margin, size", [(False, "none", 0.0), *((True, *m) for m in MARGINS)])
@pytest.mark.parametrize("logits_mb", [64, 1e-4])  # one block, several blocks of classes
def test_equals_dense(world_size, model_parallel_size, num_classes, cosine, margin, size, logits_mb):
    settings = dict(cosine=cosine, scale=7.0, margin=margin, margin_size=size)
    loss, feature_grad, row_grad = dense(num_classes, cosine, 7.0, margin, size)
    ranks = run_ranks(world_size, lambda w: sharded(w, num_classes, logits_mb=logits_mb, **settings),
                      model_parallel_size)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), feature_grad, rtol=1e-10, atol=1e-12)
    for rank_loss, _, rank_row_grad, shard in ranks:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rank_row_grad, row_grad[shard.first : shard.last], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
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


def test_micro_batches_add_up():
    def body(world, cuts):
        head = HEADS["full"](10, D, world, seed=SEED, dtype=torch.float64)
        features, labels = examples(10)
        for first, last in zip([0, *cuts], [*cuts, G], strict=True):
            part = Shard.of(last - first, world.size, world.rank)
            own = slice(first + part.first, first + part.last)
            head(features[own].requires_grad_(), labels[own], G).backward()
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
        return head.label_places(features[part.first : part.last], labels[part.first : part.last])

    assert torch.cat(run_ranks(world_size, body, model_parallel_size)).tolist() == expected.tolist()


def test_of_equal_scores_the_lower_id_wins():
    def body(world):
        head = HEADS["full"](4, 2, world, dtype=torch.float64)
        head.weight[:] = torch.tensor([1.0, 0.0])
        features = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
        return head.label_places(features, torch.arange(4)).tolist()

    assert run_ranks(2, body) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_row_sgd_is_torch_sgd(weight_decay):
    def body(world):
        head = HEADS["full"](10, D, world, seed=SEED)
        mine, theirs = head.weight, head.weight.clone().requires_grad_()
        optimizer = RowSGD(head, 0.9, weight_decay)
        reference = torch.optim.SGD([theirs], lr=0.3, momentum=0.9, weight_decay=weight_decay)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.3 / (1 + step)
            theirs.grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(step))
            head.row_grad.copy_(theirs.grad)
            optimizer.step()
            reference.step()
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-7)

    run_ranks(3, body)


def test_initial_rows_do_not_depend_on_the_shard():
    whole = initial_rows(Shard(0, 10000), 3, 1)
    assert torch.equal(torch.cat([initial_rows(Shard.of(10000, 7, r), 3, 1) for r in range(7)]), whole)
    assert not torch.equal(initial_rows(Shard(0, 10000), 3, 2), whole)
