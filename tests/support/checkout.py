"""Copies of the checkout, for what writes into it."""

import shutil
import subprocess

from tests.support.launch import ROOT

_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", "*.log", "*-[0-9]*")


def copy_checkout(folder):
    """Copy what Slurm's jobs need of the checkout into a new folder; xc/data is needed, ROOT/data is not."""
    def left_out(path, names):
        found = set(_LEFT_OUT(path, names))
        return found if path == str(ROOT) else found - {"data"}

    return shutil.copytree(ROOT, folder, ignore=left_out)


def clone_checkout(folder):
    """A git clone of the checkout in a new folder, with what is not committed, and with its .venv."""
    subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        (folder / name).unlink(missing_ok=True)
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / ".venv").unlink(missing_ok=True)
    (folder / ".venv").symlink_to((ROOT / ".venv").resolve())
    pack = ROOT / "data/glyphs.pack"
    if pack.exists():  # otherwise a block that needs it makes it
        (folder / "data").mkdir()
        (folder / "data/glyphs.pack").symlink_to(pack)
    return folder
