"""File systems without locks, as NFS without its lock service or DVS: packing, splitting, training, resuming."""

import shutil
import subprocess
import sys

import pytest

from tests.support.images import by_class, write_tree
from tests.support.launch import last_json, run
from tests.support.packs import contents
from xc.data.pack import Pack

# flock and the locks of fcntl fail with $NO_LOCKS_ERRNO.
SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>

static int refuse(void) { errno = atoi(getenv("NO_LOCKS_ERRNO")); return -1; }
static int locks(int command) {
    return command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
}
int flock(int file, int operation) { return refuse(); }
#define WRAP(name) \\
    int name(int file, int command, ...) { \\
        static int (*real)(int, int, ...); \\
        if (!real) real = (int (*)(int, int, ...))dlsym(RTLD_NEXT, #name); \\
        va_list rest; va_start(rest, command); void *argument = va_arg(rest, void *); va_end(rest); \\
        return locks(command) ? refuse() : real(file, command, argument); \\
    }
WRAP(fcntl)
WRAP(fcntl64)
"""
ENOLCK, ENOSYS, ENOTSUPP, EOPNOTSUPP = 37, 38, 524, 95


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A library that takes all locks away from a process into which it is loaded."""
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("locks")
    (folder / "locks.c").write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "locks.so", folder / "locks.c", "-ldl"], check=True)
    return folder / "locks.so"


@pytest.mark.parametrize("number", [ENOLCK, ENOSYS, ENOTSUPP, EOPNOTSUPP])
def test_packs_are_made_without_locks(tmp_path, library, number):
    def command(module, *flags):
        return run(sys.executable, "-m", f"data_tools.{module}", *flags, env=without)

    files = write_tree(tmp_path / "src", {"a": 5, "b": 6})
    without = {"LD_PRELOAD": str(library), "NO_LOCKS_ERRNO": str(number)}
    assert "cannot be locked" in command("pack", tmp_path / "src", tmp_path / "pack", "--workers", 0).stderr
    command("split", tmp_path / "pack", tmp_path / "packs", "--test", 0.2)
    command("export", tmp_path / "packs", tmp_path / "tars", "--to", "webdataset")
    command("pack", tmp_path / "tars", tmp_path / "again", "--workers", 1)
    found = [contents(Pack(tmp_path / "again" / split)) for split in ("train", "test")]
    assert contents(Pack(tmp_path / "pack")) == by_class(files) == found[0] | found[1]


@pytest.mark.long
@pytest.mark.parametrize("number", [ENOLCK, ENOTSUPP])
def test_runs_are_trained_and_resumed_without_locks(tmp_path, library, number, tiny_packs):
    without = {"LD_PRELOAD": str(library), "NO_LOCKS_ERRNO": str(number)}
    flags = ["train.py", "--data", tiny_packs, "--out", tmp_path / "run", "--global-batch", 8, "--warmup", 0]
    first = run(sys.executable, *flags, "--steps", 4, env=without)
    assert "cannot be locked" in first.stderr
    second = run(sys.executable, *flags, "--steps", 8, "--resume", "auto", env=without)
    assert last_json(second)["steps"] == 8
