"""Commands of data_tools: called in this process, or run as processes that are slow or measured."""

import contextlib
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import data_tools.pack
from tests.support.launch import ROOT
from tests.support.processes import wait_until


def call(main, *arguments):
    """Call a command's main with these arguments. The signal handlers that it sets are taken back."""
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGALRM
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        return main([str(argument) for argument in arguments])
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def refused(capsys, main, *arguments, folder=None):
    """The one line of a command that must fail with exit code 2.

    folder  where it must leave nothing new
    """
    capsys.readouterr()
    before = names_in(folder)
    with pytest.raises(SystemExit) as exit:
        call(main, *arguments)
    text = capsys.readouterr().err
    assert exit.value.code == 2
    assert text.count("\n") == 1 and text.startswith(f"{main.__module__}: error: "), text
    assert names_in(folder) == before
    return text.rstrip("\n")


def names_in(folder):
    """Sorted names of the entries of a folder; None where there is no folder."""
    return sorted(path.name for path in Path(folder).iterdir()) if folder and Path(folder).is_dir() else None


def run_pack(*arguments):
    """data_tools.pack in this process alone, unless --workers says otherwise."""
    call(data_tools.pack.main, *arguments, *(() if "--workers" in arguments else ("--workers", 0)))


def pack_fails(capsys, *arguments):
    """The one line of a pack, `SRC PACK …`, that must fail and leave nothing beside PACK."""
    workers = () if "--workers" in arguments else ("--workers", 0)
    return refused(capsys, data_tools.pack.main, *arguments, *workers, folder=Path(arguments[1]).parent)


def start(code, *arguments):
    """Start a Python program; Ctrl-C ends it even where this process was started to ignore that."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); " + code
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def ended(process, seconds=100):
    """(exit code, stdout, stderr) of a process, once it has ended."""
    out, error = process.communicate(timeout=seconds)
    return process.returncode, out, error


def start_slow(module, *arguments, until, seconds=0.1):
    """Start a command whose fsync takes so many seconds; returns its process as soon as until() is true."""
    process = start(f"import os, runpy, time; os.fsync = lambda fd: time.sleep({seconds}); "
                    f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)", *arguments)
    wait_until(lambda: until() or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


@contextlib.contextmanager
def largest_file(num_bytes):
    """The system refuses to write a larger file, as if a disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def peak_kib(code, *arguments):
    """The most KiB of memory that a Python program takes, and the lines that it prints.

    Not by getrusage: a child begins with the peak of the process that started it.
    """
    code += "; print(open('/proc/self/status').read())"
    status, out, error = ended(start(code, *arguments))
    assert status == 0, error
    return int(re.search(r"VmHWM:\s+(\d+) kB", out)[1]), out.splitlines()


def peak_kib_of(module, *arguments):
    """The most KiB of memory that a command takes."""
    return peak_kib(f"import sys; from {module} import main; main(sys.argv[1:])", *arguments)[0]
