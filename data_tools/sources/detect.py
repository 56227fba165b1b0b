"""Which format a source has, and the table of all formats."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from data_tools.common.progress import note
from data_tools.sources import folder, jsonlines, lists, manifest, packs, parquet, recordio, webdataset
from data_tools.sources.base import Reading, check_file, walk
from data_tools.sources.names import claims_image, is_never_data
from xc.data.image_types import HEAD_BYTES, image_type
from xc.data.pack import PackError

# By the name that --from takes. Of a file, the first that knows it counts.
KINDS = {"folder": folder.FORMAT, "manifest": manifest.FORMAT, "webdataset": webdataset.FORMAT,
         "recordio": recordio.FORMAT, "parquet": parquet.FORMAT, "pack": packs.FORMAT,
         "jsonlines": jsonlines.FORMAT, "list": lists.FORMAT}
_NAMED = re.compile(r"([^/=]+)=(.+)", re.DOTALL)  # train=train.csv
_OLE = b"\xd0\xcf\x11\xe0"  # .xls
# What a file is that no source reads: by its first bytes.
_UNREAD = {b"\x1f\x8b": "compressed; unpack it first", b"BZh": "compressed; unpack it first",
           b"\xfd7zXZ\0": "compressed; unpack it first", b"\x28\xb5\x2f\xfd": "compressed; unpack it first",
           b"7z\xbc\xaf": "compressed; unpack it first", b"Rar!": "compressed; unpack it first",
           b"\x89HDF": "an HDF5 file, but no pack; name the folder of a pack, or export the images",
           b"ARROW1": "an Arrow file; write the data set as Parquet", b"SQLi": "a database; export it as CSV"}


@dataclass(frozen=True)
class Source:
    """A source that is open.

    path        of the source
    how         Reading, by which it is read
    records     records(skipped), as base.py describes
    root        folder in which the paths of its images start
    may_repeat  whether a path may come twice
    """

    path: str
    how: Reading
    records: Callable
    root: str
    may_repeat: bool


def given_sources(texts, splits):
    """[(split or "", path)] of the sources in a command: paths, or SPLIT=PATH.

    Several sources that are named after different splits belong to these splits, as train.csv and test.csv.

    splits  SplitNames

    PackError where only some have a split.
    """
    given = []
    for text in texts:
        named = None if os.path.exists(text) else _NAMED.fullmatch(text)
        split = splits.of(named[1]) if named else ""
        if named and not split:
            raise PackError(f"{text}: {named[1]!r} is no split; give train=PATH, val=PATH or test=PATH")
        given.append((split, named[2] if named else text))
    if any(split for split, _ in given):
        if bare := [path for split, path in given if not split]:
            raise PackError(f"{bare[0]}: no split, but other sources have one; give all one, as train=FILE val=FILE")
        return given
    found = [_split_in_path(os.path.abspath(path), splits) for _, path in given]
    if len(set(found)) == 1:  # of all sources the same, or none
        return given
    if "" in found:
        bare, named = given[found.index("")][1], {split: path for (_, path), split in zip(given, found, strict=True)}
        others = " and ".join(path for split, path in named.items() if split)
        raise PackError(f"{bare}: its name gives no split, but that of {others} does; say the split of each, as "
                        "train=FILE val=FILE")
    given = list(zip(found, (path for _, path in given), strict=True))
    note(f"splits: {', '.join(f'{path} = {split}' for split, path in given[:8])}{', …' if given[8:] else ''}")
    return given


def _split_in_path(path, splits):
    """The split in the name of a source, or else in that of its folder; ""."""
    return splits.in_name(os.path.basename(path)) or splits.of(os.path.basename(os.path.dirname(path)))


def open_source(path, kind, how, split=""):
    """The source at a path.

    kind   a key of KINDS; None: found by content
    how    Reading; its root is that of the paths in a table, None: the folder of the table
    split  of its images, "": it says itself

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
    if how.root is not None and not found.names_files:
        raise PackError(f"--root {how.root} is for the paths in a manifest, but {path} is of kind {kind}; leave it out")
    root = how.root or (path if os.path.isdir(path) else os.path.dirname(path))
    how = replace(how, root=root, split=split, named=set(), bare=set())

    def records(skipped):
        if not split:
            return found.records(path, how, skipped)
        return _of_split(split, path, found.records(path, how, _SkippedOf(skipped, split)))

    return Source(path, how, records, root, found.names_files)


def _of_split(split, path, records):
    """The records, all of one split."""
    for own, name, *rest in records:
        if own not in ("", split):
            raise PackError(f"{path}: given as split {split}, but {name} is of split {own}; leave out one of them by "
                            "--without, or give the source without a split")
        yield split, name, *rest


class _SkippedOf:
    """Reports for a source whose images are all of one split."""

    def __init__(self, skipped, split):
        self._skipped, self._split = skipped, split

    def add(self, split, path, reason):
        self._skipped.add(split or self._split, path, reason)


def kind_of(path):
    """The key in KINDS of the source at a path, by its content. PackError where it is something else."""
    if os.path.isdir(path):
        return next((kind for kind, found in KINDS.items() if found.is_folder(path)), None) or _kind_of_folder(path)
    with open(path, "rb") as file:
        head = file.read(max(512, HEAD_BYTES))
    if head[:4] == b"PK\3\4" and (b"xl/" in head or b"[Content_Types].xml" in head) or head[:4] == _OLE:
        raise PackError(f"{path}: a spreadsheet; save it as CSV")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[") and path.lower().endswith(".json"):
        raise PackError(f"{path}: a JSON array; write one object on every line (JSON Lines)")
    if head[:4] == b"PK\3\4":
        raise PackError(f"{path}: compressed; unpack it first")
    if what := next((what for magic, what in _UNREAD.items() if head.startswith(magic)), None):
        raise PackError(f"{path}: {what}")
    if kind := next((kind for kind, found in KINDS.items() if found.is_file(path, head)), None):
        return kind
    if image_type(head):
        raise PackError(f"{path}: an image; name the folder of the folders of the classes")
    return "manifest"


def _kind_of_folder(path):
    """The kind of the first image or shard in the tree; its reader refuses others."""
    for _, _, names in walk(path, _Nowhere()):
        for name in names:
            kind = next((kind for kind, found in KINDS.items() if found.suffix and name.lower().endswith(found.suffix)),
                        None)
            if not is_never_data(name) and (kind or claims_image(name)):
                return kind or "folder"
    return "folder"


class _Nowhere:
    """Takes reports of a look at a tree, which is read again later."""

    def add(self, split, path, reason):
        pass
