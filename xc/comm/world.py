"""The ranks of a run: one process, or many under MPI.

`World` is one process, and the contract; `MpiWorld` is the same for many. The ranks form a grid:

    world.shards      the ranks that together hold one copy of the classifier
    world.replicas    the ranks that hold the same shard in different copies
    world.all_ranks   all of them; world.background: all of them again, for a background thread
    world.host        the ranks on this host
    world.cross_host  the ranks with the same place on every host

A `Group` (groups.py) has the collectives. The backbone's dense gradients go through `World.all_reduce_async`, which is
Horovod's. All collectives SUM; nothing in here averages.
"""

import os
import platform
import threading

import torch

from xc.comm.groups import BackgroundGroup, Group, HorovodGroup, Mailbox, MpiGroup, MpiMailbox
from xc.comm.launch import agree_at_start, launched_by_gloo, launched_rank, launched_size
from xc.comm.traffic import Traffic, sent_all_reduce
from xc.errors import UserError

# Variables by which people repair ranks that are slow or do not reach each other.
_NETWORK_VARIABLES = ("OMP_NUM_THREADS", "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude",
                      "OMPI_MCA_btl_tcp_links", "OMPI_MCA_btl", "OMPI_MCA_pml")


class World:
    """One process, and the contract of `MpiWorld`."""

    rank = 0
    size = 1
    local_rank = 0
    shard_ranks = range(1)  # of `shards`, as ranks of the world

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.traffic = Traffic()
        self.all_ranks = self.shards = self.replicas = self.host = self.cross_host = Group()
        self.background = Group()
        self.mailbox = Mailbox()

    def all_reduce_async(self, tensor, name):
        """Begin to sum a tensor over all ranks in place, in its own type; returns a function that waits.

        name  the same on all ranks, and different for every tensor in flight
        """
        return lambda: tensor

    def raise_on_all_ranks(self):
        """`Group.raise_on_all_ranks` of all ranks."""
        return self.all_ranks.raise_on_all_ranks()

    def abort(self, code):
        """End all ranks at once, from any thread."""
        os._exit(code)

    def facts(self):
        """{name: value}: the host of this process, and the variables that decide how ranks reach each other."""
        settings = {name: os.environ[name] for name in _NETWORK_VARIABLES if name in os.environ}
        return {"host": _host_name(), "settings": settings}

    def libraries(self):
        """{name: value}: versions and features of MPI and Horovod. ImportError where they cannot be loaded."""
        import mpi4py

        mpi4py.rc.initialize = False  # where there are ranks, MPI has been initialised
        import horovod.torch as hvd
        from mpi4py import MPI

        levels = {getattr(MPI, f"THREAD_{name}"): name for name in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")}
        return {"mpi": MPI.Get_library_version().split(",")[0].strip(),
                "thread_level": levels[MPI.Query_thread()] if MPI.Is_initialized() else None,
                "horovod": [name for name in ("mpi", "gloo", "nccl", "ccl") if getattr(hvd, f"{name}_built")()]}


class MpiWorld(World):
    """The ranks of an MPI launcher, with mpi4py and Horovod."""

    def __init__(self, device="cpu", model_parallel_size=0, collectives="auto"):
        """collectives: mpi | horovod | auto (Horovod for CUDA tensors where it has NCCL)."""
        if launched_by_gloo():  # before MPI starts, which may hang in a process that MPI did not launch
            raise UserError("launched by horovodrun --gloo, under which there is no MPI for the classifier's shards: "
                            "use horovodrun --mpi, mpirun or srun --mpi=pmix")
        # Horovod's fusion groups tensors by timing, which changes the order of summation; gradients/ has fixed buckets.
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        import horovod.torch as hvd
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        if comm.size != (launched_size() or comm.size):
            raise UserError(
                f"the launcher started {launched_size()} ranks, but MPI sees {comm.size}: launch with the mpirun of "
                "the MPI that the set-up used, or srun with a --mpi that it knows (srun --mpi=list)")
        agree_at_start(None)
        hosts = _hosts(comm.allgather(_host_name()))
        across = list(zip(*hosts, strict=True)) if len({len(ranks) for ranks in hosts}) == 1 else []
        groups = _grid(comm.size, model_parallel_size)
        other_groups = [ranks for ranks in (*hosts, *map(list, across)) if 1 < len(ranks) < comm.size]
        groups += [ranks for ranks in other_groups if ranks not in groups]
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
        if "OMP_NUM_THREADS" not in os.environ:  # without this every rank would take all cores
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
        self.all_ranks = group("all_ranks", list(range(comm.size)))
        self.background = BackgroundGroup(comm.Dup(), Traffic(), "background") if comm.size > 1 else Group()
        self.mailbox = MpiMailbox(comm.Dup())
        self.shard_ranks = range(copy * width, (copy + 1) * width)
        self.shards = group("shards", list(self.shard_ranks))
        self.replicas = group("replicas", list(range(comm.rank % width, comm.size, width)))
        self.host = group("host", next(ranks for ranks in hosts if comm.rank in ranks))
        # None where hosts have different numbers of ranks.
        self.cross_host = group("cross_host", list(across[self.host.rank])) if across else None

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
    """The groups of shards and of replicas, as lists of ranks, but for those of one rank and of all.

    UserError where the size of a copy does not divide the number of ranks.
    """
    width = model_parallel_size or size
    if size % width:
        raise UserError(
            f"--model-parallel-size {width} does not divide the {size} ranks: take a divisor of {size}, or 0 for all")
    groups = [list(range(first, first + width)) for first in range(0, size, width)]
    groups += [list(range(first, size, width)) for first in range(width)]
    return [ranks for ranks in groups if 1 < len(ranks) < size]


def _host_name():
    """Name of this host. XC_HOST overrides it, so that tests can have several hosts on one machine."""
    return os.environ.get("XC_HOST") or platform.node()


def _hosts(names):
    """Lists of the ranks on every host, from the host names of all ranks."""
    return [[rank for rank, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]


def open_world(device="auto", model_parallel_size=0):
    """The World that this process was launched into. UserError where the launch or the device cannot work."""
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


