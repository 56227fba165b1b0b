"""W ranks as threads of this process: a world of four starts in milliseconds.

Every collective compares its name, dtype and shape across ranks, so that what would hang under MPI fails here. What it
sends is counted as under MPI.
"""

import threading

import torch
from safetensors.torch import save_file

from xc.comm.groups import Group, sum_dtype
from xc.comm.traffic import Traffic, sent_all_gather, sent_all_reduce, sent_reduce_scatter
from xc.comm.world import World

_PATIENCE_SECONDS = 30


class _Meeting:
    """Where the threads of a group put down what they bring and see what the others brought."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size)
        self.brought = [None] * size

    def exchange(self, rank, call, value):
        self.brought[rank] = (call, value)
        self.barrier.wait(_PATIENCE_SECONDS)
        brought = list(self.brought)
        self.barrier.wait(_PATIENCE_SECONDS)
        calls = [c for c, _ in brought]
        assert all(c == calls[0] for c in calls), f"ranks disagree on a collective: {calls}"
        return [v for _, v in brought]


class ThreadGroup(Group):
    def __init__(self, rank, meeting):
        self.rank, self.size, self._meeting = rank, len(meeting.brought), meeting
        self.name, self.traffic = "", Traffic()

    def _count(self, collective, formula, tensor):
        if self.size > 1:
            self.traffic.sent[f"{self.name}.{collective}"] += formula(self.size, tensor.nbytes)

    def _exchange(self, name, tensor, *details):
        return self._meeting.exchange(self.rank, (name, tensor.dtype, *details), tensor.detach().clone())

    def all_reduce(self, tensor, op="sum"):
        self._count("all_reduce", sent_all_reduce, tensor)
        parts = torch.stack(self._exchange("all_reduce", tensor, op, tuple(tensor.shape)))
        return tensor.copy_(parts.sum(0) if op == "sum" else parts.amax(0))

    def all_gather(self, tensor, counts=None):
        counts = list(counts or [len(tensor)] * self.size)
        assert len(tensor) == counts[self.rank]
        self._count("all_gather", sent_all_gather, tensor)
        return torch.cat(self._exchange("all_gather", tensor, tuple(tensor.shape[1:]), tuple(counts)))

    def all_reduce_async(self, tensor):
        self.all_reduce(tensor)
        return lambda: tensor

    def all_gather_async(self, tensor, counts=None):
        gathered = self.all_gather(tensor, counts)
        return self._unchanged(tensor, gathered)

    @staticmethod
    def _unchanged(given, result):
        """Waits for a result; what was given must not have changed while it was in flight."""
        copy = given.detach().clone()

        def wait():
            assert torch.equal(copy, given), "changed in flight"
            return result

        return wait

    def reduce_scatter_async(self, tensor, counts):
        self._count("reduce_scatter", sent_reduce_scatter, tensor)
        parts = self._exchange("reduce_scatter", tensor, tuple(tensor.shape), tuple(counts))
        piece = torch.stack(parts).sum(0, dtype=sum_dtype(tensor)).split(list(counts))[self.rank].clone()
        return self._unchanged(tensor, piece)

    def all_to_all(self, tensor, counts):
        assert len(tensor) == sum(counts) and len(counts) == self.size
        parts = self._exchange("all_to_all", tensor, tuple(tensor.shape[1:]))
        counts = self._meeting.exchange(self.rank, ("all_to_all counts",), list(counts))
        firsts = [sum(count[: self.rank]) for count in counts]  # split would make W pieces of each of W tensors
        return [part[first : first + count[self.rank]]
                for part, first, count in zip(parts, firsts, counts, strict=True)]

    def all_to_all_async(self, tensor, counts, received):
        own = counts[self.rank] * tensor[:1].nbytes
        self.traffic.sent[f"{self.name}.all_to_all"] += tensor.nbytes - own
        parts = self.all_to_all(tensor, list(counts))
        assert [len(part) for part in parts] == list(received)
        return self._unchanged(tensor, torch.cat(parts))

    def shift_async(self, tensor, num_rows):
        parts = self._exchange("shift_async", tensor, tuple(tensor.shape[1:]))
        taken = parts[(self.rank - 1) % self.size]
        assert len(taken) == num_rows
        return lambda: taken

    def all_gather_object(self, value):
        return self._meeting.exchange(self.rank, ("all_gather_object",), value)


class ThreadWorld(World):
    def __init__(self, rank, all_ranks, shards, replicas, host, cross_host, background):
        super().__init__("cpu")
        self.background = background
        self.rank, self.size = rank, all_ranks.size
        self.shard_ranks = range(rank - shards.rank, rank - shards.rank + shards.size)
        self.all_ranks, self.shards, self.replicas = all_ranks, shards, replicas
        self.host, self.cross_host = host, cross_host
        self._dense = ThreadGroup(rank, all_ranks._meeting)
        for name, group in [("all_ranks", all_ranks), ("shards", shards), ("replicas", replicas), ("host", host),
                            ("cross_host", cross_host), ("backbone", self._dense)]:
            group.name, group.traffic = name, self.traffic

    def all_reduce_async(self, tensor, name):
        def wait():
            self._dense._exchange("name", torch.zeros(()), name)
            return self._dense.all_reduce(tensor)

        return wait


def write_files(part, folder):
    """What a head or an exchange brings to a checkpoint."""
    for name, tables in part.files().items():
        save_file({key: tensor.clone() for key, tensor in tables.items()}, folder / name)


def run_ranks(size, body, model_parallel_size=0, ranks_per_host=0):
    """[body(world) of every rank]; the first error of any rank is raised, and no other rank waits for it.

    0: one copy of the classifier over all ranks; all ranks on one host
    """
    all_ranks, background = _Meeting(size), _Meeting(size)

    def grid(width):
        return ([_Meeting(width) for _ in range(size // width)], [_Meeting(size // width) for _ in range(width)])

    width, per_host = model_parallel_size or size, ranks_per_host or size
    (rows, columns), (hosts, places) = grid(width), grid(per_host)
    results, errors = [None] * size, []

    def work(rank):
        world = ThreadWorld(
            rank, ThreadGroup(rank, all_ranks), ThreadGroup(rank % width, rows[rank // width]),
            ThreadGroup(rank // width, columns[rank % width]), ThreadGroup(rank % per_host, hosts[rank // per_host]),
            ThreadGroup(rank // per_host, places[rank % per_host]), ThreadGroup(rank, background))
        try:
            results[rank] = body(world)
        except BaseException as e:
            errors.append(e)
            for meeting in (all_ranks, background, *rows, *columns, *hosts, *places):
                meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _PATIENCE_SECONDS)
    if errors:
        # A broken barrier is the others' consequence of the error that came first.
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return results
