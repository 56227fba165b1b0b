"""Rows in fewer bits: how far off they are, and that their sums are those of the rounded rows."""

import pytest
import torch

from tests.support.worlds import run_ranks
from xc.comm import short_rows
from xc.comm.groups import Group
from xc.comm.shard import Shard

ERRORS = {32: 0.0, 16: 2**-8, 8: 1 / 254}  # of a row's largest number; bfloat16 has 8 bits
SIZES = [1, 2, 3, 7]


def rows_of(rank, count, dim=11):
    rows = torch.randn(count, dim, generator=torch.Generator().manual_seed(rank))
    rows *= 10.0 ** torch.randint(-6, 3, (count, 1), generator=torch.Generator().manual_seed(rank))
    rows[:1] = 0.0
    return rows


def bound(rows, bits):
    return 1.001 * ERRORS[bits] * rows.abs().amax(1, keepdim=True) + (2e-6 if bits == 16 else 0)  # float16 ends there


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", ERRORS)
def test_gathered_rows(size, bits):
    counts = [len(Shard.of(20, size, rank)) for rank in range(size)]
    whole = torch.cat([rows_of(rank, count) for rank, count in enumerate(counts)])
    found = run_ranks(size, lambda world: short_rows.gather_async(
        rows_of(world.rank, counts[world.rank]), world.all_ranks, counts, bits)())
    for gathered in found:
        assert torch.equal(gathered, found[0]) and ((gathered - whole).abs() <= bound(whole, bits)).all()
        assert gathered[0].abs().sum() == 0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bits", ERRORS)
def test_summed_rows(size, bits):
    counts = [len(Shard.of(20, size, rank)) for rank in range(size)]
    given = [rows_of(rank, 20) for rank in range(size)]
    found = run_ranks(size, lambda world: short_rows.reduce_scatter_async(
        given[world.rank].clone(), world.all_ranks, counts, bits)())
    error = (torch.cat(found) - sum(rows.double() for rows in given)).abs()
    assert (error <= sum(bound(rows, bits) for rows in given) + 1e-6 * sum(rows.abs() for rows in given)).all()


@pytest.mark.parametrize("bits", ERRORS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bits, bad):
    """It must reach the loss, which ends the run."""
    rows = rows_of(0, 3)
    rows[1, 4] = bad
    for of_rows in (short_rows.gather_async, short_rows.reduce_scatter_async):
        found = of_rows(rows, Group(), [3], bits)()
        assert not found[1].isfinite().all() and found[[0, 2]].isfinite().all()
