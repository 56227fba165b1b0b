"""Which checkpoint a run resumes from. All ranks agree on it."""

import sys
from pathlib import Path

from xc.checkpoint.layout import check, folders
from xc.errors import UserError
from xc.run import watchdog


def to_resume(resume, run, world):
    """Folder of the checkpoint that --resume means, after a check of every byte; None for a new run. Collective.

    resume  the flag: auto (the newest valid checkpoint of the run), a folder, or empty

    UserError where a named checkpoint is corrupt, or all checkpoints of the run are.
    """
    if resume == "auto":
        return newest_valid(run, world)
    if not resume:
        return None
    with world.raise_on_all_ranks():
        _check(Path(resume), world)
    return Path(resume)


def newest_valid(run, world, most_steps=10**18):
    """The newest checkpoint of a run, of at most so many steps, whose checksums match; None where there is none.

    Corrupt checkpoints are skipped with a warning that names them. UserError where there are checkpoints but all are
    corrupt. Collective.
    """
    corrupt = []
    found = world.all_ranks.all_gather_object(folders(Path(run) / "checkpoints"))[0]  # not all hosts see them at once
    for folder in reversed([folder for folder in found if int(folder.name[5:]) <= most_steps]):
        try:
            with world.raise_on_all_ranks():
                _check(folder, world)
            return folder
        except UserError as error:
            corrupt.append(str(error))
            if world.rank == 0:
                print(f"warning: {error}", file=sys.stderr, flush=True)
    if corrupt:
        raise UserError(f"{corrupt[0]}, and no older checkpoint is valid: name another one by --resume, or begin a new "
                        "run in another --out")
    return None


def _check(folder, world):
    check(folder, world.rank, world.size, progress=lambda _: watchdog.heartbeat("reading a checkpoint"))
