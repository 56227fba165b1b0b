"""Groups of ranks, and their collectives on torch tensors: blocking, or begun now and waited for later.

All collectives sum; none averages. mpi4py carries host tensors: between two hosts its gather of 11 x 32 KB took 2 ms,
Horovod's 3 ms. Horovod with NCCL carries CUDA tensors, with one process set per group. Without NCCL, mpi4py carries
them through host memory.
"""

import time
from collections import deque
from contextlib import contextmanager

import numpy as np
import torch

from xc.comm.shard import Shard
from xc.comm.traffic import sent_all_gather, sent_all_reduce, sent_reduce_scatter
from xc.errors import UserError
from xc.run import watchdog

_BACKGROUND_POLL_SECONDS = 2e-3  # between two polls of a background thread
_MOST_NUMBERS = 2**30  # of a sum: MPI counts them in 31 bits


class Group:
    """Collectives among some ranks. This class is a group of one rank; the others follow its contract.

    Every rank of the group begins the same collectives in the same order. Tensors are contiguous. A group keeps no
    tensor. Sums have the same bits on every rank.

    The _async methods return a function that waits and returns the result. The argument must not change until then.
    """

    rank = 0
    size = 1

    def all_reduce(self, tensor, op="sum"):
        """Sum or maximum ("max") over the group, in place on every rank. Returns the tensor."""
        return tensor

    def all_reduce_async(self, tensor):
        """Begin an in-place sum over the group."""
        return lambda: tensor

    def all_gather(self, tensor, counts=None):
        """Concatenate the ranks' tensors along dimension 0, in the order of ranks.

        counts  number of rows of every rank; None if all ranks have the same number
        """
        return tensor

    def all_gather_async(self, tensor, counts=None):
        """Begin an `all_gather`."""
        return lambda: tensor

    def reduce_scatter(self, tensor, counts):
        """Sum over the group. Rank r gets the r-th piece, of counts[r] rows. 16-bit numbers are summed in float32."""
        return self.reduce_scatter_async(tensor, counts)()

    def reduce_scatter_async(self, tensor, counts):
        """Begin a `reduce_scatter`."""
        return lambda: tensor.to(sum_dtype(tensor))

    def all_to_all(self, tensor, counts):
        """Send the r-th piece, of counts[r] rows, to rank r. Returns a list with the piece received from every rank."""
        return [tensor]

    def all_to_all_async(self, tensor, counts, received):
        """Begin an all-to-all in which rank r sends received[r] rows to this rank. The result has them in the order of
        ranks, in one tensor.
        """
        return lambda: tensor

    def shift_async(self, tensor, num_rows):
        """Begin to send a tensor to the next rank of the ring, and to receive num_rows rows from the previous rank."""
        return lambda: tensor

    def all_gather_object(self, value):
        """Gather one small picklable value of every rank in a list. For set-up and logs, not for steps."""
        return [value]

    @contextmanager
    def raise_on_all_ranks(self):
        """Turn a ValueError, OSError or ImportError of any rank in this block into the same UserError on all ranks.

        Collective at the end of the block. The block must not use collectives: a rank that failed before one would
        leave the others waiting.
        """
        error = None
        try:
            yield
        except (ValueError, OSError, ImportError) as e:
            error = str(e) or repr(e)
        errors = [e for e in self.all_gather_object(error) if e is not None]
        if errors:
            raise UserError(errors[0])


class Mailbox:
    """Short messages between ranks, for one background thread. No call blocks, so a frozen rank stops no other rank.

    This class is the mailbox of a single rank; `MpiMailbox` follows its contract.
    """

    def __init__(self):
        self._own = deque()

    def send(self, rank, *message):
        """Begin to send picklable values to a rank. It may be this one."""
        self._own.append((rank, *message))

    def receive(self):
        """(sender's rank, *message) of the next message that arrived; None if there is none."""
        return self._own.popleft() if self._own else None


def sum_dtype(tensor):
    """The type in which a tensor's numbers are summed."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


class MpiGroup(Group):
    """A group of ranks over an mpi4py communicator. CUDA tensors are copied through host memory."""

    def __init__(self, comm, traffic, name):
        from mpi4py import MPI

        self._comm, self._traffic, self._name = comm, traffic, name
        self._ops = {"sum": MPI.SUM, "max": MPI.MAX}
        self._in_place, self._test_all = MPI.IN_PLACE, MPI.Request.Testall
        self.rank = comm.rank
        self.size = comm.size

    def _begin(self, collective, num_bytes, request, finish):
        return self._traffic.begin(f"{self._name}.{collective}", num_bytes, request.Test, finish)

    def all_reduce(self, tensor, op="sum"):
        return self._all_reduce(tensor, op)()

    def all_reduce_async(self, tensor):
        return self._all_reduce(tensor, "sum")

    def _all_reduce(self, tensor, op):
        host = tensor.cpu()
        requests = [self._comm.Iallreduce(self._in_place, piece.numpy(), self._ops[op])
                    for piece in host.view(-1).split(_MOST_NUMBERS)]
        return self._traffic.begin(f"{self._name}.all_reduce", sent_all_reduce(self.size, host.nbytes),
                                   lambda: self._test_all(requests),
                                   lambda: tensor if host is tensor else tensor.copy_(host))

    def all_gather(self, tensor, counts=None):
        return self.all_gather_async(tensor, counts)()

    def all_gather_async(self, tensor, counts=None):
        host = tensor.detach().cpu().contiguous()
        counts = counts or [len(host)] * self.size
        assert len(host) == counts[self.rank]  # MPI would read beyond the end of a shorter tensor
        out = host.new_empty((sum(counts), *host.shape[1:]))
        width = _width(host)
        request = self._comm.Iallgatherv(_raw(host), [_raw(out), [n * width for n in counts]])
        return self._begin("all_gather", sent_all_gather(self.size, host.nbytes), request,
                           lambda: out.to(tensor.device))

    def reduce_scatter_async(self, tensor, counts):
        # Ranks exchange the pieces and each rank sums its own. This takes one round and half the bytes of recursive
        # halving. It works for 16-bit numbers, too, which MPI cannot sum.
        own, dtype = counts[self.rank], sum_dtype(tensor)
        return self._all_to_all("reduce_scatter", sent_reduce_scatter(self.size, tensor.nbytes), tensor, counts,
                                [own] * self.size,
                                lambda rows: rows.view(self.size, own, *tensor.shape[1:]).sum(0, dtype=dtype))

    def all_to_all_async(self, tensor, counts, received):
        own = counts[self.rank] * _width(tensor) * tensor.itemsize
        return self._all_to_all("all_to_all", tensor.nbytes - own, tensor, counts, received, lambda rows: rows)

    def _all_to_all(self, name, num_bytes, tensor, counts, received, result_of):
        host = tensor.detach().cpu().contiguous()
        out = host.new_empty((sum(received), *host.shape[1:]))
        width = _width(host)
        request = self._comm.Ialltoallv([_raw(host), [n * width for n in counts]],
                                        [_raw(out), [n * width for n in received]])
        return self._begin(name, num_bytes, request, lambda: result_of(out).to(tensor.device))

    def all_to_all(self, tensor, counts):
        host = tensor.detach().cpu().contiguous()
        width = _width(host)
        with watchdog.waiting(f"{self._name}.all_to_all"):
            received = self._comm.alltoall(counts)
            out = host.new_empty((sum(received), *host.shape[1:]))
            self._comm.Alltoallv([_raw(host), [n * width for n in counts]],
                                 [_raw(out), [n * width for n in received]])
        return out.to(tensor.device).split(received)

    def shift_async(self, tensor, num_rows):
        host = tensor.detach().cpu().contiguous()
        out = host.new_empty((num_rows, *host.shape[1:]))
        # No tags are needed: messages between two ranks keep their order, and all ranks shift in the same order.
        requests = [self._comm.Irecv(out.numpy(), (self.rank - 1) % self.size),
                    self._comm.Isend(host.numpy(), (self.rank + 1) % self.size)]

        def wait():
            with watchdog.waiting(f"{self._name}.shift"):
                for request in requests:
                    request.Wait()
            return out.to(tensor.device)

        return wait

    def all_gather_object(self, value):
        with watchdog.waiting(f"{self._name}.all_gather_object"):
            return self._comm.allgather(value)


class BackgroundGroup(MpiGroup):
    """A group for a background thread. It has a communicator of its own and sleeps while it waits."""

    def all_gather_object(self, value):
        barrier = self._comm.Ibarrier()
        while not barrier.Test():
            time.sleep(_BACKGROUND_POLL_SECONDS)
        return super().all_gather_object(value)


class MpiMailbox(Mailbox):
    def __init__(self, comm):
        super().__init__()
        self._comm, self._sends = comm, []

    def send(self, rank, *message):
        if rank == self._comm.rank:
            return super().send(rank, *message)
        self._sends = [request for request in self._sends if not request.Test()]
        self._sends.append(self._comm.isend((self._comm.rank, *message), rank))

    def receive(self):
        return self._comm.recv() if self._comm.iprobe() else super().receive()


def _width(tensor):
    """Numbers in one row."""
    return int(np.prod(tensor.shape[1:]))


def _raw(tensor):
    """A host tensor's memory as an array for MPI. MPI has no 16-bit floats, so they are sent as int16."""
    return (tensor.view(torch.int16) if tensor.is_floating_point() and tensor.itemsize == 2 else tensor).numpy()


def _known_to_horovod(tensor):
    """The tensor in a type that Horovod and NCCL can move: they have no bfloat16 and no int16."""
    return tensor.view(torch.float16) if tensor.dtype in (torch.bfloat16, torch.int16) else tensor


class HorovodGroup(MpiGroup):
    """A group that uses Horovod. Its NCCL operations take CUDA tensors without a copy, on a stream of their own.

    Horovod cannot shift and cannot reduce uint8. mpi4py does these, and `all_to_all`. No training step needs them.
    """

    def __init__(self, comm, traffic, name, process_set):
        super().__init__(comm, traffic, name)
        import horovod.torch as hvd

        self._hvd = hvd
        self._set = process_set
        self._hvd_ops = {"sum": hvd.Sum, "max": hvd.Max}
        self._calls = 0

    def _call_options(self):
        # Horovod matches the ranks' tensors by name. All ranks call in the same order, so a counter can be the name.
        self._calls += 1
        return {"name": f"{self._name}.{self._calls}", "process_set": self._set}

    def _begin_horovod(self, collective, num_bytes, handle, finish):
        return self._traffic.begin(f"{self._name}.{collective}", num_bytes, lambda: self._hvd.poll(handle),
                                   lambda: finish(self._hvd.synchronize(handle)))

    def _all_reduce(self, tensor, op):
        if tensor.dtype == torch.uint8:
            return super()._all_reduce(tensor, op)
        handle = self._hvd.allreduce_async_(tensor, op=self._hvd_ops[op], **self._call_options())
        return self._begin_horovod("all_reduce", sent_all_reduce(self.size, tensor.nbytes), handle, lambda t: t)

    def all_gather_async(self, tensor, counts=None):
        tensor = tensor.detach().contiguous()
        handle = self._hvd.allgather_async(_known_to_horovod(tensor), **self._call_options())
        return self._begin_horovod("all_gather", sent_all_gather(self.size, tensor.nbytes), handle,
                                   lambda gathered: gathered.view(tensor.dtype))

    def _all_to_all(self, name, num_bytes, tensor, counts, received, result_of):
        tensor = tensor.detach().contiguous()
        handle = self._hvd.alltoall_async(_known_to_horovod(tensor), torch.tensor(counts, dtype=torch.int32),
                                          **self._call_options())
        return self._begin_horovod(name, num_bytes, handle, lambda result: result_of(
            result[0].view(tensor.dtype).view(-1, *tensor.shape[1:])))

    def reduce_scatter_async(self, tensor, counts):
        if sum_dtype(tensor) != tensor.dtype:  # Horovod would sum in 16 bits
            return super().reduce_scatter_async(tensor, counts)
        whole = tensor.detach()
        if counts == [len(Shard.of(len(whole), self.size, rank)) for rank in range(self.size)]:  # as Horovod cuts
            handle = self._hvd.reducescatter_async(whole, op=self._hvd.Sum, **self._call_options())
            return self._begin_horovod("reduce_scatter", sent_reduce_scatter(self.size, whole.nbytes), handle,
                                       lambda piece: piece)
        first = sum(counts[: self.rank])
        handle = self._hvd.allreduce_async(whole, op=self._hvd.Sum, **self._call_options())
        return self._begin_horovod("reduce_scatter", sent_all_reduce(self.size, whole.nbytes), handle,
                                   lambda total: total[first : first + counts[self.rank]].clone())
