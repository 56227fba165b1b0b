"""The best checkpoint of a run, for the test at its end. All ranks agree on it."""

from pathlib import Path

from xc.checkpoint.layout import best_of, check, folders, read_meta, step_of
from xc.errors import UserError
from xc.run import watchdog


def best_valid(run, evaluated_on, most_steps, world):
    """Folder of the checkpoint with the highest top-1 on some data, of at most so many steps. Its bytes are checked.

    UserError where none was evaluated on those data, or the best one is damaged. Collective.
    """
    folder = None
    with world.raise_on_all_ranks():
        if world.rank == 0:
            found = [one for one in folders(Path(run) / "checkpoints") if step_of(one) <= most_steps]
            for one in found:
                read_meta(one)  # raises where it cannot be read: it might be the best one
            folder = best_of(found, evaluated_on)
    folder = world.all_ranks.all_gather_object(folder)[0]  # not all hosts see a new folder at once
    if folder is None:
        raise UserError(f"no checkpoint of {run} was evaluated on {evaluated_on}")
    with world.raise_on_all_ranks():
        if step_of(folder) < most_steps:  # otherwise nothing is read
            check(folder, world.rank, world.size, progress=lambda _: watchdog.heartbeat("reading a checkpoint"))
    return folder
