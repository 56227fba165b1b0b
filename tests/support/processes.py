"""Processes of a run: which there are, and that none is left."""

import os
import time
from contextlib import suppress
from pathlib import Path


def command_lines():
    """{pid: words of the command line} of all processes."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found[int(path.parent.name)] = path.read_bytes().decode(errors="replace").split("\0")
    return found


def of_run(folder):
    """Numbers of all processes that have to do with a run folder; zombies have no command line."""
    return [pid for pid, words in command_lines().items() if str(folder) in words and pid != os.getpid()]


def ranks_of(folder):
    """Numbers of the processes of a run's ranks."""
    return sorted(pid for pid, words in command_lines().items()
                  if str(folder) in words and words[0].endswith("python") and "train.py" in words[1])


def wait_until(what, seconds=250):
    """Returns what() as soon as that is true; AssertionError after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)
    return found
