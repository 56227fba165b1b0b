"""LARS as published; the row optimizer: torch's SGD where all rows are active, lazy elsewhere, unbiased in 16 bit."""

import copy

import pytest
import torch
from torch import nn

from tests.support.worlds import run_ranks
from xc.comm.world import World
from xc.config import Config
from xc.gradients.dgc import Dgc
from xc.model.head import Selection
from xc.model.head_table import HEADS
from xc.optim.add_rows import add_rows
from xc.optim.optimizers import Lars, RowSGD, backbone_optimizer
from xc.optim.schedule import StepPlan

D = 5


def with_active(head, active, grad):
    head.selection, head.row_grad = Selection(active), grad
    return head


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("listed", [False, True])  # all rows active: unsaid, or as a list of them
def test_all_rows_active_is_torch_sgd(momentum, listed):
    def body(world):
        head = HEADS["full"](10, D, world)
        mine, theirs = head.weight, head.weight.clone().requires_grad_()
        optimizer = RowSGD(head, momentum)
        reference = torch.optim.SGD([theirs], lr=0.3, momentum=momentum)
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
    monkeypatch.setattr("xc.optim.optimizers._BLOCK_BYTES", block_bytes)
    head = HEADS["full"](23, D, World(), dtype=torch.float64)
    optimizer = RowSGD(head, 0.9)
    optimizer.param_groups[0]["lr"] = 0.3
    rows = [row.clone().requires_grad_() for row in head.weight]
    references = [torch.optim.SGD([row], lr=0.3, momentum=0.9) for row in rows]
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
    assert RowSGD(head, 0.0).momentum_rows.numel() == 0


def test_rounding_is_right_on_average_and_to_a_neighbour():
    values = torch.tensor([1.0, -1.0, 1.003, -1.003, 1e-30, 3.1415926, -65000.3, 0.0])
    head = HEADS["full"](1, D, World(), dtype=torch.bfloat16)
    optimizer = RowSGD(head, 0.0)
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
        optimizer = RowSGD(head, 0.0)
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
        optimizer = RowSGD(head, 0.9)
        optimizer.param_groups[0]["lr"] = 0.05
        generator = torch.Generator().manual_seed(0)
        for head.step in range(30):
            active = (torch.rand(500, generator=generator) < 0.5).nonzero().squeeze(1)
            with_active(head, active, torch.randn(len(active), 16, generator=generator))
            optimizer.step()
        ends.append(head.weight.float())
    assert (ends[0] - ends[1]).norm() < 0.02 * ends[0].norm()


# --- LARS ---

def lars(parameters, weight_decay=0.5, trust=0.1, momentum=0.9):
    """As `backbone_optimizer` makes it, with a trust that is seen in float32."""
    cfg = Config(data="d", out="o", optimizer="lars", lr=2.0, momentum=momentum, weight_decay=weight_decay)
    optimizer = backbone_optimizer(nn.ParameterList(parameters), cfg)
    optimizer.trust = trust
    return optimizer


def test_lars_by_hand():
    """|w| = 5, |g| = 10, β = 0.5: λ = 0.1 * 5 / (10 + 2.5) = 0.04, v = 2 * 0.04 (g + w / 2); then at half the rate."""
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = lars([weight, bias], momentum=0.9)
    weight.grad, bias.grad = torch.tensor([[6.0, -8.0]]), torch.tensor([6.0, -8.0])
    optimizer.step()
    first = torch.tensor([[0.08 * 7.5, 0.08 * -6.0]])
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 4.0]]) - first)
    torch.testing.assert_close(bias.detach(), torch.tensor([3.0 - 12.0, 4.0 + 16.0]))  # neither λ nor decay

    before, rate = weight.detach().clone(), 1.0
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = rate
    weight.grad, bias.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([0.0, 0.0])
    trust = 0.1 * before.norm() / (2.0 + 0.5 * before.norm())
    optimizer.step()
    second = 0.9 * first + rate * trust * (torch.tensor([[0.0, 2.0]]) + 0.5 * before)  # the first rate stays in v
    torch.testing.assert_close(weight.detach(), before - second)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


@pytest.mark.parametrize("weight, grad", [(0.0, 1.0), (1.0, 0.0)])
def test_lars_without_a_norm_is_sgd(weight, grad):
    parameter = nn.Parameter(torch.full((2, 3), weight))
    optimizer = lars([parameter], weight_decay=0.25)
    parameter.grad = torch.full((2, 3), grad)
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 3), weight - 2.0 * (grad + 0.25 * weight)))


def test_lars_moves_every_layer_alike():
    """Whatever the size of a gradient: by trust * rate of the weights' length."""
    weights = [nn.Parameter(torch.randn(5, n, generator=torch.Generator().manual_seed(n))) for n in (2, 3, 40)]
    optimizer = lars(weights, weight_decay=0.0)
    before = [w.detach().clone() for w in weights]
    for w, size in zip(weights, (1e-6, 1.0, 1e6), strict=True):
        w.grad = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)) * size
    optimizer.step()
    for w, old in zip(weights, before, strict=True):
        assert ((w.detach() - old).norm() / old.norm()).item() == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("size, density", [(1, 1.0), (3, 0.02)])
def test_lars_under_dgc_goes_about_as_far_as_without(size, density):
    """Gradients that are mostly noise, as they are late in a run: by about the same length in all."""
    start = nn.Linear(30, 7, bias=False)

    def walk(world, cfg, exchange_of):
        net = copy.deepcopy(start)
        exchange = exchange_of(net, world)
        optimizer = backbone_optimizer(net, cfg, keeps_momentum=exchange is not None)
        optimizer.trust = 1e-5
        for step in range(200):
            grad = torch.randn(7, 30, generator=torch.Generator().manual_seed(step))
            if exchange:
                exchange.before_last_backward(StepPlan(0.1, size, 1, density))
            else:
                optimizer.zero_grad()
            (net.weight * grad).sum().div(size if exchange else 1).backward()
            if exchange:
                exchange.reduce()
            optimizer.step()
            if exchange:
                exchange.zero_grad()
        return (net.weight.detach() - start.weight).norm().item()

    cfg = Config(data="d", out="o", optimizer="lars", lr=1.0, weight_decay=0.0, momentum=0.5)
    dense = walk(World(), cfg, lambda net, world: None)
    found = run_ranks(size, lambda w: walk(w, cfg, lambda net, world: Dgc(net, world, momentum=0.5)))
    assert len(set(found)) == 1
    assert (0.98 if density == 1 else 0.5) <= found[0] / dense <= 1.02  # what is sent is masked: it has less momentum


def test_the_optimizer_of_a_config():
    net = nn.Linear(2, 2)
    assert type(backbone_optimizer(net, Config(data="d", out="o", optimizer="sgd", lr=0.1))) is torch.optim.SGD
    assert type(backbone_optimizer(net, Config(data="d", out="o", optimizer="lars", lr=5.0))) is Lars
    assert type(backbone_optimizer(net, Config(data="d", out="o", optimizer="adamw"))) is torch.optim.AdamW


def test_adamw_by_hand():
    """The first step is the rate in the direction of the sign; matrices also shrink by rate times decay."""
    net = nn.Linear(3, 2)
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    cfg = Config(data="d", out="o", optimizer="adamw", lr=0.01, momentum=0.8, weight_decay=0.5)
    optimizer = backbone_optimizer(net, cfg)
    for p in net.parameters():
        p.grad = torch.full_like(p, -3.0)
    optimizer.step()
    torch.testing.assert_close(net.weight.detach(), weight * (1 - 0.01 * 0.5) + 0.01)
    torch.testing.assert_close(net.bias.detach(), bias + 0.01)
    torch.testing.assert_close(optimizer.state[net.bias]["exp_avg"], torch.full((2,), -3.0 * (1 - 0.8)))


def test_what_is_frozen_is_not_in_the_optimizer():
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    for name in "sgd", "lars", "adamw":
        groups = backbone_optimizer(net, Config(data="d", out="o", optimizer=name, lr=0.1)).param_groups
        assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in net[1].parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [0, 1, 7, 5000])
def test_rows_are_added_in_their_order(count, dtype):
    """Also where ids repeat: the same bits as one row after another."""
    generator = torch.Generator().manual_seed(count)
    table = torch.randn(40, 5, dtype=dtype, generator=generator)
    ids = torch.randint(40, (count,), generator=generator)
    rows = torch.randn(count, 5, dtype=dtype, generator=generator)
    expected = table.clone()
    for i, row in zip(ids.tolist(), rows, strict=True):
        expected[i] += row
    add_rows(table, ids, rows)
    assert torch.equal(table, expected)
