"""The run folder: one run's settings, where they came from, and what it wrote."""

import dataclasses
import fcntl
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from xc.config import as_arguments
from xc.errors import UserError
from xc.files import replace_text

_locks = []  # open files, which would lose their locks when they are closed
_PACKAGES = ("torch", "horovod", "mpi4py", "h5py", "numpy", "safetensors")


def check(cfg):
    """UserError if --out cannot be this run's folder; changes nothing."""
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder: name a new one")
    resumes_here = cfg.resume == "auto" or (cfg.resume and out.resolve() in Path(cfg.resume).resolve().parents)
    if (out / "config.json").exists() and not resumes_here:
        raise UserError(f"--out {out} already holds a run: name a new folder, or go on with it by --resume auto")
    if out.is_dir() and not (out / "config.json").exists() and any(f.name[0] != "." for f in out.iterdir()):
        raise UserError(f"--out {out} holds files that are not a run's: name a new folder")


def create(cfg, world_size):
    """Write the settings of this run, or of this continuation of it. Only rank 0 calls this. UserError where another
    process has the run."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    _lock(out)
    launch = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "ranks": world_size,
        "host": platform.node(),
        "commit": _commit(),
        **versions(),
    }
    replace_text(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")  # first: makes it a run's
    replace_text(out / "run.args", as_arguments(dataclasses.replace(cfg, resume="")))
    with open(out / "launches.jsonl", "a") as lines:
        lines.write(json.dumps(launch) + "\n")


def _lock(out):
    """The run is this process's until that ends, in whatever way; nobody's where the file system knows no locks."""
    file = open(out / ".lock", "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        raise UserError(f"--out {out} belongs to {file.read().strip()}, which trains there: wait for its end, or name "
                        "another folder") from e
    except OSError:
        return
    _locks.append(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()


def resume_command(cfg, world_size):
    """A shell command that goes on with the run."""
    launcher = [] if world_size == 1 else ["horovodrun", "-np", str(world_size)]
    return shlex.join([*launcher, sys.executable, sys.argv[0], f"@{Path(cfg.out) / 'run.args'}", "--resume", "auto"])


def versions():
    """{name: version} of Python and the packages that a result depends on, None for one that is not there."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit():
    """The checkout's commit, with + where it has uncommitted changes; None outside a checkout."""
    try:
        here = Path(__file__).parent
        describe = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
