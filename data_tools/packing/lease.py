"""Work that one of several processes does, on any node of a shared file system, while the others wait for it."""

import itertools
import os
import secrets
import threading
import time
from contextlib import contextmanager, suppress

from data_tools.common.progress import note

LIFE_SECONDS = 2  # between two signs of life
PATIENCE_SECONDS = 90  # without one; network file systems may show a change a minute late


def run_once(claim, owner, done, work):
    """Calls work() in one of the processes that call this, unless done() is true, which it then is in all of them.

    claim  path of a file that the one that works makes, and changes while it lives
    owner  name of this process, which no other has at the same time; what it had before it was killed is its own

    Where the file no longer changes, another process takes the work over. A slow one may go on beside it, so work()
    must not be harmed by that: the claim saves work, what comes of it appears by renaming.
    FileNotFoundError where the claim's folder is gone, and done() is not true.
    """
    while not done():
        if _take(claim, owner):
            with _life(claim, owner):
                try:
                    if not done():
                        work()
                except Exception:
                    if not done():  # else another, to which this process seemed dead, was faster
                        raise
            return
        _wait(claim, done)


def _take(claim, owner):
    try:
        with open(claim, "x") as file:
            file.write(f"{owner} 0")
        return True
    except FileExistsError:
        return _read(claim).partition(" ")[0] == owner


def _read(claim):
    """Its text, "" where it is gone or just being written."""
    try:
        with open(claim) as file:  # opening also has a network file system look anew
            return file.read()
    except FileNotFoundError:
        return ""


@contextmanager
def _life(claim, owner):
    ended = threading.Event()

    def show():
        for count in itertools.count(1):
            if ended.wait(LIFE_SECONDS):
                return
            with suppress(OSError), open(claim, "r+") as file:  # not made anew where another took it over
                file.write(f"{owner} {count}")
                file.truncate()

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(FileNotFoundError):
            os.unlink(claim)


def _wait(claim, done):
    """Until done() is true, or the claim can be taken."""
    last, since, told = None, time.monotonic(), False
    while not done() and os.path.exists(claim):
        text = _read(claim)
        if text != last:
            last, since = text, time.monotonic()
        elif time.monotonic() - since > PATIENCE_SECONDS:
            note(f"{text.partition(' ')[0]} shows no life for {PATIENCE_SECONDS} s: taken over")
            stale = f"{claim}.{secrets.token_hex(4)}"
            with suppress(FileNotFoundError):  # then another was faster
                os.rename(claim, stale)
                os.unlink(stale)
            return
        if not told and text:
            note(f"waiting for {text.partition(' ')[0]}")
            told = True
        time.sleep(min(0.5, PATIENCE_SECONDS / 10))
