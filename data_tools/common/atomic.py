"""Files and folders that appear at their name complete, or not at all."""

import os
import secrets
import shutil
from contextlib import contextmanager

from xc import pack as layout
from xc.disk import sync


@contextmanager
def atomic_path(out, replace=False, folder=None):
    """Yields a hidden path for a new file or folder, which is renamed to out at the end or removed on an error.

    replace  whether what is at out may be replaced; an empty folder always may
    folder   where the hidden path lies, on the file system of out; None: beside out

    The file, or the folder's own entries, and the name out are on the disk then. OSError where out exists.
    """
    out = os.path.abspath(out)
    parent, name = os.path.split(out)
    partial = os.path.join(folder or parent, f".{name}{layout.PARTIAL}{secrets.token_hex(4)}")
    replaced = os.path.join(parent, f".{name}.replaced-{secrets.token_hex(4)}")
    try:
        yield partial
        sync(partial)
        if not replace and os.path.lexists(out) and not os.path.isdir(out):
            raise FileExistsError(f"{out} has appeared meanwhile")
        if replace and os.path.isdir(out):  # a folder cannot be renamed to one that is there
            os.rename(out, replaced)
        os.replace(partial, out)
        sync(parent)
    except BaseException:  # Ctrl-C too
        if os.path.exists(replaced) and not os.path.lexists(out):
            os.rename(replaced, out)
        _remove(partial)
        raise
    finally:
        _remove(replaced)


@contextmanager
def atomic_folder(out):
    """As atomic_path, for a new folder, which is made already."""
    with atomic_path(out) as partial:
        os.mkdir(partial)
        yield partial


def _remove(path):
    if os.path.isdir(path):
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        os.unlink(path)
