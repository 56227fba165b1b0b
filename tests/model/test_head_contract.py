"""What train.py relies on, of every head."""

import pytest
import torch

from tests.support.heads import WORLDS, G, examples, of_name
from tests.support.worlds import run_ranks
from xc.comm.shard import Shard
from xc.model.head_table import HEADS
from xc.optim.optimizers import RowSGD

NAMES = list(HEADS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("num_classes", [2, 37])  # of two classes some ranks own none
@pytest.mark.parametrize("world_size, model_parallel_size", WORLDS)
def test_contract(name, num_classes, world_size, model_parallel_size):
    """Five steps, the graph or index built before the third."""
    def body(world):
        head = of_name(name, num_classes, world)
        optimizer = RowSGD(head, 0.9)
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
            if head.selection.active is not None:
                assert (head.selection.active.diff() > 0).all() and torch.isin(labels_here, head.selection.active).all()
                active = head.selection.active
                assert len(active) == 0 or 0 <= active[0] <= active[-1] < len(head.weight)
                if head.selection.offset is not None:
                    assert (head.selection.offset[torch.isin(head.selection.active, labels_here)] == 0).all()
            optimizer.step()
            head.zero_grad()
            losses.append(loss.item())
        found = head.selection_quality(mine.detach(), labels[part.first : part.last])
        assert 0 < found["active"] <= num_classes
        places = head.num_scores_above_target(features[part.first : part.last], labels[part.first : part.last])
        assert ((places >= 0) & (places < num_classes)).all()
        return losses, head.weight

    ranks = run_ranks(world_size, body, model_parallel_size)
    assert all(losses == ranks[0][0] for losses, _ in ranks)  # bit for bit the same on all ranks
    assert ranks[0][0][-1] < ranks[0][0][0]
    for rank, (_, weight) in enumerate(ranks):  # copies of a shard stay the same
        assert torch.equal(weight, ranks[rank % model_parallel_size][1])


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_numbers(name):
    def body(world, seed_of_step):
        head = of_name(name, 37, world)
        features, labels = examples(37)
        head.select(labels, seed_of_step)
        return head(features.requires_grad_(), labels, G).item()

    first, again, other = (run_ranks(1, lambda w, step=step: body(w, step))[0] for step in (4, 4, 5))
    assert first == again
    assert (first != other) == (name in ("knn", "sampled", "selective"))  # random classes are drawn anew each step
