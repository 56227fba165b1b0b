"""A lease: one of several processes, on any nodes of a shared file system, does some work; the others wait for it."""

import itertools
import os
import secrets
import threading
import time
from contextlib import contextmanager, suppress

from data_tools.common.progress import note

LIFE_SECONDS = 2  # between two heartbeats
PATIENCE_SECONDS = 90  # without a heartbeat; network file systems may show a change a minute late


def run_once(claim, owner, done, work):
    """Calls work() in one of the processes that call this. When it returns, done() is true in all of them.

    claim  path of the file by which a process holds the lease; it changes the file while it lives
    owner  unique name of this process; it takes over the lease of a killed process of the same name at once
    done   whether there is nothing left to do
    work   what to do; it must be harmless that two processes do it at the same time, for example by renaming at the end

    If the file no longer changes, another process takes the lease, although the first may only be slow.
    FileNotFoundError where the claim's folder is gone and done() is false.
    """
    while not done():
        if _take(claim, owner):
            with _heartbeat(claim, owner):
                try:
                    if not done():
                        work()
                except Exception:
                    if not done():  # otherwise another process took the lease, and was faster
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
    """Text of the claim; "" where it is gone or just being written."""
    try:
        with open(claim) as file:  # opening makes a network file system refresh it
            return file.read()
    except FileNotFoundError:
        return ""


@contextmanager
def _heartbeat(claim, owner):
    ended = threading.Event()

    def show():
        for count in itertools.count(1):
            if ended.wait(LIFE_SECONDS):
                return
            with suppress(OSError), open(claim, "r+") as file:  # not created again if another process took it
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
    """Waits until done() is true or the claim can be taken."""
    last, since, told = None, time.monotonic(), False
    while not done() and os.path.exists(claim):
        text = _read(claim)
        if text != last:
            last, since = text, time.monotonic()
        elif time.monotonic() - since > PATIENCE_SECONDS:
            note(f"{text.partition(' ')[0]} gave no sign of life for {PATIENCE_SECONDS} s: taking over")
            stale = f"{claim}.{secrets.token_hex(4)}"
            with suppress(FileNotFoundError):  # another process was faster
                os.rename(claim, stale)
                os.unlink(stale)
            return
        if not told and text:
            note(f"waiting for {text.partition(' ')[0]}")
            told = True
        time.sleep(min(0.5, PATIENCE_SECONDS / 10))
