"""Groups of ranks: collectives on torch tensors, blocking or begun now and waited for later.

All collectives SUM; nothing in here averages. Host tensors travel by mpi4py (between two hosts its gather of 11 x 32 KB
took 2 ms, Horovod's 3). CUDA tensors travel by Horovod with NCCL in a process set per group where that is built,
otherwise by mpi4py through host memory.
"""

import time
from collections import deque
from contextlib import contextmanager

import numpy as np
import torch

from xc.comm.traffic import sent_all_gather, sent_all_reduce, sent_reduce_scatter
from xc.errors import UserError
from xc.run import watchdog

_BACKGROUND_POLL_SECONDS = 2e-3  # between two looks of a background thread that waits


class Group:
    """Collectives among some ranks. This class is the group of one rank, and the contract.

    Every rank of the group begins the same collectives in the same order. Tensors are contiguous, and a group keeps
    none. Sums have the same bits on every rank.

    The _async methods return a function that waits and returns the result. Until then the argument must not change.
    """

    rank = 0
    size = 1

    def all_reduce(self, tensor, op="sum"):
        """Sum or max over the group, in place on every rank; returns the tensor."""
        return tensor

    def all_reduce_async(self, tensor):
        """Begin to sum over the group, in place."""
        return lambda: tensor

    def all_gather(self, tensor, counts=None):
        """Concatenate along dimension 0, in the order of ranks.

        counts  rows of every rank; None where all ranks have the same number
        """
        return tensor

    def all_gather_async(self, tensor, counts=None):
        """Begin to concatenate."""
        return lambda: tensor

    def reduce_scatter(self, tensor, counts):
        """Sum over the group; rank r gets the r-th piece, of counts[r] rows. 16-bit numbers are summed in float32."""
        return self.reduce_scatter_async(tensor, counts)()

    def reduce_scatter_async(self, tensor, counts):
        """Begin to sum and to distribute the pieces."""
        return lambda: tensor.to(sum_dtype(tensor))

    def all_to_all(self, tensor, counts):
        """Send the r-th piece, of counts[r] rows, to rank r. Returns the received pieces by rank."""
        return [tensor]

    def shift_async(self, tensor, num_rows):
        """Begin to send a tensor to the next rank of the ring and to receive num_rows rows from the previous rank."""
        return lambda: tensor

    def all_gather_object(self, value):
        """A list of every rank's small picklable value. For set-up and logs, not for steps."""
        return [value]

    @contextmanager
    def raise_on_all_ranks(self):
        """An error in this block on one rank becomes the same UserError on all ranks. Collective at its end.

        The block itself must not use collectives: a rank that fails in it would leave the others waiting.
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
    """Short messages between ranks, for one background thread. Nobody waits for a frozen rank.

    This class is the mailbox of a single rank, and the contract.
    """

    def __init__(self):
        self._own = deque()

    def send(self, rank, *message):
        """Begin to send picklable values to a rank, which may be this one."""
        self._own.append((rank, *message))

    def take(self):
        """(rank, *message) of a message that arrived; None where none did."""
        return self._own.popleft() if self._own else None


def sum_dtype(tensor):
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


class MpiGroup(Group):
    """A group of ranks over an mpi4py communicator; CUDA tensors are staged through host memory."""

    def __init__(self, comm, traffic, name):
        from mpi4py import MPI

        self._comm, self._traffic, self._name = comm, traffic, name
        self._ops = {"sum": MPI.SUM, "max": MPI.MAX}
        self._in_place = MPI.IN_PLACE
        self.rank = comm.rank
        self.size = comm.size

    def _begin(self, what, num_bytes, request, finish):
        return self._traffic.begin(f"{self._name}.{what}", num_bytes, request.Test, finish)

    def all_reduce(self, tensor, op="sum"):
        return self._all_reduce(tensor, op)()

    def all_reduce_async(self, tensor):
        return self._all_reduce(tensor, "sum")

    def _all_reduce(self, tensor, op):
        host = tensor.cpu()
        request = self._comm.Iallreduce(self._in_place, host.numpy(), self._ops[op])
        return self._begin("all_reduce", sent_all_reduce(self.size, host.nbytes), request,
                           lambda: tensor if host is tensor else tensor.copy_(host))

    def all_gather(self, tensor, counts=None):
        return self.all_gather_async(tensor, counts)()

    def all_gather_async(self, tensor, counts=None):
        host = tensor.detach().cpu().contiguous()
        counts = counts or [len(host)] * self.size
        assert len(host) == counts[self.rank]  # MPI would send whatever lies in memory behind it
        out = host.new_empty((sum(counts), *host.shape[1:]))
        width = _width(host)
        request = self._comm.Iallgatherv(_raw(host), [_raw(out), [n * width for n in counts]])
        return self._begin("all_gather", sent_all_gather(self.size, host.nbytes), request,
                           lambda: out.to(tensor.device))

    def reduce_scatter_async(self, tensor, counts):
        # The ranks exchange pieces and sum them here. That is one round, half the bytes of recursive halving, and it
        # takes 16-bit numbers, which MPI does not know.
        host = tensor.detach().cpu().contiguous()
        out = host.new_empty((self.size, counts[self.rank], *host.shape[1:]))
        width = _width(host)
        request = self._comm.Ialltoallv([_raw(host), [n * width for n in counts]],
                                        [_raw(out), [counts[self.rank] * width] * self.size])
        return self._begin("reduce_scatter", sent_reduce_scatter(self.size, host.nbytes), request,
                           lambda: out.sum(0, dtype=sum_dtype(out)).to(tensor.device))

    def all_to_all(self, tensor, counts):
        host = tensor.detach().cpu().contiguous()
        width = _width(host)
        with watchdog.waiting(f"{self._name}.all_to_all"):
            coming = self._comm.alltoall(counts)
            out = host.new_empty((sum(coming), *host.shape[1:]))
            self._comm.Alltoallv([_raw(host), [n * width for n in counts]], [_raw(out), [n * width for n in coming]])
        return out.to(tensor.device).split(coming)

    def shift_async(self, tensor, num_rows):
        host = tensor.detach().cpu().contiguous()
        out = host.new_empty((num_rows, *host.shape[1:]))
        # Messages of one tag between two ranks keep their order, and all ranks shift in the same order.
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
    """All ranks, for a background thread: it has a communicator of its own and sleeps while it waits."""

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

    def take(self):
        return self._comm.recv() if self._comm.iprobe() else super().take()


def _width(tensor):
    return int(np.prod(tensor.shape[1:]))


def _raw(tensor):
    """The memory of a host tensor for MPI. MPI knows no 16-bit floats, so they travel as int16."""
    return (tensor.view(torch.int16) if tensor.is_floating_point() and tensor.itemsize == 2 else tensor).numpy()


class HorovodGroup(MpiGroup):
    """The same through Horovod, whose NCCL operations take CUDA tensors without a copy, on a stream of their own.

    Horovod has no sends and does not reduce uint8. These and all_to_all stay with mpi4py; no step needs them.
    """

    def __init__(self, comm, traffic, name, process_set):
        super().__init__(comm, traffic, name)
        import horovod.torch as hvd

        self._hvd = hvd
        self._set = process_set
        self._hvd_ops = {"sum": hvd.Sum, "max": hvd.Max}
        self._calls = 0

    def _call(self):
        # Horovod matches the tensors of ranks by name. All ranks call in the same order, so a counter serves as name.
        self._calls += 1
        return {"name": f"{self._name}.{self._calls}", "process_set": self._set}

    def _begin_horovod(self, what, num_bytes, handle, finish):
        return self._traffic.begin(f"{self._name}.{what}", num_bytes, lambda: self._hvd.poll(handle),
                                   lambda: finish(self._hvd.synchronize(handle)))

    def _all_reduce(self, tensor, op):
        if tensor.dtype == torch.uint8:
            return super()._all_reduce(tensor, op)
        handle = self._hvd.allreduce_async_(tensor, op=self._hvd_ops[op], **self._call())
        return self._begin_horovod("all_reduce", sent_all_reduce(self.size, tensor.nbytes), handle, lambda t: t)

    def all_gather_async(self, tensor, counts=None):
        tensor = tensor.detach().contiguous()
        bits = tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor  # unknown to Horovod
        handle = self._hvd.allgather_async(bits, **self._call())
        return self._begin_horovod("all_gather", sent_all_gather(self.size, tensor.nbytes), handle,
                                   lambda gathered: gathered.view(tensor.dtype))

    def reduce_scatter_async(self, tensor, counts):
        # Horovod's own reducescatter has near-equal pieces only, so the whole sum is cut here.
        whole = tensor.detach().to(sum_dtype(tensor))
        first = sum(counts[: self.rank])
        handle = self._hvd.allreduce_async(whole, op=self._hvd.Sum, **self._call())
        return self._begin_horovod("reduce_scatter", sent_all_reduce(self.size, whole.nbytes), handle,
                                   lambda total: total[first : first + counts[self.rank]].clone())
