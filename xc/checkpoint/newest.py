"""Which checkpoint a run resumes from. All ranks agree on it."""

import sys
from pathlib import Path

from xc.checkpoint.layout import check, folders
from xc.errors import UserError


def to_resume(resume, run, world):
    """Folder of the checkpoint that --resume means, every byte of which is as it was written; None to begin anew. With
    auto it is the newest whole one. UserError where a file is damaged. Collective."""
    if resume == "auto":
        return newest_whole(run, world)
    if not resume:
        return None
    with world.agreed():
        check(Path(resume), world.rank, world.size)
    return Path(resume)


def newest_whole(run, world, most_steps=10**18):
    """The newest checkpoint of a run, of at most so many steps, whose files are whole; those that are not are named.
    None where there is none; UserError where there are some but none is whole. Collective.
    """
    broken = []
    found = world.everyone.all_gather_object(folders(Path(run) / "checkpoints"))[0]  # not all hosts see them at once
    for folder in reversed([folder for folder in found if int(folder.name[5:]) <= most_steps]):
        try:
            with world.agreed():
                check(folder, world.rank, world.size)
            return folder
        except UserError as error:
            broken.append(str(error))
            if world.rank == 0:
                print(f"warning: {error}", file=sys.stderr, flush=True)
    if broken:
        raise UserError(f"{broken[0]}, and no older one is whole: name another checkpoint by --resume, or begin anew "
                        "in another --out")
    return None
