"""Files that outlast a loss of power."""

import os


def sync(path):
    """The file or folder is on the disk, not only in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder):
    """A folder with all that is in it is on the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            sync(os.path.join(place, name))
        sync(place)
