"""Writes checkpoints in a background thread and deletes old ones. layout.py says what is in them."""

import os
import secrets
import shutil
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from xc.checkpoint import layout, tensor_file
from xc.checkpoint import state as checkpoint
from xc.checkpoint.snapshot import Snapshot
from xc.errors import UserError
from xc.files import sync
from xc.run import watchdog


class SaveError(UserError):
    """Every rank raises it. It is no mistake of the user: the same command can resume once there is room again."""

    code = 1


_POLL_SECONDS = 0.2  # between two looks at how far the writing is
_WORK_SECONDS, _REST = 0.02, 24  # the thread works for so long, then rests so many times as long as it worked


class CheckpointWriter:
    """Writes checkpoints while training goes on: a thread writes the state as it was at `save`. One save at a time.

    The class rows and their momentum are read as the thread comes to them: see Snapshot. What the choice of classes
    depends on never changes in place. The rest is copied by `save`, into memory that stays: residuals, and on rank 0
    the backbone.

    Where ranks have no core to spare, the thread rests most of the time, so that steps are less delayed; a save
    then takes minutes. It hurries as soon as anything waits for it: an update, the next save, the end of the run.

    A save that fails on one rank is given up on all of them with a warning; older checkpoints stay. After
    `most_failures` failures in a row every rank raises a SaveError.
    """

    def __init__(self, run, world, identity, keep, evaluated_on=None, most_failures=3):
        """identity: what a run must have in common with this one to resume from its checkpoints: seed, digest of
        classes, …

        keep: so many of the last checkpoints stay, and the one with the highest top-1.

        evaluated_on: the data that top-1 is measured on; None where there are none
        """
        self._folder, self._world, self._identity, self._keep = Path(run) / "checkpoints", world, identity, keep
        self._evaluated_on = evaluated_on
        self._most_failures, self._failures, self._thread, self._error = most_failures, 0, None, None
        self._copies = {}  # {file name: {name: tensor}} of the last save, of what is copied
        self._snapshot, self._row_optimizer = None, None
        self._moved = 0, False  # blocks that the thread has done, and whether it waits for other ranks
        self._hurry, self._worked = threading.Event(), 0.0
        self._rests = world.host.size * torch.get_num_threads() >= len(os.sched_getaffinity(0))

    def save(self, state, progress, top1=None):
        """Begin to write the state at this progress, with the top-1 of its evaluation, if any. Collective."""
        self.finish()
        self._hurry.clear()
        of_rows, of_head, others = checkpoint.files_of(state, self._world)
        last = self._copies
        self._copies = {name: {key: _copied(tensor, last.get(name, {}).get(key)) for key, tensor in tables.items()}
                        for name, tables in others.items()}
        files = {}
        for name, tables in of_rows.items():  # one file at most; first, since rows that change meanwhile are put aside
            self._snapshot, self._row_optimizer = Snapshot(tables, on_wait=self._hurry.set), state.head_optimizer
            self._row_optimizer.before_update = self._snapshot.before_update
            files[name] = self._snapshot.tensors()
        files |= {name: {key: tensor_file.pieces_of(tensor) for key, tensor in tables.items()}
                  for name, tables in (self._copies | of_head).items()}
        meta = checkpoint.meta_of(state, progress) | self._identity
        meta |= {"top1": top1, "evaluated_on": None if top1 is None else self._evaluated_on}
        self._moved = 0, False
        self._thread = threading.Thread(target=self._write, args=(files, meta), name="checkpoint")
        self._thread.start()

    def add_top1(self, folder, top1):
        """Add the top-1 of an evaluation to a checkpoint that was written without."""
        if self._world.rank == 0:
            try:
                layout.add_top1(folder, top1, self._evaluated_on)
            except OSError as error:
                print(f"warning: {folder} lacks its top-1, which could not be written ({error})", file=sys.stderr,
                      flush=True)

    def finish(self, last=False):
        """Wait until the save in flight is on the disk or given up. Collective.

        last: the last save of a run must not be given up; SaveError where it was.
        """
        if self._thread is None:
            return
        seen = None
        self._hurry.set()
        while self._thread.is_alive():
            if self._moved != seen:
                seen = self._moved
                watchdog.heartbeat("writing a checkpoint", waits=seen[1])
            self._thread.join(_POLL_SECONDS)
        self._thread, error, self._error = None, self._error, None
        if self._snapshot:
            self._snapshot, self._row_optimizer.before_update = None, None
        if isinstance(error, UserError):
            self._failures += 1
            if self._failures >= self._most_failures or last:
                raise SaveError(f"{self._failures} checkpoint(s) in a row could not be written ({error}): mend that, "
                                "then resume from the last one by --resume auto")
            if self._world.rank == 0:
                print(f"warning: a checkpoint could not be written ({error}); training goes on, older "
                      "checkpoints stay", file=sys.stderr, flush=True)
        elif error:
            raise error
        else:
            self._failures = 0

    def _write(self, files, meta):
        """The background thread. All ranks do the same, each with its own files."""
        with suppress(AttributeError, OSError):  # on Linux: this thread alone, so that training comes first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        self._worked = time.thread_time()
        group, rank, snapshot = self._world.background, self._world.rank, self._snapshot
        folder = self._folder / f"step-{meta['step']:08d}"
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            with _agreed(group):
                if rank == 0:
                    for left in self._folder.glob(".step-*.partial"):  # left by a run that was killed
                        shutil.rmtree(left, ignore_errors=True)
                    partial.mkdir(parents=True)
            written = {}
            with _agreed(group):
                try:
                    for name, tables in files.items():
                        written[name] = tensor_file.write(partial / name, tables, progress=self._work_done)
                finally:
                    if snapshot:
                        snapshot.close()  # before the other ranks are heard of: no step must wait for what is not read
                self._moved = self._moved[0] + 1, True
            files = {name: facts for of_rank in group.all_gather_object(written) for name, facts in of_rank.items()}
            with _agreed(group):
                if rank == 0:
                    rows = layout.rows_among(files)
                    layout.write_meta(partial, meta | {"rows": rows, "files": files})
                    for path in partial / "meta.json", partial:
                        self._moves_on()
                        sync(path)
                    self._moves_on()
                    _take_place(partial, folder)
            if rank == 0:  # not agreed on: the new checkpoint is valid, whatever cannot be deleted
                self._prune(folder)
        except Exception as error:
            self._error = error
            if rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
        finally:
            if snapshot:
                snapshot.close()

    def _work_done(self, num_bytes):
        """Called after every piece that was written."""
        self._moves_on()
        worked = time.thread_time() - self._worked
        if self._rests and worked > _WORK_SECONDS:
            self._hurry.wait(_REST * worked)
            self._worked = time.thread_time()

    def _moves_on(self):
        self._moved = self._moved[0] + 1, False

    def _prune(self, newest):
        """Delete checkpoints that are not kept, and those of later steps: a run that resumed from an earlier step left
        them."""
        folders = layout.folders(self._folder)
        earlier = folders[: folders.index(newest) + 1]
        kept = {*earlier[-self._keep :], layout.best_of(earlier, self._evaluated_on)}
        errors = []
        for folder in folders:
            if folder not in kept:
                with _noting(errors):
                    folder.rename(_hidden(folder))  # so that a kill leaves no half-deleted checkpoint with a valid name
        for hidden in self._folder.glob(".step-*.removed*"):
            with _noting(errors):
                hidden.unlink() if hidden.is_symlink() else shutil.rmtree(hidden)
        if errors:
            print(f"warning: an old checkpoint could not be deleted ({errors[0]}); the new one is valid, training "
                  "goes on", file=sys.stderr, flush=True)


@contextmanager
def _agreed(group):
    """`Group.raise_on_all_ranks` of the writing threads, for errors of every kind: the other ranks must hear of each,
    or they would wait for ever.
    """
    with group.raise_on_all_ranks():
        try:
            yield
        except Exception as error:
            raise OSError(" ".join(str(error).split()) or repr(error)) from error


@contextmanager
def _noting(errors):
    try:
        yield
    except OSError as error:
        errors.append(error)


def _take_place(partial, folder):
    """Give a complete checkpoint its final name; replaces one that an earlier launch wrote at the same step."""
    hidden = _hidden(folder)
    if folder.exists():
        folder.rename(hidden)
    try:
        partial.rename(folder)
    except OSError:
        if hidden.exists():
            hidden.rename(folder)
        raise
    sync(folder.parent)


def _hidden(folder):
    """A new name for a folder to be removed. It is unique, since an older one may still be there."""
    return folder.with_name(f".{folder.name}.removed-{secrets.token_hex(4)}")


def _copied(tensor, last):
    """A copy in host memory, in the memory of the last copy where it fits: fresh pages take longer than the copying."""
    if last is None or (last.shape, last.dtype) != (tensor.shape, tensor.dtype):
        last = torch.empty(tensor.shape, dtype=tensor.dtype)
    return last.copy_(tensor.detach())
