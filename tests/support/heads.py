"""Heads by name, a batch for them, and the dense softmax that they are compared to."""

import math

import torch
import torch.nn.functional as F

from xc.comm.shard import Shard
from xc.config import Config
from xc.model.head_table import HEADS
from xc.model.initial_rows import initial_rows

D, G, SEED = 5, 11, 3
# (ranks, ranks that together hold one copy of the classifier): one rank, shards, copies, copies of shards
WORLDS = [(1, 1), (2, 1), (3, 3), (4, 2)]


def examples(num_classes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(7)
    features = torch.randn(G, D, generator=generator)  # the same numbers in any dtype
    return features.to(dtype), torch.randint(num_classes, (G,), generator=generator)


def with_margin(cos, target, margin, size):
    """Cosines (G, C) with the margin of the target classes (G, C, bool), written out anew."""
    if margin == "cosface":
        return torch.where(target, cos - size, cos)
    if margin == "arcface":
        angle = torch.acos(cos.clamp(-1 + 1e-12, 1 - 1e-12))
        over = angle + size > math.pi
        return torch.where(target, torch.where(over, cos - size * math.sin(size), torch.cos(angle + size)), cos)
    return cos


def dense(num_classes, cosine, scale, margin, size, dtype=torch.float64):
    """(loss, feature gradient, row gradient) by plain torch."""
    features, labels = examples(num_classes, dtype)
    features.requires_grad_()
    rows = initial_rows(Shard(0, num_classes), D, SEED, dtype).requires_grad_()
    if cosine:
        cos = F.normalize(features) @ F.normalize(rows).T
        logits = scale * with_margin(cos, F.one_hot(labels, num_classes).bool(), margin, size)
    else:
        logits = features @ rows.T
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return loss.detach(), features.grad, rows.grad


def of_name(name, num_classes, world, dtype=torch.float64):
    """A head as train.py makes it, half of the classes active where it leaves some out."""
    cfg = Config(data="d", out="o", head=name, feature_dim=D, seed=SEED, global_batch=G, near_share=0.5,
                 active_classes=min(num_classes, max(G, num_classes // 2)), graph="exact")
    head = HEADS[name]
    return head(num_classes, D, world, seed=SEED, dtype=dtype, **head.settings(cfg, num_classes))


def step(head, at=1):
    """(loss, feature gradient of this rank, row gradient) of a step, with the graph or index built before it."""
    world = head.world
    features, labels = examples(head.num_classes)
    part = Shard.of(G, world.size, world.rank)
    mine = features[part.first : part.last].requires_grad_()
    head.refresh(at, due=True)
    head.select(labels[part.first : part.last], at)
    loss = head(mine, labels[part.first : part.last], G)
    loss.backward()
    head.reduce()
    return loss.detach(), mine.grad, head.row_grad


def assert_like_dense(ranks, expected):
    """ranks: (loss, feature gradient, row gradient, shard) of every rank."""
    loss, feature_grad, row_grad = expected
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), feature_grad, rtol=1e-10, atol=1e-12)
    for rank_loss, _, rank_row_grad, shard in ranks:
        torch.testing.assert_close(rank_loss, loss, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(rank_row_grad, row_grad[shard.first : shard.last], rtol=1e-10, atol=1e-12)
