"""The ranks: one process, or many under MPI. The only file that imports mpi4py or Horovod or reads the launcher's
environment.

`World` is the case of one process, and the contract. The world is a grid: `world.shards` is the group of ranks that
together hold one copy of the classifier, `world.replicas` the group of ranks that hold the same shard of different
copies, `world.everyone` all of them, `world.background` all of them once more, for a thread beside
the steps. The same ranks make a second grid: `world.host` are those on one host,
`world.across` those of the same place on every host. A `Group` has collectives on torch tensors, blocking or begun now
and waited for later; the backbone's dense gradients go through `World.all_reduce_async`, which is Horovod's.

All collectives SUM; nothing in here averages. Host tensors of a group travel by mpi4py (between two hosts its gather
of 11 x 32 KB took 2 ms, Horovod's 3); CUDA tensors by Horovod with NCCL in a process set per group where that is
built, otherwise by mpi4py through host memory.
"""

import os
import platform
import sys
import threading
import time
import traceback
from collections import deque
from contextlib import contextmanager

import numpy as np
import torch

from xc import stop, watchdog
from xc.config import UserError
from xc.message import one_line
from xc.traffic import Traffic, sent_all_gather, sent_all_reduce, sent_reduce_scatter

# Variables that a launcher sets for its ranks; SLURM_PROCID is not among them, since a batch script has it too.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "HOROVOD_RANK")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")


def launched_rank():
    """This process's rank as its launcher states it, None when there is none."""
    return next((int(os.environ[v]) for v in _RANK_VARIABLES if v in os.environ), None)


def _launched_size():
    """The number of ranks as their launcher states it, None where it does not."""
    return next((int(os.environ[v]) for v in _SIZE_VARIABLES if v in os.environ), None)


# By which people mend ranks that are slow or do not meet.
_SETTINGS = ("OMP_NUM_THREADS", "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_btl_tcp_links",
             "OMPI_MCA_btl", "OMPI_MCA_pml")


def _launched_by_gloo():
    return os.environ.get("HOROVOD_CONTROLLER") == "gloo"


_PATIENCE_SECONDS = 2e-3  # between looks of a thread that waits beside the steps


class Group:
    """Collectives among some ranks. This class is the group of one.

    Every rank of the group begins the same collectives in the same order. Tensors are contiguous; a tensor given is
    not kept. Sums have the same bits on every rank.

    The _async ones return a function that waits and returns the result; what was given must not change until then.
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
        """Concatenation along dimension 0, in the order of ranks. counts: rows of every rank, None if all alike."""
        return tensor

    def all_gather_async(self, tensor, counts=None):
        """Begin to concatenate."""
        return lambda: tensor

    def reduce_scatter(self, tensor, counts):
        """Sum over the group, of which rank r gets the r-th piece of counts[r] rows; of 16-bit numbers in float32."""
        return self.reduce_scatter_async(tensor, counts)()

    def reduce_scatter_async(self, tensor, counts):
        """Begin to sum and to hand out the pieces."""
        return lambda: tensor.to(_sum_dtype(tensor))

    def all_to_all(self, tensor, counts):
        """Rows for every rank: the r-th piece of counts[r] rows goes to rank r. Returns the pieces got, by rank."""
        return [tensor]

    def shift_async(self, tensor, num_rows):
        """Begin to give a tensor to the next rank of the ring and to take one of num_rows rows from the rank before."""
        return lambda: tensor

    def all_gather_object(self, value):
        """A small picklable value of every rank, as a list. For set-up and logs, not for steps."""
        return [value]

    @contextmanager
    def agreed(self):
        """What goes wrong in this block on one rank becomes the same UserError on all. Collective at its end.

        The block itself must not use collectives: a rank that fails would leave the others waiting.
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
    """Short messages from rank to rank, for one thread beside the steps: nobody waits for a rank that is frozen. This
    class is that of a single rank."""

    def __init__(self):
        self._own = deque()

    def send(self, rank, *message):
        """Begin to send picklable values to a rank, which may be this one."""
        self._own.append((rank, *message))

    def take(self):
        """(rank, *message) of one that came, None where none did."""
        return self._own.popleft() if self._own else None


def _sum_dtype(tensor):
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


class World:
    """One process. `MpiWorld` is the same for many."""

    rank = 0
    size = 1
    local_rank = 0
    shard_ranks = range(1)  # of `shards`, as ranks of the world

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.traffic = Traffic()
        self.everyone = self.shards = self.replicas = self.host = self.across = Group()
        self.background = Group()
        self.mailbox = Mailbox()

    def all_reduce_async(self, tensor, name):
        """Begin to sum a tensor over all ranks in place, in its own type; returns a function that waits.

        name: the same on all ranks, another for each tensor that is in flight.
        """
        return lambda: tensor

    def agreed(self):
        """`Group.agreed` of all ranks."""
        return self.everyone.agreed()

    def abort(self, code):
        """End all ranks at once, from whichever thread."""
        os._exit(code)

    def facts(self):
        """{name: value}: this process's host, and what of its environment decides how ranks meet."""
        return {"host": _host_name(), "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ}}

    def libraries(self):
        """{name: value}: what MPI and Horovod are here. ImportError where they cannot be loaded."""
        import mpi4py

        mpi4py.rc.initialize = False  # which has been done where there are ranks
        import horovod.torch as hvd
        from mpi4py import MPI

        levels = {getattr(MPI, f"THREAD_{name}"): name for name in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")}
        return {"mpi": MPI.Get_library_version().split(",")[0].strip(),
                "thread_level": levels[MPI.Query_thread()] if MPI.Is_initialized() else None,
                "horovod": [name for name in ("mpi", "gloo", "nccl", "ccl") if getattr(hvd, f"{name}_built")()]}


class MpiGroup(Group):
    """A group of ranks over an mpi4py communicator; CUDA tensors are staged through host memory."""

    def __init__(self, comm, traffic, name):
        from mpi4py import MPI

        self._comm, self._traffic, self._name = comm, traffic, name
        self._ops = {"sum": MPI.SUM, "max": MPI.MAX}
        self._in_place = MPI.IN_PLACE
        self.rank = comm.rank
        self.size = comm.size

    def _begin(self, what, num_bytes, request, finish, background):
        return self._traffic.begin(f"{self._name}.{what}", num_bytes, request.Test, finish, background)

    def all_reduce(self, tensor, op="sum"):
        return self._all_reduce(tensor, op, background=False)()

    def all_reduce_async(self, tensor):
        return self._all_reduce(tensor, "sum", background=True)

    def _all_reduce(self, tensor, op, background):
        host = tensor.cpu()
        request = self._comm.Iallreduce(self._in_place, host.numpy(), self._ops[op])
        return self._begin("all_reduce", sent_all_reduce(self.size, host.nbytes), request,
                           lambda: tensor if host is tensor else tensor.copy_(host), background)

    def all_gather(self, tensor, counts=None):
        return self._all_gather(tensor, counts, background=False)()

    def all_gather_async(self, tensor, counts=None):
        return self._all_gather(tensor, counts, background=True)

    def _all_gather(self, tensor, counts, background):
        host = tensor.detach().cpu().contiguous()
        counts = counts or [len(host)] * self.size
        assert len(host) == counts[self.rank]  # MPI would fill in whatever lies in memory
        out = host.new_empty((sum(counts), *host.shape[1:]))
        width = _width(host)
        request = self._comm.Iallgatherv(_raw(host), [_raw(out), [n * width for n in counts]])
        return self._begin("all_gather", sent_all_gather(self.size, host.nbytes), request,
                           lambda: out.to(tensor.device), background)

    def reduce_scatter_async(self, tensor, counts):
        # Pieces are exchanged and summed here: one round, half the bytes of a reduction by halves, and 16-bit
        # numbers, which MPI does not know.
        host = tensor.detach().cpu().contiguous()
        out = host.new_empty((self.size, counts[self.rank], *host.shape[1:]))
        width = _width(host)
        request = self._comm.Ialltoallv([_raw(host), [n * width for n in counts]],
                                        [_raw(out), [counts[self.rank] * width] * self.size])
        return self._begin("reduce_scatter", sent_reduce_scatter(self.size, host.nbytes), request,
                           lambda: out.sum(0, dtype=_sum_dtype(out)).to(tensor.device), background=True)

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
        # Between two ranks messages of one tag keep their order, and all ranks shift in the same order.
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
    """All ranks, for a thread beside the steps: it has a communicator of its own and sleeps while it waits."""

    def all_gather_object(self, value):
        barrier = self._comm.Ibarrier()
        while not barrier.Test():
            time.sleep(_PATIENCE_SECONDS)
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
    """A host tensor's memory for MPI, which knows no 16-bit floats: those travel as int16."""
    return (tensor.view(torch.int16) if tensor.is_floating_point() and tensor.itemsize == 2 else tensor).numpy()


class HorovodGroup(MpiGroup):
    """The same through Horovod, whose NCCL operations take CUDA tensors where they are, on a stream of their own.

    Horovod has no sends and does not reduce uint8; those and all_to_all, none of which a step needs, stay with mpi4py.
    """

    def __init__(self, comm, traffic, name, process_set):
        super().__init__(comm, traffic, name)
        import horovod.torch as hvd

        self._hvd = hvd
        self._set = process_set
        self._hvd_ops = {"sum": hvd.Sum, "max": hvd.Max}
        self._calls = 0

    def _call(self):
        # Horovod matches tensors of different ranks by name; groups call in the same order, so a count serves.
        self._calls += 1
        return {"name": f"{self._name}.{self._calls}", "process_set": self._set}

    def _begin_horovod(self, what, num_bytes, handle, finish, background):
        return self._traffic.begin(f"{self._name}.{what}", num_bytes, lambda: self._hvd.poll(handle),
                                   lambda: finish(self._hvd.synchronize(handle)), background)

    def _all_reduce(self, tensor, op, background):
        if tensor.dtype == torch.uint8:
            return super()._all_reduce(tensor, op, background)
        handle = self._hvd.allreduce_async_(tensor, op=self._hvd_ops[op], **self._call())
        return self._begin_horovod("all_reduce", sent_all_reduce(self.size, tensor.nbytes), handle, lambda t: t,
                                   background)

    def _all_gather(self, tensor, counts, background):
        tensor = tensor.detach().contiguous()
        bits = tensor.view(torch.float16) if tensor.dtype == torch.bfloat16 else tensor  # which Horovod does not know
        handle = self._hvd.allgather_async(bits, **self._call())
        return self._begin_horovod("all_gather", sent_all_gather(self.size, tensor.nbytes), handle,
                                   lambda gathered: gathered.view(tensor.dtype), background)

    def reduce_scatter_async(self, tensor, counts):
        # Horovod's own reducescatter knows only near-equal pieces, so the sum is cut here.
        whole = tensor.detach().to(_sum_dtype(tensor))
        first = sum(counts[: self.rank])
        handle = self._hvd.allreduce_async(whole, op=self._hvd.Sum, **self._call())
        return self._begin_horovod("reduce_scatter", sent_all_reduce(self.size, whole.nbytes), handle,
                                   lambda total: total[first : first + counts[self.rank]].clone(), background=True)


class MpiWorld(World):
    """The ranks of an MPI launcher, with Horovod beside mpi4py."""

    def __init__(self, device="cpu", model_parallel_size=0, collectives="auto"):
        """collectives: mpi | horovod | auto (Horovod for CUDA tensors where it has NCCL)."""
        if _launched_by_gloo():  # asked before MPI starts: a process that MPI did not launch may not get through that
            raise UserError("launched by horovodrun --gloo, under which there is no MPI for the classifier's shards: "
                            "use horovodrun --mpi, mpirun or srun --mpi=pmix")
        # Fusion would group tensors by timing, and with it the order of summation; exchange.py makes fixed buckets.
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        import horovod.torch as hvd
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        if comm.size != (_launched_size() or comm.size):
            raise UserError(
                f"the launcher started {_launched_size()} ranks, but MPI sees {comm.size}: launch with the mpirun of "
                "the MPI that the set-up used, or srun with a --mpi that it knows (srun --mpi=list)")
        _agree_at_start(None)
        hosts = _hosts(comm.allgather(_host_name()))
        across = list(zip(*hosts, strict=True)) if len({len(ranks) for ranks in hosts}) == 1 else []
        groups = _grid(comm.size, model_parallel_size)
        more = [ranks for ranks in (*hosts, *map(list, across)) if 1 < len(ranks) < comm.size]
        groups += [ranks for ranks in more if ranks not in groups]
        use_horovod = collectives == "horovod" or (collectives == "auto" and device == "cuda" and hvd.nccl_built())
        process_sets = [hvd.ProcessSet(ranks) for ranks in groups] if use_horovod else []
        hvd.init(process_sets=process_sets)
        self._check_launch(hvd, MPI)

        self._hvd = hvd
        self.rank, self.size = comm.rank, comm.size
        self.local_rank = hvd.local_rank()
        if device == "cuda":
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        self.device = torch.device(device)
        if "OMP_NUM_THREADS" not in os.environ:  # or every rank would take all cores
            cores = min(len(os.sched_getaffinity(0)), os.cpu_count() // hvd.local_size())
            torch.set_num_threads(max(1, cores))

        def group(name, ranks):
            if len(ranks) == 1:
                return Group()
            sub = comm if len(ranks) == comm.size else comm.Create_group(comm.group.Incl(ranks))
            if not use_horovod:
                return MpiGroup(sub, self.traffic, name)
            whole = len(ranks) == comm.size
            chosen = hvd.global_process_set if whole else process_sets[groups.index(ranks)]
            return HorovodGroup(sub, self.traffic, name, chosen)

        self.traffic = Traffic()
        width = model_parallel_size or comm.size
        copy = comm.rank // width
        self.everyone = group("everyone", list(range(comm.size)))
        self.background = BackgroundGroup(comm.Dup(), Traffic(), "background") if comm.size > 1 else Group()
        self.mailbox = MpiMailbox(comm.Dup())
        self.shard_ranks = range(copy * width, (copy + 1) * width)
        self.shards = group("shards", list(self.shard_ranks))
        self.replicas = group("replicas", list(range(comm.rank % width, comm.size, width)))
        self.host = group("host", next(ranks for ranks in hosts if comm.rank in ranks))
        self.across = group("across", list(across[self.host.rank])) if across else None  # hosts of different sizes

    @staticmethod
    def _check_launch(hvd, MPI):
        mpi, horovod = (MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size), (hvd.rank(), hvd.size())
        if mpi != horovod:
            raise UserError(
                f"mpi4py sees rank {mpi[0]} of {mpi[1]} but Horovod sees rank {horovod[0]} of {horovod[1]}: launch "
                "with mpirun, srun --mpi=pmix or horovodrun --mpi, and build both against the same MPI")
        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise UserError(
                f"MPI runs at thread level {MPI.Query_thread()}, MPI_THREAD_MULTIPLE ({MPI.THREAD_MULTIPLE}) is "
                "needed: use an MPI built with it and leave mpi4py.rc.thread_level alone")

    def all_reduce_async(self, tensor, name):
        # A Horovod without NCCL takes host tensors only.
        host = tensor if self._hvd.nccl_built() else tensor.cpu()
        handle = self._hvd.allreduce_async_(host, name=name, op=self._hvd.Sum)

        def finish():
            self._hvd.synchronize(handle)
            return tensor if host is tensor else tensor.copy_(host)

        return self.traffic.begin("backbone.dense", sent_all_reduce(self.size, host.nbytes),
                                  lambda: self._hvd.poll(handle), finish)

    def abort(self, code):
        from mpi4py import MPI

        threading.Timer(10, os._exit, (code,)).start()  # MPI may be what is stuck
        MPI.COMM_WORLD.Abort(code)


def _grid(size, model_parallel_size):
    """Ranks of every group of shards and of replicas that is neither one rank nor all; checks that the grid fits."""
    width = model_parallel_size or size
    if size % width:
        raise UserError(
            f"--model-parallel-size {width} does not divide the {size} ranks: take a divisor of {size}, or 0 for all")
    groups = [list(range(first, first + width)) for first in range(0, size, width)]
    groups += [list(range(first, size, width)) for first in range(width)]
    return [ranks for ranks in groups if 1 < len(ranks) < size]


def _host_name():
    """This host. XC_HOST, where it is set, says so instead: for tests of several hosts on one."""
    return os.environ.get("XC_HOST") or platform.node()


def _hosts(names):
    """Ranks on every host, from the names of all ranks' hosts."""
    return [[rank for rank, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]


def open_world(device="auto", model_parallel_size=0):
    """The world that this process was launched into."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device here: take --device cpu, or check the driver")
    if launched_rank() is not None:
        return MpiWorld(device, model_parallel_size)
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        raise UserError(f"srun started {os.environ['SLURM_STEP_NUM_TASKS']} tasks without MPI, which would all train "
                        "the same: give srun --mpi=pmix, or use mpirun")
    _grid(1, model_parallel_size)
    return World(device)


_started = False  # whether every rank has said how it came through its start


def _agree_at_start(error):
    """What went wrong before MPI ran (a flag, a file of flags, a device), of the first rank that it befell.

    Every rank calls this once: with None when it opens its world, or with its error from `run`. Raises it on all.
    """
    from mpi4py import MPI

    global _started
    if not _started:
        _started = True
        errors = [e for e in MPI.COMM_WORLD.allgather(error) if e is not None]
        if errors:
            raise UserError(errors[0])


class Leave(Exception):
    """Raised by all ranks alike: a line of rank 0, and an exit code."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


def run(main):
    """Call main(); where it fails, end this process so that no other rank waits for it.

    Leave: as it says.

    UserError, which all ranks raise alike once the world is open: rank 0 prints one line, all exit with its code.
    Anything else happened to this rank alone: it is printed with the rank and MPI ends all ranks (2 for a ValueError,
    which is bad input met on the way).
    """
    try:
        main()
        stop.ignore()
    except Leave as e:
        stop.ignore()
        if launched_rank() in (None, 0):
            print(e, flush=True)
        if launched_rank() is not None:  # the launcher ends all ranks when the first one leaves
            from mpi4py import MPI

            MPI.COMM_WORLD.Barrier()
        sys.exit(e.code)
    except UserError as e:
        under_mpi = launched_rank() is not None and not _launched_by_gloo()
        if under_mpi:
            try:
                _agree_at_start(str(e))
            except UserError as first:
                e = first
        if launched_rank() in (None, 0):
            print(f"error: {e}", file=sys.stderr, flush=True)
        # The launcher ends all ranks when the first one leaves: rank 0 must have spoken by then.
        if under_mpi:
            from mpi4py import MPI

            MPI.COMM_WORLD.Barrier()
        elif _launched_by_gloo() and launched_rank():
            time.sleep(3)
        sys.exit(e.code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        if launched_rank() is not None:
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(130)
        sys.exit(130)
    except BaseException as e:
        if isinstance(e, SystemExit) and not e.code:
            raise
        if isinstance(e, ValueError):
            code = 2
            print(f"error: rank {launched_rank() or 0}: {one_line(str(e))}", file=sys.stderr, flush=True)
        else:
            code = e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 1
            print(f"rank {launched_rank() or 0} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        if launched_rank() is not None:
            from mpi4py import MPI

            MPI.COMM_WORLD.Abort(code)
        sys.exit(code)
