"""Started by ../test_collectives.py under mpirun: MpiWorld's groups against what the sums must be.

arguments: collectives (mpi | horovod), model-parallel size
"""

import sys

import torch

from xc.comm import groups
from xc.comm.launch import run
from xc.comm.shard import Shard
from xc.comm.world import MpiWorld


def check(group, members, me):
    """members: world ranks of the group, in order; every rank brings numbers made from its world rank."""
    def of(rank, *shape, dtype=torch.float32):
        return torch.arange(1, 1 + int(torch.Size(shape).numel()), dtype=dtype).reshape(shape) * (rank + 1)

    assert (group.rank, group.size) == (members.index(me), len(members))
    groups._MOST_NUMBERS = 4  # sums of more numbers are cut
    for dtype in torch.float32, torch.float64, torch.int64:
        total = sum(of(r, 3, 2, dtype=dtype) for r in members)
        mine = of(me, 3, 2, dtype=dtype)
        assert group.all_reduce(mine) is mine and torch.equal(mine, total)
        assert torch.equal(group.all_reduce(of(me, 5, dtype=dtype), "max"), of(max(members), 5, dtype=dtype))
        assert torch.equal(group.all_gather(of(me, 2, 3, dtype=dtype)),
                           torch.cat([of(r, 2, 3, dtype=dtype) for r in members]))
        counts = [r % 3 for r in members]  # uneven, some empty
        assert torch.equal(group.all_gather(of(me, me % 3, 4, dtype=dtype), counts),
                           torch.cat([of(r, r % 3, 4, dtype=dtype) for r in members]))
        near_equal = [len(Shard.of(2 * len(members) + 1, len(members), i)) for i in range(len(members))]
        for lengths in counts, near_equal:
            if sum(lengths):
                whole = sum(of(r, sum(lengths), 4, dtype=dtype) for r in members)
                assert torch.equal(group.reduce_scatter(of(me, sum(lengths), 4, dtype=dtype), lengths),
                                   whole.split(lengths)[group.rank])
        # Rank r gives rank q a block of (r + q) % 3 rows, of numbers that name both.
        pieces = [of(me, (me + r) % 3, 4, dtype=dtype) * (r + 1) for r in members]
        got = group.all_to_all(torch.cat(pieces), [len(piece) for piece in pieces])
        assert len(got) == len(members)
        for r, piece in zip(members, got, strict=True):
            assert torch.equal(piece, of(r, (me + r) % 3, 4, dtype=dtype) * (me + 1))
        sizes = [len(piece) for piece in pieces]
        assert torch.equal(group.all_to_all_async(torch.cat(pieces), sizes, sizes)(), torch.cat(list(got)))
        waits = [group.all_gather_async(of(me, 2, 3, dtype=dtype)), group.all_reduce_async(of(me, 5, dtype=dtype))]
        gathered, total = (wait() for wait in waits)
        assert torch.equal(gathered, torch.cat([of(r, 2, 3, dtype=dtype) for r in members]))
        assert torch.equal(total, sum(of(r, 5, dtype=dtype) for r in members))
        before = members[group.rank - 1]
        waits = [group.shift_async(of(me, me % 3 * n, 4, dtype=dtype), before % 3 * n) for n in (1000, 1)]
        for n, wait in zip((1000, 1), waits, strict=True):
            assert torch.equal(wait(), of(before, before % 3 * n, 4, dtype=dtype))
    for dtype in torch.float16, torch.bfloat16:  # sums of 16-bit numbers are float32
        assert torch.equal(group.all_gather(of(me, 2, 3, dtype=dtype)),
                           torch.cat([of(r, 2, 3, dtype=dtype) for r in members]))
        whole = sum(of(r, len(members), 3) / 64 for r in members)
        piece = group.reduce_scatter((of(me, len(members), 3) / 64).to(dtype), [1] * len(members))
        assert piece.dtype == torch.float32 and torch.equal(piece[0], whole[group.rank])
    short = torch.arange(3 * len(members), dtype=torch.int16).view(-1, 3)  # the messages of DGC with 16 bits
    counts = [1] * len(members)
    assert torch.equal(group.all_to_all_async(short + me, counts, counts)(),
                       torch.stack([short[group.rank] + r for r in members]))
    assert torch.equal(group.all_gather(short[: me % 2], [r % 2 for r in members]),
                       torch.cat([short[: r % 2] for r in members]))
    marks = torch.tensor([me, 0], dtype=torch.uint8)
    assert group.all_reduce(marks, "max").tolist() == [max(members), 0]
    assert group.all_gather_object({"rank": me}) == [{"rank": r} for r in members]


def main():
    collectives, width = sys.argv[1], int(sys.argv[2])
    world = MpiWorld("cpu", width, collectives)
    copy = world.rank // width
    check(world.all_ranks, list(range(world.size)), world.rank)
    check(world.shards, list(range(copy * width, (copy + 1) * width)), world.rank)
    check(world.replicas, list(range(world.rank % width, world.size, width)), world.rank)
    check(world.host, list(range(world.size)), world.rank)
    check(world.cross_host, [world.rank], world.rank)

    tensors = [torch.full((1000,), float(world.rank + i)) for i in range(5)]
    waits = [world.all_reduce_async(t, f"t{i}") for i, t in enumerate(tensors)]
    for i, (tensor, wait) in enumerate(zip(tensors, waits, strict=True)):
        assert wait() is tensor
        assert torch.equal(tensor, torch.full((1000,), sum(range(world.size)) + float(i * world.size)))
    half = torch.full((1000,), 0.25 * (world.rank + 1), dtype=torch.float16)
    assert world.all_reduce_async(half, "half")().tolist() == [0.25 * sum(range(1, world.size + 1))] * 1000
    if world.rank == 0:
        print("all collectives right")


if __name__ == "__main__":
    run(main)
