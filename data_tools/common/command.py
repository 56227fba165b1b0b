"""What all commands share: the parser of flags, signals, checks of paths, and printing."""

import argparse
import os
import signal
import sys
import weakref
from contextlib import contextmanager, suppress

from xc.message import one_line
from xc.pack import PackError


class Parser(argparse.ArgumentParser):
    """Reports an error in one line, and allows any bytes in the names that a command prints."""

    def parse_args(self, args=None, namespace=None):
        with suppress(AttributeError):  # the output of a notebook, which takes any text
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may have bytes that are not text
        return super().parse_args(args, namespace)

    def error(self, message, code=2):
        self.exit(code, f"{self.prog}: error: {one_line(' '.join(message.split()))}\n")


def stop_on_signals():
    """Makes SIGTERM end a command as Ctrl-C does, by KeyboardInterrupt."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a job in the background may ignore it
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number, frame):
    """Raises KeyboardInterrupt; in the callback of a weak reference, where Python would ignore it, a moment later."""
    while frame:
        if frame.f_code.co_filename == weakref.__file__:
            signal.signal(signal.SIGALRM, _interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            return
        frame = frame.f_back
    raise KeyboardInterrupt


@contextmanager
def printing(parser):
    """For printing the result of a finished command: handles a full disk and a closed pipe."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as nowhere:  # for the flush at the end of the process
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            parser.exit(128 + signal.SIGPIPE)  # as other commands do if nobody reads their output
        parser.error(f"all is done, but the result cannot be printed: {error}")


def between(least, most, kind=int):
    """A type for argparse: a number of this kind, least and most included."""

    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return kind(text)

    return number


def add_switch(parser, flag, default, help):
    """Adds a boolean flag as --flag and --no-flag."""
    action = parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default)
    action.help = help  # set later: some versions of Python would add the default to it


def check_paths(src, out, root):
    """PackError for paths that cannot be used, before anything is read."""
    parent = os.path.dirname(out)
    for path in src:
        if not os.path.exists(path):
            raise PackError(f"{path}: no such file or folder; give a tree of images, a manifest, tar shards, RecordIO "
                            "or a pack")
        if root is not None and os.path.isdir(path):
            raise PackError(f"--root {root} is for the paths of a manifest, but {path} is a folder; leave it out")
        if os.path.isdir(path) and os.path.realpath(out).startswith(os.path.join(os.path.realpath(path), "")):
            raise PackError(f"{out} lies inside {path}; give a place outside")
    if root is not None and not os.path.isdir(root):
        raise PackError(f"--root {root}: no such folder")
    if os.path.lexists(out):
        raise PackError(f"{out} exists; remove it or give another name")
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK)):
        raise PackError(f"{parent}: no such folder, or not writable; make it first, {os.path.basename(out)} goes there")
