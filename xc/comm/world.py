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
import threading

import torch

from xc.comm.groups import BackgroundGroup, Group, HorovodGroup, Mailbox, MpiGroup, MpiMailbox
from xc.comm.launch import agree_at_start, launched_by_gloo, launched_rank, launched_size
from xc.comm.traffic import Traffic, sent_all_reduce
from xc.errors import UserError

# By which people mend ranks that are slow or do not meet.
_SETTINGS = ("OMP_NUM_THREADS", "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude", "OMPI_MCA_btl_tcp_links",
             "OMPI_MCA_btl", "OMPI_MCA_pml")


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


class MpiWorld(World):
    """The ranks of an MPI launcher, with Horovod beside mpi4py."""

    def __init__(self, device="cpu", model_parallel_size=0, collectives="auto"):
        """collectives: mpi | horovod | auto (Horovod for CUDA tensors where it has NCCL)."""
        if launched_by_gloo():  # asked before MPI starts: a process that MPI did not launch may not get through that
            raise UserError("launched by horovodrun --gloo, under which there is no MPI for the classifier's shards: "
                            "use horovodrun --mpi, mpirun or srun --mpi=pmix")
        # Fusion would group tensors by timing, and with it the order of summation; exchange.py makes fixed buckets.
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


