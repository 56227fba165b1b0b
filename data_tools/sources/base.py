"""What all sources share: the description of a format, how it is read, and how folders are listed.

A source is a function records(path, how, skipped) that yields (split or "", path, class name, bytes) and, where it has
weights, the weight after them. For an image in a file of its own, path is relative to the root of the source and bytes
is None. All other images are read once, in order, and their path is only a name for messages. Images of a split that
--without leaves out are yielded like all others. Their class may be "".

Every image of a source is either yielded or reported by skipped.add(split, path, reason), with the name of the image
and the reason. Files that are neither images nor part of the format are reported as well, but for the names that
`is_never_data` knows. Nothing is extracted, and memory holds a few records, however long the source is.

To add a format, write one file with `FORMAT = Format(records, …)` and name it in KINDS of detect.py.
"""

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from data_tools.common.progress import note
from data_tools.sources.names import (
    ARCHIVE_SUFFIXES,
    TABLE_SUFFIXES,
    claims_image,
    content_is_image,
    is_never_data,
)
from data_tools.sources.splits import SplitNames
from xc.data.pack import PackError


@dataclass(frozen=True)
class Format:
    """A kind of source.

    records         records(path, how, skipped), see above
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


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    columns   {"path", "label", "split", "weight": name of the column}; a missing one has one of the usual names
    header    whether the first line of a table names its columns
    encoding  of the text of a table
    root      folder in which the paths of a table start; None: that of the table
    split     that is given to all images; "": the source says it
    splits    SplitNames
    noted     texts that note_once has noted, for all sources
    named     files whose labels are numbers of which their schema gives the names
    bare      files whose labels are numbers without names
    """

    columns: dict = field(default_factory=dict)
    header: bool = True
    encoding: str = "utf-8"
    root: str | None = None
    split: str = ""
    splits: SplitNames = field(default_factory=SplitNames)
    noted: set = field(default_factory=set)
    named: set = field(default_factory=set)
    bare: set = field(default_factory=set)

    def leaves_out(self, split):
        """Whether images of this split are left out."""
        return self.splits.leaves_out(split or self.split)

    def note_once(self, text):
        """Notes a text, unless it was noted before."""
        if text not in self.noted:
            self.noted.add(text)
            note(text)

    def with_columns(self, columns):
        return dataclasses.replace(self, columns=columns)


def check_file(path):
    """PackError for a pipe, a device and the like, which may have no end, or no beginning."""
    if not os.path.isfile(path):
        raise PackError(f"{path}: neither a file nor a folder")


def stays_below(path):
    """Whether a relative path cannot leave the folder it starts in."""
    parts = path.split("/")
    return parts[0] != "" and ".." not in parts and "\0" not in path


def list_folder(folder):
    """(folders, files): sorted names in a folder, links to folders among the folders.

    Folders that never hold data are left out. Files are not: there may be many, and a name that ends as that of an
    image needs no such look.
    """
    folders, _, files = _scan(folder)
    return folders, files


def walk(root, skipped):
    """Yields (folder, names of its folders, names of its files) for every folder of a tree, in a fixed order.

    folder  relative to root, "" at the top

    Links to folders are followed; one that leads back into a folder that it lies in is skipped.
    """
    levels = [iter([("", False)])]
    while levels:
        folder, is_link = next(levels[-1], (None, False))
        if folder is None:
            levels.pop()
            continue
        if is_link and _leads_back(root, folder):
            skipped.add("", folder, "a link to a folder that it lies in")
            continue
        inner, links, names = _scan(os.path.join(root, folder))
        yield folder, inner, names
        levels.append(iter([(os.path.join(folder, name), name in links) for name in inner]))


def _scan(folder):
    """(sorted names of folders, set of those that are links, sorted names of files) in a folder."""
    folders, links, files = [], set(), []  # names alone: os.DirEntry objects would take twice the memory
    with os.scandir(folder) as entries:
        for entry in entries:
            if not _is_folder(entry):
                files.append(entry.name)
            elif not is_never_data(entry.name, is_folder=True):
                folders.append(entry.name)
                if entry.is_symlink():
                    links.add(entry.name)
    return sorted(folders), links, sorted(files)


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_back(root, folder):
    """Whether a link below root leads to one of the folders that it lies in."""
    target, parts = os.stat(os.path.join(root, folder)), folder.split("/")
    above = (os.stat(os.path.join(root, *parts[:depth])) for depth in range(len(parts)))
    return any(os.path.samestat(target, one) for one in above)


def shards(path, suffix, how, skipped):
    """[(split, file)] of a file, or of all such files in a folder and its folders.

    In a folder, the names of files and folders give the split: train-000.tar and train/000.tar.

    PackError where two names give different splits, or the folder has data of other formats.
    """
    if not os.path.isdir(path):
        return [("", path)]
    found = []
    for folder, _, names in walk(path, skipped):
        above = {split for part in folder.split("/") if (split := how.splits.of(part))}
        for name in names:
            file = os.path.join(path, folder, name)
            if is_never_data(name):
                continue
            if name.lower().endswith(suffix):
                splits = above | ({split} if (split := how.splits.in_name(name)) else set())
                if len(splits) > 1:
                    raise PackError(f"{file}: its path names the splits {' and '.join(sorted(splits))}; rename it")
                found.append((splits.pop() if splits else "", file))
            elif name.lower().endswith(ARCHIVE_SUFFIXES) or claims_image(name):
                raise PackError(f"{file}: stands among files of {suffix}; move it away, or pack it as a source of its "
                                "own")
            elif content_is_image(file) or not name.lower().endswith(TABLE_SUFFIXES):
                skipped.add("", file, f"no {suffix} file")
    if len({bool(split) for split, _ in found}) > 1:
        bare = next(file for split, file in found if not split)
        raise PackError(f"{bare}: its name gives no split, but those of other files do; put train, val or test into "
                        "it, or name the split by --rename-split")
    for _, file in found:
        check_file(file)
    return found
