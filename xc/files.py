"""Files that survive a loss of power, and files that appear whole or not at all."""

import os


def sync(path):
    """Wait until the file or folder is on the disk, not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder):
    """Wait until a folder and everything in it is on the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            sync(os.path.join(place, name))
        sync(place)


def replace_text(path, text):
    """Write a text file whole or not at all, even if power is lost.

    path  pathlib.Path
    """
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)
