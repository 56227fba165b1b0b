"""Real ranks build the graph that one process builds."""

import pytest
import torch

from tests.support.graphs import built, clustered, whole
from tests.support.launch import mpirun
from xc.comm.shard import Shard
from xc.knn.graph_file import read_graph

pytestmark = [pytest.mark.mpi, pytest.mark.long]


@pytest.mark.parametrize("collectives", ["mpi", "horovod"])
def test_real_ranks_build_the_same_graph(collectives, tmp_path):
    mpirun(3, "-m", "tests.mpi.programs.graphs", collectives, tmp_path)
    for method in "exact", "approx":
        paths = list((tmp_path / method).glob("neighbors-*.safetensors"))
        found = whole([read_graph(paths, Shard(0, 2000), 2000)])
        assert len(paths) == 3
        assert torch.equal(found, whole([g for g, _ in built(clustered(2000), 8, 1, method=method)]))
