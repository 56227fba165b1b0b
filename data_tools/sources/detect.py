"""Which format a source has, and the table of all formats."""

import os
from collections.abc import Callable
from dataclasses import dataclass

from data_tools.sources import folder, manifest, packs, parquet, recordio, webdataset
from data_tools.sources.base import check_file, files_by_split, split_in_name
from xc.pack import PackError

# By the name that --from takes. Where a folder has files of several formats, the first counts.
KINDS = {"folder": folder.FORMAT, "manifest": manifest.FORMAT, "webdataset": webdataset.FORMAT,
         "recordio": recordio.FORMAT, "parquet": parquet.FORMAT, "pack": packs.FORMAT}
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\3\4")  # gzip, bzip2, xz, zstd, zip


@dataclass(frozen=True)
class Source:
    records: Callable  # records(skipped), as base.py describes
    root: str  # folder in which the paths of its images start
    may_repeat: bool  # a path may come twice


def open_source(path, kind, root):
    """The source at a path.

    kind  a key of KINDS; None: found by content
    root  folder in which the paths of a manifest start; None: its own folder

    PackError where there is no such source.
    """
    if not os.path.isdir(path):
        check_file(path)
    kind = kind or kind_of(path)
    found = KINDS[kind]
    if os.path.isdir(path) and not found.takes_folders:
        raise PackError(f"{path}: a folder, but --from {kind} needs a file; name that file")
    if not os.path.isdir(path) and not found.takes_files:
        raise PackError(f"{path}: a file, but --from {kind} needs a folder; name its folder or leave out --from")
    if root is not None and not found.names_files:
        raise PackError(f"--root {root} is for the paths in a manifest, but {path} is of kind {kind}; leave it out")
    beside = path if os.path.isdir(path) else os.path.dirname(path)
    return Source(lambda skipped: found.records(path, skipped), root or beside, found.names_files)


def kind_of(path):
    """The key in KINDS of the source at a path, by its content."""
    if not os.path.isdir(path):
        with open(path, "rb") as file:
            head = file.read(512)
        if head.startswith(COMPRESSED):
            raise PackError(f"{path}: compressed; unpack it first")
        return next((kind for kind, found in KINDS.items() if found.is_file(path, head)), "manifest")
    if kind := next((kind for kind, found in KINDS.items() if found.is_folder(path)), None):
        return kind
    files, others = files_by_split(path)
    for kind, found in KINDS.items():
        if found.suffix and not others and any(name.endswith(found.suffix) for _, name in files):
            return kind
    return "folder"


def check_splits(paths):
    """PackError where shards of different splits are given one by one, which would merge their splits."""
    suffixes = tuple(found.suffix for found in KINDS.values() if found.suffix)
    shards = [path for path in paths if path.endswith(suffixes) and not os.path.isdir(path)]
    of_split = {split: path for path in shards if (split := split_in_name(path))}
    if len(of_split) > 1:
        raise PackError(f"{' and '.join(of_split.values())} are named after different splits, which are kept only for "
                        "shards in one folder; give that folder instead of its files, or rename them to merge them")
