"""A case: a reader's changed files, what it may do with them, and what is a finding."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

MESSAGE_CHARACTERS = 2000


class Finding(Exception):
    """What a reader must not do."""


@dataclass(frozen=True)
class Target:
    """A reader, with functions that make its files and change them."""

    make: Callable  # make(folder): files that the reader accepts
    change: Callable  # change(random, folder): one of many ways to spoil them
    read: Callable  # read(folder, out): the reader; what it writes goes below out
    clear: tuple  # the exceptions that may refuse a file
    memory_mb: int = 256  # that a case may take beyond what was in use before it


def attempt(target, folder):
    """ "accepted" or "refused", for a case in `folder`; Finding for anything else."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    before = _reset_peak_mb()
    try:
        with _guarded(out), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder / "in", out)
        outcome = "accepted"
    except Finding:
        raise
    except target.clear as error:
        if _chain_has(error, MemoryError):
            raise Finding("it asks for more memory than there is") from error
        text = str(error)
        if not text or "\n" in text or len(text) > MESSAGE_CHARACTERS:
            raise Finding(f"a message that is not one line: {text[:200]!r}, {len(text)} characters") from error
        outcome = "refused"
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
    if _peak_mb() - before > target.memory_mb:
        raise Finding(f"took {_peak_mb() - before:.0f} MB")
    return outcome


def _chain_has(error, kind):
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reset_peak_mb():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak_mb()


def _peak_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


_allowed = None  # no guard


@contextlib.contextmanager
def _guarded(folder):
    global _allowed
    if not _guarded.__dict__.get("hooked"):
        sys.addaudithook(_audit)  # for the rest of this process
        _guarded.hooked = True
    _allowed = os.path.realpath(folder)
    try:
        yield
    finally:
        _allowed = None


_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}


def _audit(event, arguments):
    if _allowed is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(path, str | bytes | os.PathLike):
            return
    elif event not in _CHANGES:
        return
    last = 2 if event in ("os.rename", "os.link", "os.symlink") else 1
    folder = next((number for number in arguments[last:] if isinstance(number, int) and number > 2), None)
    start = os.readlink(f"/proc/self/fd/{folder}") if event in ("os.remove", "os.rmdir") and folder else ""
    for path in arguments[last - 1 : last]:
        place = os.path.realpath(os.path.join(start, os.fsdecode(path)))
        if place != _allowed and not place.startswith(_allowed + os.sep) and place != os.devnull:
            raise Finding(f"{event} outside of the output folder: {place}")


def command(main, *arguments):
    """A command's main(), whose exit code 2 and one line at the end of stderr become a ValueError of that line."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
    if code:
        line = errors.getvalue().rstrip("\n").rpartition("\n")[2]
        if code != 2 or "error: " not in line:
            raise Finding(f"exit code {code} with {errors.getvalue()[-300:]!r}")
        raise ValueError(line)
