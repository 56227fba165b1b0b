"""MACH against dense softmaxes over buckets."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.heads import SEED, WORLDS, D, G, examples
from tests.support.worlds import run_ranks
from xc.heads import HEADS
from xc.shard import Shard
from xc.world import World


@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
@pytest.mark.parametrize("num_classes, buckets", [(37, 6), (5, 3)])
def test_mach_equals_dense(world_size, model_parallel_size, num_classes, buckets):
    """R softmaxes over buckets, their mean loss, and prediction by the mean of the buckets' probabilities."""
    features, labels = examples(num_classes)
    alone = HEADS["mach"](num_classes, D, World(), buckets=buckets, repetitions=3, seed=SEED, dtype=torch.float64,
                             scale=3.0)
    hashed = alone.buckets(torch.arange(num_classes))  # (R, C)
    assert hashed.shape == (3, num_classes) and len({tuple(h) for h in hashed.tolist()}) == 3
    rows = alone.weight.clone().requires_grad_()
    mine = features.clone().requires_grad_()
    logits = [3 * F.normalize(mine) @ F.normalize(part).T for part in rows.split(D, 1)]
    losses = [F.cross_entropy(z, h[labels]) for z, h in zip(logits, hashed, strict=True)]
    torch.stack(losses).mean().backward()
    scores = sum(z.softmax(1)[:, h] for z, h in zip(logits, hashed, strict=True)).detach()
    right = scores.gather(1, labels[:, None])
    ids = torch.arange(num_classes)
    expected = ((scores > right) | ((scores == right) & (ids < labels[:, None]))).sum(1)

    def body(world):
        head = HEADS["mach"](num_classes, D, world, buckets=buckets, repetitions=3, seed=SEED, dtype=torch.float64,
                             scale=3.0)
        part = Shard.of(G, world.size, world.rank)
        own = features[part.first : part.last].requires_grad_()
        loss = head(own, labels[part.first : part.last], G)
        loss.backward()
        head.reduce()
        places = head.label_places(features[part.first : part.last].detach(), labels[part.first : part.last])
        return loss.detach(), own.grad, head.row_grad, head.shard, places

    ranks = run_ranks(world_size, body, model_parallel_size)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), mine.grad, rtol=1e-9, atol=1e-12)
    assert torch.cat([r[4] for r in ranks]).tolist() == expected.tolist()
    for loss, _, row_grad, shard, _ in ranks:
        torch.testing.assert_close(loss, torch.stack(losses).mean().detach(), rtol=1e-10, atol=1e-12)
        # the rows' gradient is that of their own softmax, not of the mean over R
        torch.testing.assert_close(row_grad, 3 * rows.grad[shard.first : shard.last], rtol=1e-9, atol=1e-12)
