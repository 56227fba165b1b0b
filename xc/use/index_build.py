"""Builds an index of vectors. With inverted lists the ranks share the work, and the result is that of one rank.

    1. A sample of the vectors, the same at any W, teaches rank 0 the cells and codes. All ranks get them.
    2. Each rank assigns and encodes its own range of the vectors, block by block.
    3. Rank 0 merges the parts in the order of the ranks, from files in the hidden folder of the index.

Memory: rank 0 holds the index, and one part while it merges it; the others hold their part. Up to twice as much for a
moment, as the lists grow.
"""

import os
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

# isort: split
import faiss  # after torch: both load an OpenMP library

from data_tools.common.atomic import atomic_folder
from xc.comm.shard import Shard
from xc.errors import UserError
from xc.run import watchdog
from xc.use.index_types import can_be_merged, new_index, reason_of, sample_size
from xc.use.job import progress_of
from xc.use.vectors import sample_of, shard_of, take


def build_index(vectors, kind, seed, folder, world):
    """The faiss index of the vectors on rank 0; None on the others. Row i of the vectors has the number i.

    vectors  of vectors.py
    kind     --type
    folder   for the parts of other ranks; all ranks see it

    UserError where the type does not fit, or a file is damaged. Collective.
    """
    faiss.omp_set_num_threads(torch.get_num_threads())
    with world.raise_on_all_ranks():
        index = new_index(kind, vectors.count, vectors.width)
    if size := sample_size(index):
        index = _trained(index, vectors, size, kind, seed, world)
    merged = can_be_merged(index) and world.size > 1
    whole = Shard(0, vectors.count) if world.rank == 0 else Shard(0, 0)
    shard = shard_of(vectors, world) if merged else whole
    with world.raise_on_all_ranks(), _faiss_errors(kind):
        _add(index, vectors, shard, world)
        if merged and world.rank:
            faiss.write_index(index, _part(folder, world.rank))
    if world.rank:
        index = None
    with world.raise_on_all_ranks(), _faiss_errors(kind):
        for rank in range(1, world.size if merged and world.rank == 0 else 0):
            part = faiss.read_index(_part(folder, rank))
            index.merge_from(part, 0)
            os.unlink(_part(folder, rank))
    return index


@contextmanager
def hidden_folder(out, world):
    """Yields the path of a new hidden folder, the same on every rank, which is renamed to `out` at the end. Collective,
    at the begin and at the end."""
    with ExitStack() as stack:
        with world.raise_on_all_ranks():
            folder = stack.enter_context(atomic_folder(out)) if world.rank == 0 else None
        yield world.all_ranks.all_gather_object(folder)[0]
        with world.raise_on_all_ranks():
            stack.close()


@contextmanager
def _faiss_errors(kind):
    """Turns an error of faiss into a UserError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"--type {kind}: faiss cannot build it ({reason_of(error)}): give another type") from error


def _trained(index, vectors, size, kind, seed, world):
    """The index, trained by rank 0 on a sample of so many vectors that all ranks read. Collective."""
    rows, shard = sample_of(vectors.count, size, seed), shard_of(vectors, world)
    with world.raise_on_all_ranks():
        own = torch.from_numpy(take(vectors, rows[shard.owns(rows)]))
    counts = world.all_ranks.all_gather(torch.tensor([len(own)])).tolist()
    sample = world.all_ranks.all_gather(own, counts).numpy()  # ascending, since the shards are
    data = torch.zeros(0, dtype=torch.uint8)
    with world.raise_on_all_ranks(), _faiss_errors(kind):
        if world.rank == 0:
            watchdog.heartbeat("training of an index")
            index.train(sample)
            data = torch.from_numpy(faiss.serialize_index(index))
    counts = world.all_ranks.all_gather(torch.tensor([len(data)])).tolist()
    data = world.all_ranks.all_gather(data, counts).numpy()
    with world.raise_on_all_ranks(), _faiss_errors(kind):
        return faiss.deserialize_index(data)


def _add(index, vectors, shard, world):
    """Add the vectors of a shard; inverted lists get the numbers of their rows."""
    numbered = can_be_merged(index)
    with progress_of("indexing", len(shard), world, "vectors") as progress:
        for first, block in vectors.blocks(shard):
            watchdog.heartbeat("indexing")
            if numbered:
                index.add_with_ids(block, np.arange(first, first + len(block)))
            else:
                index.add(block)
            progress(len(block))


def _part(folder, rank):
    return os.path.join(folder, f"part-{rank:05d}.faiss")
