"""The row optimizer: torch's SGD where all rows are active, lazy elsewhere, unbiased in 16 bit."""

import pytest
import torch

from tests.worlds import run_ranks
from xc.heads import HEADS
from xc.optim import RowSGD
from xc.world import World

D = 5


def with_active(head, active, grad):
    head.active, head.row_grad = active, grad
    return head


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("listed", [False, True])  # all rows active: unsaid, or as a list of them
def test_all_rows_active_is_torch_sgd(weight_decay, momentum, listed):
    def body(world):
        head = HEADS["full"](10, D, world)
        mine, theirs = head.weight, head.weight.clone().requires_grad_()
        optimizer = RowSGD(head, momentum, weight_decay)
        reference = torch.optim.SGD([theirs], lr=0.3, momentum=momentum, weight_decay=weight_decay)
        for step in range(4):
            optimizer.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = 0.3 / (1 + step)
            theirs.grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(step))
            with_active(head, torch.arange(len(mine)) if listed else None, theirs.grad.clone())
            optimizer.step()
            reference.step()
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-6, atol=1e-7)

    run_ranks(3, body)


@pytest.mark.parametrize("block_bytes", [1, 100, 2**22])
def test_a_row_knows_only_the_steps_in_which_it_was_active(block_bytes, monkeypatch):
    monkeypatch.setattr("xc.optim._BLOCK_BYTES", block_bytes)
    head = HEADS["full"](23, D, World(), dtype=torch.float64)
    optimizer = RowSGD(head, 0.9, 0.01)
    optimizer.param_groups[0]["lr"] = 0.3
    rows = [row.clone().requires_grad_() for row in head.weight]
    references = [torch.optim.SGD([row], lr=0.3, momentum=0.9, weight_decay=0.01) for row in rows]
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        before = head.weight.clone()
        active = (torch.rand(23, generator=generator) < 0.4).nonzero().squeeze(1)
        grad = torch.randn(len(active), D, generator=generator, dtype=torch.float64)
        for i, row in enumerate(active.tolist()):
            rows[row].grad = grad[i].clone()
            references[row].step()
        with_active(head, active, grad)
        optimizer.step()
        idle = torch.ones(23, dtype=torch.bool).index_fill_(0, active, False)
        assert torch.equal(head.weight[idle], before[idle])
    torch.testing.assert_close(head.weight, torch.stack(rows).detach(), rtol=1e-12, atol=1e-14)


def test_no_momentum_needs_no_memory():
    head = HEADS["full"](10, D, World())
    assert RowSGD(head, 0.0, 0.0).momentum_rows.numel() == 0


def test_rounding_is_right_on_average_and_to_a_neighbour():
    values = torch.tensor([1.0, -1.0, 1.003, -1.003, 1e-30, 3.1415926, -65000.3, 0.0])
    head = HEADS["full"](1, D, World(), dtype=torch.bfloat16)
    optimizer = RowSGD(head, 0.0, 0.0)
    optimizer._random = None
    rounded = optimizer._rounded(values.repeat(20_000, 1).clone()).double()
    spacing = values.double().abs() * 2**-7
    assert ((rounded - values).abs() <= spacing).all()
    deviation = (rounded.mean(0) - values).abs()
    assert (deviation <= 5 * spacing / 20_000**0.5 + 1e-40).all(), deviation
    exact = values.bfloat16().float() == values
    assert (rounded[:, exact] == values[exact]).all()


def test_steps_too_small_for_bfloat16_are_not_lost():
    def drift(world):
        head = HEADS["full"](400, 16, world, dtype=torch.bfloat16)
        head.weight.fill_(1.0)  # where bfloat16 numbers are 1/128 apart
        optimizer = RowSGD(head, 0.0, 0.0)
        optimizer.param_groups[0]["lr"] = 1.0
        for step in range(100):
            head.step = step
            with_active(head, None, torch.full((len(head.weight), 16), -1e-3))
            optimizer.step()
        return head.weight.float()

    one, again = run_ranks(1, drift)[0], run_ranks(1, drift)[0]
    assert torch.equal(one, again)
    assert one.mean().item() == pytest.approx(1.1, abs=2e-3)
    copies = run_ranks(4, drift, 2)  # ranks 0 and 2 hold the same shard
    assert torch.equal(copies[0], copies[2]) and torch.equal(copies[1], copies[3])


def test_bfloat16_rows_follow_float32_rows():
    ends = []
    for dtype in torch.float32, torch.bfloat16:
        head = HEADS["full"](500, 16, World(), dtype=dtype)
        optimizer = RowSGD(head, 0.9, 0.01)
        optimizer.param_groups[0]["lr"] = 0.05
        generator = torch.Generator().manual_seed(0)
        for head.step in range(30):
            active = (torch.rand(500, generator=generator) < 0.5).nonzero().squeeze(1)
            with_active(head, active, torch.randn(len(active), 16, generator=generator))
            optimizer.step()
        ends.append(head.weight.float())
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[0].norm()
