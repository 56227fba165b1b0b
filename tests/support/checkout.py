"""A copy of the checkout, for jobs that write into it."""

import shutil

from tests.support.launch import ROOT

_LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "data", "runs", "__pycache__", "*.log", "*-[0-9]*")


def copy_checkout(folder):
    """Copy what Slurm's jobs need of the checkout into a new folder; xc/data is needed, ROOT/data is not."""
    def left_out(path, names):
        found = set(_LEFT_OUT(path, names))
        return found if path == str(ROOT) else found - {"data"}

    return shutil.copytree(ROOT, folder, ignore=left_out)
