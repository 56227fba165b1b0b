"""A disk that is nearly full."""

import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A file system of so many KiB at the new folder, for as long as this context lasts."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
