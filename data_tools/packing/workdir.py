"""The work folder beside OUT in which a pack is made: who owns it, and when it is removed."""

import fcntl
import glob
import hashlib
import json
import os
import platform
import secrets
import shutil
import stat
from contextlib import contextmanager

from data_tools.common.progress import note
from data_tools.sources.splits import split_of
from xc.data import pack as layout
from xc.data.pack import PackError
from xc.files import sync_tree


def path_for(out):
    return os.path.join(os.path.dirname(out), f".{os.path.basename(out)}{layout.PARTIAL}pack")


def what_is_kept(out):
    """End of a message: what an interrupted pack has left for the next attempt."""
    folder = path_for(os.path.abspath(out))
    if os.path.isdir(folder):
        return f"{folder} keeps what was done: the same command resumes from there"
    return "nothing was kept"


def fingerprint(path):
    """Text that changes if a file changes; of a folder and its folders of splits, if a file or a folder in it changes.

    It reads sizes and times only. OSError where there is no such path.
    """
    os.stat(path)
    paths = [path]
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            folders = [path, *(entry.path for entry in entries if split_of(entry.name) and entry.is_dir())]
        paths = (entry.path for folder in folders for entry in os.scandir(folder))
    total = 0  # a sum of hashes needs no sorting: there may be a folder for every class
    for found in paths:
        try:
            status = os.stat(found)
        except OSError:
            continue  # a broken link
        facts = os.path.relpath(found, path), stat.S_ISDIR(status.st_mode) or status.st_size, status.st_mtime_ns
        total += int.from_bytes(hashlib.sha256(repr(facts).encode()).digest(), "big")
    return f"{total % 2**256:064x}"


def open_folder(out, description, restart):
    """The work folder for a pack at out: a new one, or one that the same command has left there.

    description  dict for JSON of all that the bytes of the pack depend on
    restart      whether to remove what another process has left

    PackError where another command has left one, or where restart finds it in use.
    """
    folder = path_for(out)
    description = json.loads(json.dumps(description))
    for gone in glob.glob(glob.escape(_gone(folder)) + "*"):  # removals that were interrupted
        shutil.rmtree(gone, ignore_errors=True)
    if restart and os.path.isdir(folder):
        for name in os.listdir(folder):
            if name.endswith(".lock"):
                with _locked(os.path.join(folder, name), out):
                    pass
        discard(folder)
    if not os.path.isdir(folder):
        new = f"{folder}-{secrets.token_hex(4)}"
        os.mkdir(new)
        try:
            with open(os.path.join(new, "description.json"), "w") as file:
                json.dump(description, file)
            sync_tree(new)
            os.rename(new, folder)
            return folder
        except OSError:
            if not os.path.isdir(folder):  # otherwise another process was faster
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    try:
        with open(os.path.join(folder, "description.json")) as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise PackError(f"{folder} is in the way and is not an unfinished pack ({error}); remove it") from error
    if different := [f"{name} {found.get(name)!r}, now {description.get(name)!r}"
                     for name in sorted(found.keys() | description.keys()) if found.get(name) != description.get(name)]:
        raise PackError(f"{folder} was left by another command for {out}: {'; '.join(different)}. Give that command to "
                        "resume it, or remove the folder (--restart does)")
    return folder


@contextmanager
def cleaned_up(folder, out, alone, is_listed, has_shards):
    """On an error: removes the work folder if nothing can be resumed from it; otherwise the error says that it stays.

    alone                  whether this process makes the whole pack
    is_listed, has_shards  functions: whether the images are listed, and whether this part has shards
    """
    try:
        yield
    except BaseException as error:  # Ctrl-C too
        if not os.path.isdir(folder):
            raise
        by_user = isinstance(error, PackError)
        if not is_listed() or by_user and alone and not has_shards():
            discard(folder)
        elif by_user:
            raise PackError(f"{error}; {what_is_kept(out)}") from error
        raise


@contextmanager
def owned(folder, part, out):
    """In this block the part belongs to this process; the lock ends with the process, even if it is killed."""
    with _locked(os.path.join(folder, f"part-{part}.lock"), out):
        yield


@contextmanager
def _locked(path, out):
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise PackError(f"{file.read().strip()} is packing {out}; wait for its end") from error
        except OSError as error:
            note(f"{path} cannot be locked ({error.strerror}): take care that no other process makes this pack")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def discard(folder):
    """Removes the folder; other processes see it disappear at once."""
    gone = f"{_gone(folder)}{secrets.token_hex(4)}"
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _gone(folder):
    return f"{folder}-gone-"
