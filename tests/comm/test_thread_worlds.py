"""The test double itself: it must fail where MPI would hang."""

import pytest
import torch

from tests.support.worlds import run_ranks


def test_a_collective_that_one_rank_skips_fails():
    with pytest.raises(AssertionError, match="disagree"):
        run_ranks(2, lambda w: w.all_ranks.all_reduce(torch.ones(2)) if w.rank else w.all_ranks.all_gather_object(1))


def test_shapes_and_dtypes_are_compared():
    with pytest.raises(AssertionError, match="disagree"):
        run_ranks(2, lambda w: w.all_ranks.all_reduce(torch.ones(1 + w.rank)))
    with pytest.raises(AssertionError, match="disagree"):
        run_ranks(2, lambda w: w.all_ranks.all_reduce(torch.ones(1, dtype=[torch.float32, torch.float64][w.rank])))


def test_shifts_and_pieces_are_checked():
    def ring(world, num_rows):
        return world.shards.shift_async(torch.full((world.rank, 2), world.rank), num_rows)().tolist()

    assert run_ranks(3, lambda w: ring(w, (w.rank - 1) % 3)) == [[[2, 2]] * 2, [], [[1, 1]]]
    with pytest.raises(AssertionError):
        run_ranks(3, lambda w: ring(w, w.rank))
    pieces = run_ranks(2, lambda w: w.shards.all_to_all(torch.arange(3) + 10 * w.rank, [1 + w.rank, 2 - w.rank]))
    assert [[p.tolist() for p in rank] for rank in pieces] == [[[0], [10, 11]], [[1, 2], [12]]]
    with pytest.raises(AssertionError):
        run_ranks(2, lambda w: w.shards.all_to_all(torch.arange(3), [1, 1]))


def test_the_error_of_one_rank_is_raised_and_ends_the_others():
    def body(world):
        if world.rank == 1:
            raise ZeroDivisionError
        world.all_ranks.all_reduce(torch.ones(1))

    with pytest.raises(ZeroDivisionError):
        run_ranks(3, body)


def test_grid_of_shards_and_replicas():
    grid = run_ranks(6, lambda w: (w.shards.rank, w.shards.size, w.replicas.rank, w.replicas.size), 2)
    assert grid == [(0, 2, 0, 3), (1, 2, 0, 3), (0, 2, 1, 3), (1, 2, 1, 3), (0, 2, 2, 3), (1, 2, 2, 3)]
    sums = run_ranks(6, lambda w: (w.shards.all_reduce(torch.tensor([w.rank])).item(),
                                   w.replicas.all_reduce(torch.tensor([w.rank])).item()), 2)
    assert sums == [(1, 6), (1, 9), (5, 6), (5, 9), (9, 6), (9, 9)]
