"""What all sources share: the description of a format, and how folders of shards and images are listed.

A source is a function records(path, skipped) that yields (split or "", path, class name, bytes) and, where it has
weights, the weight after them. For an image in a file of its own, path is relative to the root of the source and bytes
is None. All other images are read once, in order, and their path is only a name for messages.

What cannot be packed is reported to `skipped`: an image by skipped.add(split, path, reason); anything that is not an
image is counted in skipped.ignored. Nothing is extracted, and memory holds a few records, however long the source is.

To add a format, write one file with `FORMAT = Format(records, …)` and name it in KINDS of detect.py.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from xc import pack as layout
from xc.pack import PackError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLIT_OF = {**{name: name for name in layout.SPLITS}, "validation": "val", "valid": "val"}  # usual names of splits
MACOS_FOLDER = "__MACOSX"  # which macOS adds to a zip file


@dataclass(frozen=True)
class Format:
    """A kind of source.

    records         records(path, skipped), see above
    suffix          of its files where a folder holds several of them, as train-000.tar; "": it never comes as shards
    is_file         is_file(path, first 512 bytes): whether a file has this format
    is_folder       is_folder(path): whether a folder has this format
    takes_files     whether SRC may be a file
    takes_folders   whether SRC may be a folder
    names_files     whether it lists images by paths: --root is allowed, and a path may come twice
    """

    records: Callable
    suffix: str = ""
    is_file: Callable = lambda path, head: False
    is_folder: Callable = lambda path: False
    takes_files: bool = True
    takes_folders: bool = True
    names_files: bool = False


def check_file(path):
    """PackError for a pipe, a device and the like, which may have no end, or no beginning."""
    if not os.path.isfile(path):
        raise PackError(f"{path}: neither a file nor a folder")


def stays_below(path):
    """Whether a relative path cannot leave the folder it starts in."""
    parts = path.split("/")
    return parts[0] != "" and ".." not in parts and "\0" not in path


def list_folder(folder, ignored):
    """(folders, files): sorted names in a folder; hidden entries and links to folders are counted in `ignored`."""
    names = [], []  # names alone: os.DirEntry objects would take twice the memory
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == MACOS_FOLDER:
                ignored["hidden files and folders"] += 1
            elif entry.is_symlink() and os.path.isdir(entry.path):  # may lead out of the tree, or round in circles
                ignored["links to folders"] += 1
            else:
                names[not entry.is_dir(follow_symlinks=False)].append(entry.name)
    return tuple(map(sorted, names))


def split_in_name(path):
    """The split in the name of a file, as of train-000.tar, train.tar or images_validation_000.tar.

    "" where it names no split, or several and not in its first word.
    """
    words = [SPLIT_OF.get(word, "") for word in re.split(r"[-_.]", os.path.basename(path))]
    named = {split for split in words if split}
    return named.pop() if len(named) == 1 else words[0]


def files_by_split(root):
    """([(split or "", path)] of all files at the top and in folders named after splits, number of other folders)."""
    folders, names = list_folder(root, Counter())
    files, others = [(split_in_name(name), os.path.join(root, name)) for name in names], 0
    for folder in folders:
        if folder in SPLIT_OF:
            inner, names = list_folder(os.path.join(root, folder), Counter())
            files += [(SPLIT_OF[folder], os.path.join(root, folder, name)) for name in names]
            others += len(inner)
        else:
            others += 1
    return files, others


def shards(path, suffix):
    """[(split, file)] of a file, or of a folder, in which train-000.tar and train/000.tar belong to split train."""
    if not os.path.isdir(path):
        return [("", path)]
    found = [(split, file) for split, file in files_by_split(path)[0] if file.endswith(suffix)]
    if len({bool(split) for split, _ in found}) > 1:
        bare = next(file for split, file in found if not split)
        raise PackError(f"{bare}: its name gives no split, but those of other files do; put train, val or test into it")
    for _, file in found:
        check_file(file)
    return found
