"""The ranks of a run: one process, or many under MPI.

`World` is a single process. `MpiWorld` follows its contract for many. The ranks form a grid:

    world.all_ranks   all ranks
    world.background  all ranks once more, for a background thread
    world.shards      the ranks that together hold one copy of the classifier
    world.replicas    the ranks that hold the same shard, one in each copy
    world.host        the ranks on this host
    world.cross_host  one rank of each host: those with this rank's index on its host; None on hosts of different sizes

Each of them is a `Group` (groups.py), which has the collectives. The backbone's dense gradients use
`World.all_reduce_async` instead, which is Horovod's. All collectives sum; none averages.
"""

import os
import platform
import threading

import torch

from xc.comm.groups import BackgroundGroup, Group, HorovodGroup, Mailbox, MpiGroup, MpiMailbox
from xc.comm.launch import launched_by_gloo, launched_rank, launched_size, raise_start_errors, stray_launch
from xc.comm.traffic import Traffic, sent_all_reduce
from xc.errors import UserError

# Variables that people set where ranks are slow or cannot reach each other.
_NETWORK_VARIABLES = ("OMP_NUM_THREADS", "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude",
                      "OMPI_MCA_btl_tcp_links", "OMPI_MCA_btl", "OMPI_MCA_pml")


class World:
    """A single process.

    rank, size   of this process among all ranks
    local_rank   rank among the processes on this host
    shard_ranks  the ranks of the group `shards`, numbered as in the world
    device       of the tensors that the ranks exchange
    traffic      what this rank sends and waits for
    mailbox      short messages between ranks, for one background thread
    """

    rank = 0
    size = 1
    local_rank = 0
    shard_ranks = range(1)

    def __init__(self, device="cpu"):
        self.device = torch.device(device)
        self.traffic = Traffic()
        self.all_ranks = self.shards = self.replicas = self.host = self.cross_host = Group()
        self.background = Group()
        self.mailbox = Mailbox()

    def all_reduce_async(self, tensor, name):
        """Begin an in-place sum over all ranks, in the tensor's own type. Returns a function that waits for the sum.

        name  the same on all ranks, and different for all sums that are under way
        """
        return lambda: tensor

    def raise_on_all_ranks(self):
        """`Group.raise_on_all_ranks` of the group of all ranks."""
        return self.all_ranks.raise_on_all_ranks()

    def abort(self, code):
        """End all ranks at once. Any thread may call it."""
        os._exit(code)

    def facts(self):
        """{"host": name, "settings": {variable: value}}: the variables that decide how ranks reach each other."""
        settings = {name: os.environ[name] for name in _NETWORK_VARIABLES if name in os.environ}
        return {"host": _host_name(), "settings": settings}

    def libraries(self):
        """{name: value}: versions and features of MPI and Horovod. ImportError if they cannot be loaded."""
        import mpi4py

        mpi4py.rc.initialize = False  # MPI runs already if there are several ranks
        import horovod.torch as hvd
        from mpi4py import MPI

        levels = {getattr(MPI, f"THREAD_{name}"): name for name in ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")}
        return {"mpi": MPI.Get_library_version().split(",")[0].strip(),
                "thread_level": levels[MPI.Query_thread()] if MPI.Is_initialized() else None,
                "horovod": [name for name in ("mpi", "gloo", "nccl", "ccl") if getattr(hvd, f"{name}_built")()]}


class MpiWorld(World):
    """The ranks that an MPI launcher started, with mpi4py and Horovod. To construct it is collective."""

    def __init__(self, device="cpu", model_parallel_size=0, collectives="auto"):
        """collectives: mpi | horovod | auto (Horovod for CUDA tensors if it has NCCL). UserError for a bad launch."""
        if launched_by_gloo():  # checked before MPI starts: it may hang in a process that it did not launch
            raise UserError("launched by horovodrun --gloo, under which there is no MPI for the classifier's shards: "
                            "use horovodrun --mpi, mpirun or srun --mpi=pmix")
        # Horovod's fusion groups tensors by timing, so it would change the order of summation from run to run.
        os.environ.setdefault("HOROVOD_FUSION_THRESHOLD", "0")
        import horovod.torch as hvd
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        if comm.size != (launched_size() or comm.size):
            raise UserError(
                f"the launcher started {launched_size()} ranks, but MPI sees {comm.size}: launch with the mpirun of "
                "the MPI that the set-up used, or srun with a --mpi that it knows (srun --mpi=list)")
        raise_start_errors(None)
        hosts = _hosts(comm.allgather(_host_name()))
        groups = _grid(comm.size, model_parallel_size)
        host_groups = [ranks for ranks in (*hosts, *_cross_host(hosts)) if 1 < len(ranks) < comm.size]
        groups += [ranks for ranks in host_groups if ranks not in groups]
        use_horovod = collectives == "horovod" or (collectives == "auto" and device == "cuda" and hvd.nccl_built())
        process_sets = [hvd.ProcessSet(ranks) for ranks in groups] if use_horovod else []
        hvd.init(process_sets=process_sets)
        self._check_launch(hvd, MPI)

        self._hvd, self.traffic = hvd, Traffic()
        self.rank, self.size = comm.rank, comm.size
        self.local_rank = hvd.local_rank()
        if device == "cuda":
            torch.cuda.set_device(self.local_rank % torch.cuda.device_count())
        self.device = torch.device(device)
        if "OMP_NUM_THREADS" not in os.environ:  # without this every rank would take all cores
            cores = min(len(os.sched_getaffinity(0)), os.cpu_count() // hvd.local_size())
            torch.set_num_threads(max(1, cores))

        def process_set(ranks):
            return hvd.global_process_set if len(ranks) == comm.size else process_sets[groups.index(ranks)]

        self._make_groups(comm, hosts, model_parallel_size or comm.size, process_set if use_horovod else None)

    def _make_groups(self, comm, hosts, width, process_set):
        """Create the groups and the mailbox. Collective.

        hosts        lists of the ranks on every host
        width        ranks of a copy of the classifier
        process_set  ranks -> their Horovod process set; None if mpi4py does the collectives
        """
        def group(name, ranks):
            if len(ranks) == 1:
                return Group()
            sub = comm if len(ranks) == comm.size else comm.Create_group(comm.group.Incl(ranks))
            if process_set is None:
                return MpiGroup(sub, self.traffic, name)
            return HorovodGroup(sub, self.traffic, name, process_set(ranks))

        copy = comm.rank // width
        self.all_ranks = group("all_ranks", list(range(comm.size)))
        self.background = BackgroundGroup(comm.Dup(), Traffic(), "background") if comm.size > 1 else Group()
        self.mailbox = MpiMailbox(comm.Dup())
        self.shard_ranks = range(copy * width, (copy + 1) * width)
        self.shards = group("shards", list(self.shard_ranks))
        self.replicas = group("replicas", list(range(comm.rank % width, comm.size, width)))
        self.host = group("host", next(ranks for ranks in hosts if comm.rank in ranks))
        cross_host = _cross_host(hosts)
        self.cross_host = group("cross_host", cross_host[self.host.rank]) if cross_host else None

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
        # Without NCCL, Horovod takes host tensors only.
        host = tensor if self._hvd.nccl_built() else tensor.cpu()
        handle = self._hvd.allreduce_async_(host, name=name, op=self._hvd.Sum)

        def finish():
            self._hvd.synchronize(handle)
            return tensor if host is tensor else tensor.copy_(host)

        return self.traffic.begin("backbone.dense", sent_all_reduce(self.size, host.nbytes),
                                  lambda: self._hvd.poll(handle), finish)

    def abort(self, code):
        from mpi4py import MPI

        threading.Timer(10, os._exit, (code,)).start()  # in case MPI itself is stuck
        MPI.COMM_WORLD.Abort(code)


def _grid(size, model_parallel_size):
    """Lists of the ranks of each group of shards and of replicas. Groups of one rank or of all ranks are left out.

    UserError if the size of a copy does not divide the number of ranks.
    """
    width = model_parallel_size or size
    if size % width:
        raise UserError(
            f"--model-parallel-size {width} does not divide the {size} ranks: take a divisor of {size}, or 0 for all")
    groups = [list(range(first, first + width)) for first in range(0, size, width)]
    groups += [list(range(first, size, width)) for first in range(width)]
    return [ranks for ranks in groups if 1 < len(ranks) < size]


def _host_name():
    """The name of this host. XC_HOST overrides it, so that tests can have several hosts on one machine."""
    return os.environ.get("XC_HOST") or platform.node()


def _hosts(names):
    """Lists of the ranks on every host, from the host names of all ranks."""
    return [[rank for rank, other in enumerate(names) if other == name] for name in dict.fromkeys(names)]


def _cross_host(hosts):
    """Lists of the ranks with the same index on every host; empty if hosts have different numbers of ranks."""
    return [list(ranks) for ranks in zip(*hosts, strict=True)] if len({len(ranks) for ranks in hosts}) == 1 else []


def open_world(device="auto", model_parallel_size=0):
    """The World that this process was launched into. UserError if the launch or the device cannot work. Collective."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch finds no CUDA device here: use --device cpu, or check the driver")
    if stray := stray_launch():
        raise UserError(f"{stray[0]} started {stray[1]} processes, which MPI does not join, and each would train "
                        "alone: use mpirun, horovodrun or srun --mpi=pmix")
    if launched_rank() is not None:
        return MpiWorld(device, model_parallel_size)
    _grid(1, model_parallel_size)
    return World(device)


