"""The full softmax against the dense single-process one, at any world; what holds for every head."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.support.worlds import run_ranks
from xc.config import Config
from xc.model.head import initial_rows
from xc.model.head_table import HEADS
from xc.optim.optimizers import RowSGD

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
        return head.label_places(features[part.first : part.last], labels[part.first : part.last])

    assert torch.cat(run_ranks(world_size, body, model_parallel_size)).tolist() == expected.tolist()


def test_of_equal_scores_the_lower_id_wins():
    def body(world):
        head = HEADS["full"](4, 2, world, dtype=torch.float64)
        head.weight[:] = torch.tensor([1.0, 0.0])
        features = torch.tensor([[1.0, 0.0]] * 4, dtype=torch.float64)
        return head.label_places(features, torch.arange(4)).tolist()

    assert run_ranks(2, body) == [[0, 1, 2, 3]] * 2


def of_name(name, num_classes, world, dtype=torch.float64):
    """A head as train.py makes it, half of the classes active where it leaves some out."""
    cfg = Config(data="d", out="o", head=name, feature_dim=D, seed=SEED, global_batch=G, near_share=0.5,
                 active_classes=min(num_classes, max(G, num_classes // 2)), repetitions=2, graph="exact")
    head = HEADS[name]
    return head(num_classes, D, world, seed=SEED, dtype=dtype, **head.settings(cfg, num_classes))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
@pytest.mark.parametrize("num_classes", [2, 5, 37])
def test_contract(name, world_size, model_parallel_size, num_classes):
    """What train.py relies on: five steps, the graph or index built before the third."""
    if name == "mach" and num_classes < 4:
        pytest.skip("fewer than two buckets each")

    def body(world):
        head = of_name(name, num_classes, world)
        optimizer = RowSGD(head, 0.9, 0.01)
        optimizer.param_groups[0]["lr"] = 0.5
        features, labels = examples(num_classes)
        part = Shard.of(G, world.size, world.rank)
        losses, labels_here = [], labels[head.shard.owns(labels)] - head.shard.first
        for step in range(5):
            head.refresh(step, due=step == 2)
            head.select(labels[part.first : part.last], step)
            mine = features[part.first : part.last].clone().requires_grad_()
            loss = head(mine, labels[part.first : part.last], G)
            loss.backward()
            head.reduce()
            assert head.row_grad.shape == (head.num_active, head.weight.shape[1])
            assert torch.isfinite(head.row_grad).all() and torch.isfinite(mine.grad).all()
            if head.active is not None:
                assert (head.active.diff() > 0).all() and torch.isin(labels_here, head.active).all()
                assert len(head.active) == 0 or 0 <= head.active[0] <= head.active[-1] < len(head.weight)
                if head.offset is not None:
                    assert (head.offset[torch.isin(head.active, labels_here)] == 0).all()
            optimizer.step()
            head.zero_grad()
            losses.append(loss.item())
        found = head.audit(mine.detach(), labels[part.first : part.last])
        assert 0 < found["active"] <= max(num_classes, 2 * head.num_rows)
        places = head.label_places(features[part.first : part.last], labels[part.first : part.last])
        assert ((places >= 0) & (places < num_classes)).all()
        return losses, head.weight

    ranks = run_ranks(world_size, body, model_parallel_size)
    assert all(losses == ranks[0][0] for losses, _ in ranks)  # bit for bit the same on all ranks
    assert ranks[0][0][-1] < ranks[0][0][0]
    for rank, (_, weight) in enumerate(ranks):  # copies of a shard stay the same
        assert torch.equal(weight, ranks[rank % model_parallel_size][1])


@pytest.mark.parametrize("name", HEADS)
def test_same_seed_same_numbers(name):
    def body(world, seed_of_step):
        head = of_name(name, 37, world)
        features, labels = examples(37)
        head.select(labels, seed_of_step)
        return head(features.requires_grad_(), labels, G).item()

    first, again, other = (run_ranks(1, lambda w, step=step: body(w, step))[0] for step in (4, 4, 5))
    assert first == again
    assert (first != other) == (name in ("knn", "sampled", "selective"))  # random classes are drawn anew each step


def test_initial_rows_do_not_depend_on_the_shard():
    whole = initial_rows(Shard(0, 10000), 3, 1)
    assert torch.equal(torch.cat([initial_rows(Shard.of(10000, 7, r), 3, 1) for r in range(7)]), whole)
    of_seeds = torch.stack([initial_rows(Shard(0, 5000), 3, seed)[[0, 4999], 0] for seed in range(20)])
    assert len(of_seeds.flatten().unique()) == 40  # no two seeds, nor blocks, begin alike
