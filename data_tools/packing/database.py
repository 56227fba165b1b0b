"""SQLite files: one process writes one, under a name of its own; then any number of processes read it.

A writer keeps no journal and does not sync: a list that was not completed is made anew. Nobody takes a lock: the writer
is alone, and what is read is not changed any more. So file systems without locks will do.
"""

import errno
import os
import sqlite3
from contextlib import contextmanager
from urllib.parse import quote

from xc.data.pack import PackError

STEPS = 10**6  # of a statement, between two looks at the signals: some 50 ms


def create(path, memory_bytes):
    """A connection to a new file. Sorting takes about memory_bytes, and puts the rest into the folder of the file."""
    folder = os.path.dirname(os.path.abspath(path))
    db = _connect(_uri(path, "vfs=unix-none"), memory_bytes)
    db.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA temp_store = FILE")
    if folder != folder.encode(errors="replace").decode():  # SQL is text, and a path may have bytes that are not
        folder = f"/proc/self/fd/{os.open(folder, os.O_PATH | os.O_DIRECTORY)}"
    db.execute("PRAGMA temp_store_directory = '{}'".format(folder.replace("'", "''")))
    # Python runs its signal handlers only in Python code, and a statement may take minutes.
    db.set_progress_handler(lambda: 0, STEPS)
    return db


def attach(db, path, name):
    """Makes another new file that the same connection writes as the schema `name`."""
    db.execute(f"ATTACH ? AS {name}", [_uri(path, "vfs=unix-none")])
    db.executescript(f"PRAGMA {name}.journal_mode = OFF; PRAGMA {name}.synchronous = OFF")


def open_complete(path, memory_bytes=2**21):
    """A connection to a file that nobody changes any more; FileNotFoundError where there is none."""
    os.stat(path)
    return _connect(_uri(path, "mode=ro&immutable=1"), memory_bytes)


def _uri(path, options):
    return f"file:{quote(os.fsencode(os.path.abspath(path)))}?{options}"


def _connect(uri, memory_bytes):
    db = sqlite3.connect(uri, uri=True, isolation_level=None)
    db.execute(f"PRAGMA cache_size = -{max(256, memory_bytes // 1024)}")  # in KiB
    return db


@contextmanager
def errors():
    """Turns SQLite's errors into those of the system, as a full disk, and into KeyboardInterrupt."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        match getattr(error, "sqlite_errorcode", None):
            case sqlite3.SQLITE_INTERRUPT:  # the look at the signals raised it
                raise KeyboardInterrupt from error
            case sqlite3.SQLITE_FULL:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                raise PackError(f"the list of images is damaged ({error}); begin anew with --restart") from error
            case code if code is not None and code & 0xFF in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
                raise OSError(errno.EIO, f"the list of images: {error}") from error
        raise
