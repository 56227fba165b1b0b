"""How this process was launched, and how its failure ends every rank.

The only file that reads the launcher's environment.
"""

import os
import sys
import time
import traceback

from xc.errors import ExitRun, UserError, one_line
from xc.run import signals as stop

# Variables that a launcher sets for its ranks. SLURM_PROCID is not among them, since a batch script has it as well.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK", "HOROVOD_RANK")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "HOROVOD_SIZE", "SLURM_STEP_NUM_TASKS")


def launched_rank():
    """The rank of this process by its launcher's variables; None without a launcher."""
    return next((int(os.environ[v]) for v in _RANK_VARIABLES if v in os.environ), None)


def launched_size():
    """The number of ranks by the launcher's variables; None where they do not say."""
    return next((int(os.environ[v]) for v in _SIZE_VARIABLES if v in os.environ), None)


def launched_by_gloo():
    return os.environ.get("HOROVOD_CONTROLLER") == "gloo"


_started = False  # whether all ranks have compared the errors of their start


def agree_at_start(error):
    """Raise, on all ranks, the error of the first rank that failed before MPI ran: a flag, an argument file, a device.

    Every rank calls this once: with None when it opens its world, or with its error from `run`. Collective.
    """
    from mpi4py import MPI

    global _started
    if not _started:
        _started = True
        errors = [e for e in MPI.COMM_WORLD.allgather(error) if e is not None]
        if errors:
            raise UserError(errors[0])


def run(main):
    """Call main(); where it fails, end this process so that no other rank waits for it.

    UserError, which all ranks raise alike once the world is open: rank 0 prints one line, all exit with its code.
    Anything else happened to this rank alone: it is printed with the rank and MPI ends all ranks (2 for a ValueError,
    which is bad input met on the way).
    """
    try:
        main()
        stop.ignore()
    except ExitRun as e:
        stop.ignore()
        if launched_rank() in (None, 0):
            print(e, flush=True)
        if launched_rank() is not None:  # the launcher ends all ranks when the first one leaves
            from mpi4py import MPI

            MPI.COMM_WORLD.Barrier()
        sys.exit(e.code)
    except UserError as e:
        under_mpi = launched_rank() is not None and not launched_by_gloo()
        if under_mpi:
            try:
                agree_at_start(str(e))
            except UserError as first:
                e = first
        if launched_rank() in (None, 0):
            print(f"error: {e}", file=sys.stderr, flush=True)
        # The launcher ends all ranks when the first one leaves: rank 0 must have spoken by then.
        if under_mpi:
            from mpi4py import MPI

            MPI.COMM_WORLD.Barrier()
        elif launched_by_gloo() and launched_rank():
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
