"""The run folder: the settings of a run, its launches, and its lock."""

import dataclasses
import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from xc.config import as_arguments, option
from xc.errors import UserError
from xc.files import replace_text, sync

CLASSES_FILE = "classes.h5"  # the names of the classes, as the index of the pack has them

_locks = []  # open files: closing one would release its lock
_PACKAGES = ("torch", "horovod", "mpi4py", "h5py", "numpy", "safetensors")

_BEFORE_ITS_FLAG = {"select": "labels"}  # what a setting was before it was a flag, where that is not its default


def check(cfg):
    """UserError where --out cannot be the folder of this run. Changes nothing."""
    out = Path(cfg.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is not a folder: name a new one")
    resumes_here = cfg.resume == "auto" or (cfg.resume and out.resolve() in Path(cfg.resume).resolve().parents)
    if (out / "config.json").exists() and not resumes_here:
        raise UserError(f"--out {out} already holds a run: name a new folder, or resume that run by --resume auto")
    if out.is_dir() and not (out / "config.json").exists() and any(f.name[0] != "." for f in out.iterdir()):
        raise UserError(f"--out {out} holds files that are not a run's: name a new folder")


def create(cfg, world_size):
    """Create the run folder, or lock an existing one, and write the settings of this launch. Only rank 0 calls this.

    UserError where another process trains there.
    """
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
    _tell_changed(out / "config.json", cfg)
    # First: this file marks the folder as a run's.
    replace_text(out / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1) + "\n")
    replace_text(out / "run.args", as_arguments(dataclasses.replace(cfg, resume="")))
    with open(out / "launches.jsonl", "a") as lines:
        lines.write(json.dumps(launch) + "\n")


def _tell_changed(path, cfg):
    """Print which settings are not those of the last launch: a default may have changed, or a flag been left out."""
    try:
        before = json.loads(path.read_text())
        before = dataclasses.asdict(cfg) | _BEFORE_ITS_FLAG | dict(before)
    except (OSError, ValueError, TypeError, RecursionError):  # a new run, or a damaged file, which is written anew
        return
    changed = [f"{option(name)} {before[name]} -> {value}" for name, value in dataclasses.asdict(cfg).items()
               if name not in ("out", "resume") and before[name] != value]
    if changed:
        print(f"note: settings that differ from those of the last launch: {', '.join(changed)}", flush=True)


def exchange_before(cfg):
    """The --exchange of the run that is resumed, which its checkpoints need; None where there is none to read."""
    run = Path(cfg.out) if cfg.resume == "auto" else Path(cfg.resume).resolve().parent.parent
    try:
        return dict(json.loads((run / "config.json").read_text()))["exchange"] if cfg.resume else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def keep_classes(out, index, resumed):
    """Copy the index of the training pack, which has the names of the classes: the pack may change or go.

    out      of the run
    index    path of the file; None: the classes are of no pack
    resumed  whether a checkpoint was loaded, which a run does only with the same classes; where none was, those of an
             earlier launch may have been others
    """
    kept, partial = Path(out) / CLASSES_FILE, Path(out) / f".{CLASSES_FILE}.partial"
    if kept.exists() and resumed:
        return
    kept.unlink(missing_ok=True)
    if index:
        shutil.copyfile(index, partial)
        sync(partial)
        partial.replace(kept)


def _lock(out):
    """Lock the run until this process ends. On a file system without locks, a warning and no lock."""
    file = open(out / ".lock", "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        file.seek(0)
        raise UserError(f"--out {out} belongs to {file.read().strip()}, which trains there: wait until it ends, or "
                        "name another folder") from e
    except OSError as e:
        print(f"warning: --out {out} cannot be locked ({e.strerror}): take care that no other run writes there",
              file=sys.stderr, flush=True)
        return
    _locks.append(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()


def resume_command(cfg, world_size):
    """A shell command that resumes the run."""
    launcher = [] if world_size == 1 else ["horovodrun", "-np", str(world_size)]
    return shlex.join([*launcher, sys.executable, sys.argv[0], f"@{Path(cfg.out) / 'run.args'}", "--resume", "auto"])


def versions():
    """{name: version} of Python and the packages that results depend on; None for a missing one."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package):
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit():
    """The commit of the checkout, with + if it has uncommitted changes; None outside of a checkout."""
    try:
        here = Path(__file__).parent
        describe = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty=+"]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
