"""The folder beside OUT in which a pack is made: whose it is, and when it goes."""

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

from data_tools.sources.base import SPLIT_OF
from xc import pack as layout
from xc.disk import sync_tree
from xc.pack import PackError


def path_for(out):
    return os.path.join(os.path.dirname(out), f".{os.path.basename(out)}{layout.PARTIAL}pack")


def what_is_kept(out):
    """What the end of a message says of it."""
    folder = path_for(os.path.abspath(out))
    if os.path.isdir(folder):
        return f"{folder} keeps what was done: the same command goes on from there"
    return "nothing was kept"


def fingerprint(path):
    """What tells cheaply whether a file changed, or in a folder and its folders of splits a file or the entries of a
    folder."""
    os.stat(path)  # what is not there has no fingerprint
    paths = [path]
    if os.path.isdir(path):
        folders = [path, *(os.path.join(path, split) for split in SPLIT_OF)]
        paths = (entry.path for folder in folders if os.path.isdir(folder) for entry in os.scandir(folder))
    total = 0  # of hashes, in any order: there may be a folder for every class
    for found in paths:
        try:
            status = os.stat(found)
        except OSError:
            continue  # a link to nowhere
        facts = os.path.relpath(found, path), stat.S_ISDIR(status.st_mode) or status.st_size, status.st_mtime_ns
        total += int.from_bytes(hashlib.sha256(repr(facts).encode()).digest(), "big")
    return f"{total % 2**256:064x}"


def open_folder(out, description, restart):
    """The folder for a pack at out, new or one that the same command has left there.

    description  dict for JSON of all that the bytes of the pack depend on
    restart      remove what another process has left

    PackError where another command has left one, or restart finds it in use.
    """
    folder = path_for(out)
    description = json.loads(json.dumps(description))
    for gone in glob.glob(glob.escape(_gone(folder)) + "*"):  # whose removal was interrupted
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
            if not os.path.isdir(folder):  # else another process was faster
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)
    try:
        with open(os.path.join(folder, "description.json")) as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise PackError(f"{folder} is in the way, and no pack that could go on ({error}); remove it") from error
    if different := [f"{name} {found.get(name)!r}, now {description.get(name)!r}"
                     for name in sorted(found.keys() | description.keys()) if found.get(name) != description.get(name)]:
        raise PackError(f"{folder} was left by another command for {out}: {'; '.join(different)}. Give that command to "
                        "go on with it, or remove the folder (--restart does)")
    return folder


@contextmanager
def cleaned_up(folder, out, parts, is_listed, has_shards):
    """Removes the folder on an error after which there is nothing in it to go on with, or else says that it stays.

    is_listed, has_shards  called then: whether the images are listed, and shards of this part written
    """
    try:
        yield
    except BaseException as error:  # Ctrl-C too
        if not os.path.isdir(folder):
            raise PackError(f"the process that lists the images of {out} for all parts failed; it says why") from error
        mistake = isinstance(error, PackError)
        if not is_listed():
            if mistake or parts == 1:
                discard(folder)
        elif mistake and parts == 1 and not has_shards():
            discard(folder)
        elif mistake:
            raise PackError(f"{error}; {what_is_kept(out)}") from error
        raise


@contextmanager
def owned(folder, part, out):
    """The part is this process's until that ends, in whatever way."""
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
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield


def discard(folder):
    """Removes it; to others it is gone at once."""
    gone = f"{_gone(folder)}{secrets.token_hex(4)}"
    os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _gone(folder):
    return f"{folder}-gone-"
