"""How this process was launched, and how a failure of one rank ends all ranks.

Only this file and world.py read the launcher's environment variables.
"""

import os
import subprocess
import sys
import time
import traceback

from xc.errors import ExitRun, UserError, is_out_of_memory, one_line
from xc.run import signals as stop

# Variables that a launcher sets for its ranks. SLURM_PROCID is not one of them: a batch script has it, too.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "HOROVOD_RANK")
_OTHER_LAUNCHERS = ("OMPI_COMM_WORLD_", "PMIX_", "SLURM_STEP_", "MV2_COMM_WORLD_", "HOROVOD_")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")


def launched_rank():
    """The rank of this process, from its launcher's variables; None without a launcher."""
    return next((int(os.environ[v]) for v in _RANK_VARIABLES if os.environ.get(v, "").isdigit()), None)


def launched_size():
    """The number of ranks, from the launcher's variables; None if they do not tell."""
    return next((int(os.environ[v]) for v in _SIZE_VARIABLES if os.environ.get(v, "").isdigit()), None)


def stray_launch():
    """(what started this process, number of processes, rank) where its launcher and MPI do not go together; else None.

    Without MPI, each of several processes would train alone. Open MPI does not know the launcher of MPICH and Intel MPI
    (hydra), and ends with a page of its own when it starts there. What torchrun starts inherits the variables of an MPI
    launcher around it.
    """
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE") != "1"
    if launched_rank() is not None and not by_torchrun:
        by_hydra = "PMI_RANK" in os.environ and not any(name.startswith(_OTHER_LAUNCHERS) for name in os.environ)
        if by_hydra and _vendor() == "Open MPI":
            return "the launcher of MPICH or Intel MPI", launched_size() or 1, launched_rank()
        return None
    for launcher, size, rank in (("torchrun" if by_torchrun else "a launcher of torch", "WORLD_SIZE", "RANK"),
                                 ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")):
        size, rank = os.environ.get(size, ""), os.environ.get(rank, "")
        if size.isdigit() and int(size) > 1 and rank.isdigit():
            return launcher, int(size), int(rank)
    return None


def _vendor():
    """Name of the MPI that mpi4py was built with. In a process of its own: here MPI would start, too."""
    code = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.get_vendor()[0])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def launched_by_gloo():
    """Whether `horovodrun --gloo` launched this process. There is no MPI then."""
    return os.environ.get("HOROVOD_CONTROLLER") == "gloo"


_compared = False  # whether all ranks have compared the errors of their start


def raise_start_errors(error):
    """Raise on all ranks the error of the first rank whose start failed: a bad flag, argument file or device.

    Every rank calls this once: with None when it opens its world, or with its error from `run`. Collective.
    """
    from mpi4py import MPI

    global _compared
    if not _compared:
        _compared = True
        errors = [e for e in MPI.COMM_WORLD.allgather(error) if e is not None]
        if errors:
            raise UserError(errors[0])


def run(main):
    """Call main(). If it fails, end this process in such a way that no other rank waits for it.

    UserError  all ranks raise the same one: rank 0 prints one line, and all ranks exit with its code
    ExitRun    likewise, with the line on standard output
    others     this rank alone failed: it prints the error with its rank, and MPI ends all ranks. The code is 2 for a
               ValueError, which means bad input met during the run, and where memory has ended
    """
    try:
        main()
        stop.ignore()
    except ExitRun as e:
        stop.ignore()
        if launched_rank() in (None, 0):
            print(e, flush=True)
        _barrier()  # the launcher ends all ranks when the first one exits
        sys.exit(e.code)
    except UserError as e:
        _exit_with(e)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        _end_all_ranks(130)
    except BaseException as e:
        if isinstance(e, SystemExit) and not e.code:
            raise
        if isinstance(e, ValueError):
            code = 2
            print(f"error: rank {launched_rank() or 0}: {one_line(str(e))}", file=sys.stderr, flush=True)
        elif is_out_of_memory(e):
            code = 2
            print(f"error: rank {launched_rank() or 0} has no memory left ({one_line(str(e))}): --check with the flags "
                  "of the run says what takes how much; checkpoints are as they were", file=sys.stderr, flush=True)
        else:
            code = e.code if isinstance(e, SystemExit) and isinstance(e.code, int) else 1
            print(f"rank {launched_rank() or 0} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        _end_all_ranks(code)


def _exit_with(error):
    """End all ranks with a UserError that each of them has. Rank 0 prints it."""
    stray = stray_launch()
    if not (launched_by_gloo() or stray) and launched_rank() is not None:
        try:
            raise_start_errors(str(error))
        except UserError as first:
            error = first
    rank = stray[2] if stray else launched_rank()
    if rank in (None, 0):
        print(f"error: {error}", file=sys.stderr, flush=True)
    # The launcher ends all ranks when the first one exits, so the others wait until rank 0 has printed.
    if not (launched_by_gloo() or stray):
        _barrier()
    if rank and (launched_by_gloo() or stray or not _joined_by_mpi()):
        time.sleep(3)
    sys.exit(error.code)


def _joined_by_mpi():
    """Whether MPI joins the ranks that the launcher started; an MPI that did not start them sees this one alone."""
    from mpi4py import MPI

    return MPI.COMM_WORLD.size == (launched_size() or MPI.COMM_WORLD.size)


def _barrier():
    """Wait for all ranks, if a launcher started this process. Collective."""
    if launched_rank() is not None:
        from mpi4py import MPI

        MPI.COMM_WORLD.Barrier()


def _end_all_ranks(code):
    """End this rank, and with it all other ranks."""
    if launched_rank() is not None:
        from mpi4py import MPI

        MPI.COMM_WORLD.Abort(code)
    sys.exit(code)
