"""MpiWorld's groups on real ranks against what the sums must be."""

import pytest

from tests.support.launch import mpirun

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks, width, collectives", [
    (2, 2, "mpi"), *(pytest.param(*row, marks=pytest.mark.long) for row in [
        (3, 3, "mpi"), (4, 2, "mpi"), (3, 3, "horovod"), (4, 2, "horovod")])])
def test_collectives(ranks, width, collectives):
    out = mpirun(ranks, "-m", "tests.mpi.programs.collectives", collectives, width).stdout
    assert "all collectives right" in out
