"""Started by ../test_graph.py under mpirun: build graphs and write them.

arguments: collectives (mpi | horovod), folder
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.support.graphs import clustered
from xc.comm.launch import run
from xc.comm.shard import Shard
from xc.comm.world import MpiWorld
from xc.knn.build import build


def main():
    world = MpiWorld("cpu", 0, sys.argv[1])
    rows = clustered(2000)
    shard = Shard.of(len(rows), world.shards.size, world.shards.rank)
    rows = rows[shard.first : shard.last]
    for method in "exact", "approx":
        graph, _ = build(rows, shard, 2000, 8, world.shards, method)
        folder = Path(sys.argv[2]) / method
        folder.mkdir(exist_ok=True)
        save_file({name: t.contiguous() for name, t in graph.tables().items()}, folder / graph.file_name)


if __name__ == "__main__":
    run(main)
