"""What data sets come as: images in folders, manifests, tar shards, RecordIO, packs.

A source yields (split or "", path, class name, bytes), and behind these a weight where it has weights. Images that lie
in files of their own are named by a path below the source's root and the bytes are None; all others are read once, in
order, and their path is what messages call them.
What cannot be packed is told to `skipped`: images by skipped.add(split, path, reason), and what is no image counted in
skipped.ignored. Nothing is extracted, and memory holds some records, however long the source is.
"""

import csv
import itertools
import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from data_tools import recordio
from data_tools.progress import note
from xc import pack as layout
from xc.pack import PackError, open_splits

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MAX_HEADER_BYTES = 2**14  # of what a tar file says about one member beside its block
HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE,
           tarfile.SOLARIS_XHDTYPE)
MAX_GLOBAL_KEYS = 256  # of its headers that are for all members that follow
MAX_LABELS = 2  # of one sample in it: .cls and .json
MAX_LABEL_BYTES = 2**16  # of a file .cls or .json
MAX_PATH_BYTES = 4096  # of a path in a manifest, which Linux takes to 4,095, and of each text in a Parquet file
MAX_LINE = 2**16  # characters of the first line of a manifest
MAX_ROW = 2**20  # of every other row, which may be several lines
SPLIT_OF = {**{name: name for name in layout.SPLITS}, "validation": "val", "valid": "val"}  # by what people call it
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\3\4")  # gzip, bzip2, xz, zstd, zip
EXACT = 2**24  # float32, in which RecordIO has its labels, tells all whole numbers below apart
ROWS = 1024  # of columns of a Parquet file whose values are kept once each
MACOS_FOLDER = "__MACOSX"  # which macOS adds to a zip file
MAX_WEIGHT = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Source:
    records: Callable  # records(skipped) as above
    root: str
    may_repeat: bool  # name a path twice


def open_source(path, kind, root):
    """The source at a path.

    kind  one of KINDS; None: found by content
    root  of the paths in a manifest; None: its own folder
    """
    if not os.path.isdir(path):
        _check_file(path)
    kind = kind or kind_of(path)
    if kind == "manifest" and os.path.isdir(path):
        raise PackError(f"{path}: a folder, but a manifest is a file; name that file")
    if kind in ("folder", "pack") and not os.path.isdir(path):
        raise PackError(f"{path}: a file, but the kind {kind} is of folders; name its folder or leave --from out")
    is_list = kind in ("manifest", "parquet")
    if not is_list and root is not None:
        raise PackError(f"--root {root} is for the paths of a manifest, but {path} is of the kind {kind}; leave it out")
    beside = path if os.path.isdir(path) else os.path.dirname(path)
    return Source(lambda skipped: KINDS[kind](path, skipped), root or beside, is_list)


def kind_of(path):
    """The kind of source that lies at a path, by its content."""
    if not os.path.isdir(path):
        with open(path, "rb") as file:
            head = file.read(512)
        if head.startswith(COMPRESSED):
            raise PackError(f"{path}: compressed; unpack it first")
        if head[:4] == b"PAR1":
            return "parquet"
        if head[:4] == recordio.MAGIC:
            return "recordio"
        if head[257:262] == b"ustar" or path.endswith(".tar"):
            return "webdataset"
        return "manifest"
    if is_pack(path):
        return "pack"
    files, others = _shard_files(path)
    for kind, suffix in SUFFIXES.items():
        if not others and any(name.endswith(suffix) for _, name in files):
            return kind
    return "folder"


def is_pack(path):
    """Whether there is a pack, or a folder of packs."""
    return any(os.path.isfile(os.path.join(path, folder, layout.INDEX_FILE)) for folder in ("", "train"))


def _check_file(path):
    """PackError for a pipe, a device and the like, which may have no end, or never a begin."""
    if not os.path.isfile(path):
        raise PackError(f"{path}: neither a file nor a folder")


def _shard_files(root):
    """([(split or "", path)] of all files at the top and in the folders of splits, number of all other folders)."""
    folders, names = _listed(root, Counter())
    files, others = [(_split_named(name), os.path.join(root, name)) for name in names], 0
    for folder in folders:
        if folder in SPLIT_OF:
            inner, names = _listed(os.path.join(root, folder), Counter())
            files += [(SPLIT_OF[folder], os.path.join(root, folder, name)) for name in names]
            others += len(inner)
        else:
            others += 1
    return files, others


def _split_named(path):
    """The split that a file is named after, as train-000.tar, train.tar or images_validation_000.tar; "" where it is
    none, or several and the first word is none."""
    words = [SPLIT_OF.get(word, "") for word in re.split(r"[-_.]", os.path.basename(path))]
    named = {split for split in words if split}
    return named.pop() if len(named) == 1 else words[0]


def check_splits(paths):
    """PackError where shards that are named after several splits are given one by one: that would lose the splits."""
    shards = [path for path in paths if path.endswith(tuple(SUFFIXES.values())) and not os.path.isdir(path)]
    of_split = {split: path for path in shards if (split := _split_named(path))}
    if len(of_split) > 1:
        raise PackError(f"{' and '.join(of_split.values())} are named after different splits, which are only kept of "
                        "shards in one folder; give that folder instead of its files, or rename them to merge them")


def _shards(path, suffix):
    """[(split, file)] of a file, or of a folder in which train-000.tar and train/000.tar are of split train."""
    if not os.path.isdir(path):
        return [("", path)]
    shards = [(split, file) for split, file in _shard_files(path)[0] if file.endswith(suffix)]
    if len({bool(split) for split, _ in shards}) > 1:
        bare = next(file for split, file in shards if not split)
        raise PackError(f"{bare}: of no split, but other files are; let it have train, val or test in its name")
    for _, file in shards:
        _check_file(file)
    return shards


def folder_source(root, skipped):
    """Images of a tree, in a fixed order."""
    ignored = skipped.ignored
    top = set(_listed(root, Counter())[0])
    has_splits = "train" in top and top <= SPLIT_OF.keys()
    if not has_splits and "train" in top and len(splits := top & SPLIT_OF.keys()) > 1:
        note(f"{root}: {', '.join(sorted(splits))} are taken for classes, not for splits, because "
             f"{min(top - splits)} stands beside them")
    del top  # there may be a folder for every class
    levels = [iter([""])]
    while levels:
        folder = next(levels[-1], None)
        if folder is None:
            levels.pop()
            continue
        inner, names = _listed(os.path.join(root, folder), ignored)
        first, _, label = folder.partition("/") if has_splits else ("", "", folder)
        for name in names:
            path = os.path.join(folder, name)
            if not name.lower().endswith(IMAGE_SUFFIXES):
                ignored["files that are not images"] += 1
            elif not label:
                raise PackError(f"{path}: an image of no class; it belongs into a folder named after its class")
            else:
                yield SPLIT_OF.get(first, ""), path, label, None
        levels.append(map(partial(os.path.join, folder), inner))


def _listed(folder, ignored):
    """(folders, others): names of what is in a folder, in their order. Of entries memory would hold half as many."""
    names = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == MACOS_FOLDER:
                ignored["hidden files and folders"] += 1
            elif entry.is_symlink() and os.path.isdir(entry.path):  # may lead out of the tree, or round in circles
                ignored["links to folders"] += 1
            else:
                names[not entry.is_dir(follow_symlinks=False)].append(entry.name)
    return tuple(map(sorted, names))


def manifest_source(path, skipped):
    """Rows of a CSV or TSV file, in its order."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline(MAX_LINE)
            if len(header) == MAX_LINE:
                raise PackError(f"{path}: the first line has more than {MAX_LINE} characters; it must name the columns")
            delimiter = "\t" if "\t" in header else ","
            columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
            if len(set(columns)) != len(columns) or not {"path", "label"} <= set(columns):
                raise PackError(f"{path}: the first line must name the columns path, label and, if wanted, split and "
                                f"weight once each; it is {header.strip()[:80]!r}")
            lines = _Lines(path, file)
            rows = csv.reader(lines, delimiter=delimiter, strict=True)
            for cells in rows:
                lines.left = MAX_ROW
                if not cells:
                    continue
                where = f"{path}: line {rows.line_num + 1}"
                if len(cells) != len(columns):
                    raise PackError(f"{where}: {len(cells)} cells, but the header has {len(columns)}")
                row = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
                _check_row(where, row)
                yield row.get("split", ""), os.path.normpath(row["path"]), row["label"], None, *_weight(where, row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise PackError(f"{path}: not a CSV or TSV file in UTF-8: {error}") from error


class _Lines:
    """Lines of a file, of which so many characters may come until more are allowed: a row without an end must not fill
    the memory."""

    def __init__(self, path, file):
        self.path, self.file, self.left = path, file, MAX_ROW

    def __iter__(self):
        while line := self.file.readline(self.left + 1):
            self.left -= len(line)
            if self.left < 0:
                raise PackError(f"{self.path}: a row is longer than {MAX_ROW} characters: is a quote not closed?")
            yield line


def _check_row(where, row):
    """PackError where the texts of a manifest's row are not allowed; its split becomes one of ours."""
    if "path" in row and not _stays_below(row["path"]):
        raise PackError(f"{where}: path {row['path']!r} must be relative and stay below the root")
    if "path" in row and (num_bytes := len(row["path"].encode())) > MAX_PATH_BYTES:
        raise PackError(f"{where}: path of {num_bytes} bytes, more than {MAX_PATH_BYTES}")
    if "split" in row:
        if row["split"] not in SPLIT_OF:
            raise PackError(f"{where}: split {row['split']!r} is none of {', '.join(SPLIT_OF)}")
        row["split"] = SPLIT_OF[row["split"]]
    if not row["label"]:
        raise PackError(f"{where}: no label")


def _weight(where, row):
    """(weight,) of a manifest's row, () where there is no such column."""
    if "weight" not in row:
        return ()
    text, number = row["weight"], math.nan
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        number = float(text)
    if not 0 <= number <= MAX_WEIGHT:
        raise PackError(f"{where}: weight {text!r} is not a number from 0 to {MAX_WEIGHT:.4g}; give every row one, or "
                        "leave the column out")
    return (number,)


def _stays_below(path):
    parts = path.split("/")
    return parts[0] != "" and ".." not in parts and "\0" not in path


def parquet_source(path, skipped):
    """Rows of one or several Parquet files: the columns of a manifest, or `image` with the bytes in place of `path`.

    image  binary, or a struct with a binary field bytes
    """
    from pyarrow import ArrowException  # here, since it takes longer to import than a small data set to pack

    for split, file in _shards(path, ".parquet"):
        try:
            for number, row in enumerate(_parquet_rows(file), 1):
                where, image = f"{file}: row {number}", row.pop("image", None)
                if image is None:
                    yield _parquet_record(where, split, row)
                elif (num_bytes := image.as_buffer().size) > layout.MAX_RECORD_BYTES:
                    skipped.add(split, where, f"{num_bytes} bytes, more than {layout.MAX_RECORD_BYTES}")
                else:
                    yield _parquet_record(where, split, row, image.as_py())
        except MemoryError as error:
            raise PackError(f"{file}: some of its rows do not fit into memory ({error}); write it in smaller "
                            "pages, or take a machine with more") from error
        except (ArrowException, OSError, ValueError) as error:
            if isinstance(error, PackError):
                raise
            raise PackError(f"{file}: not readable as Parquet: {error}") from error


def _parquet_rows(file):
    """Yields {column: pyarrow scalar, or None} of each row.

    A file of some kilobytes can hold a value of many megabytes a thousand times, whatever it announces: one row is read
    at a time. Of columns that come as dictionary and indices it is many, as each time brings the whole dictionary.
    """
    from pyarrow.parquet import ParquetFile
    from pyarrow.types import is_dictionary

    def read(columns, rows):
        with ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table:
            for batch in table.iter_batches(rows, columns=columns, use_threads=False):
                for number in range(batch.num_rows):
                    yield {name: _plain(column[number])
                           for name, column in zip(batch.schema.names, batch.columns, strict=True)}

    with ParquetFile(file) as table:
        schema = table.schema_arrow
    columns = _parquet_columns(file, schema)
    coded = [name for name in columns if name in schema.names and is_dictionary(schema.field(name).type)]
    plain = [name for name in columns if name not in coded]
    readers = [read(*some) for some in ((plain, 1), (coded, ROWS)) if some[0]]
    for parts in zip(*readers, strict=True):
        yield {name: value for part in parts for name, value in part.items()}


def _plain(value):
    """What a pyarrow scalar stands for, without a copy; None where there is nothing."""
    from pyarrow import DictionaryScalar, StructScalar

    while value is not None and value.is_valid:
        if isinstance(value, StructScalar):
            value = value["bytes"]
        elif isinstance(value, DictionaryScalar):
            value = value.value
        else:
            return value
    return None


def _parquet_columns(file, schema):
    from pyarrow import types

    kinds = dict(zip(schema.names, schema.types, strict=True))
    if len(kinds) != len(schema.names) or "label" not in kinds or not kinds.keys() & {"path", "image"}:
        raise PackError(f"{file}: must have the columns label, path or image and, if wanted, split and weight once "
                        f"each; it has {', '.join(map(repr, schema.names))}")
    names = [name for name in ("path", "label", "split", "weight", "image") if name in kinds]
    columns = list(names)
    for name in names:
        kind = kinds[name]
        if types.is_dictionary(kind):
            kind = kind.value_type
        if name == "image":
            if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind, columns[-1] = kind.field("bytes").type, "image.bytes"
            fits = types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
        elif name == "weight":
            fits = types.is_floating(kind) or types.is_integer(kind)
        else:
            fits = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
            fits = fits or (name == "label" and types.is_integer(kind))
        if not fits:
            raise PackError(f"{file}: column {name} is of type {kind}; path and split must be texts, label a text or "
                            "an integer, weight a number, image binary")
    return columns


def _parquet_record(where, split, row, image=None):
    if image is not None:
        row.pop("path", None)
    texts = {name: _text(where, name, value) for name, value in row.items()}
    if image is None and "path" not in texts:
        raise PackError(f"{where}: no image")
    _check_row(where, texts)
    # Of an image that comes as bytes the path is only what messages call it.
    path = where if image is not None else os.path.normpath(texts["path"])
    return texts.get("split", split), path, texts["label"], image, *_weight(where, texts)


def _text(where, name, value):
    """A pyarrow scalar as a text; PackError where it is too long."""
    from pyarrow import BinaryScalar

    if value is None:
        return ""
    if isinstance(value, BinaryScalar) and (num_bytes := value.as_buffer().size) > MAX_PATH_BYTES:
        raise PackError(f"{where}: {name} of {num_bytes} bytes, more than {MAX_PATH_BYTES}")
    return str(value.as_py())


def webdataset_source(path, skipped):
    """Samples of tar files: neighbours whose names agree up to the first dot, an image and .cls or .json with `label`.

    .cls is the class as a number or a name. A .json may also have `xc_class_name`, as data_tools.export writes it: that
    then is the class, whatever its number is here.
    """
    for split, file in _shards(path, ".tar"):
        members = _members(file, split, skipped)
        for key, sample in itertools.groupby(members, key=lambda member: member[0]):
            where = f"{file}: {key}"
            images, labels = [], []
            for _, suffix, data in sample:
                found, most = (images, 1) if "." + suffix in IMAGE_SUFFIXES else (labels, MAX_LABELS)
                if len(found) <= most:  # one more tells that there are too many; memory must not hold them all
                    found.append((suffix, data))
            if len(images) != 1 or not labels:
                what = "several images" if images[1:] else "no label (.cls or .json)" if images else "no image"
                skipped.add(split, where, what)
                continue
            if len(labels) > MAX_LABELS:
                skipped.add(split, where, f"more than {MAX_LABELS} files with a label for one image")
                continue
            try:
                labels, names = map(set, zip(*(_label(suffix, data) for suffix, data in labels), strict=True))
            except ValueError as error:
                skipped.add(split, where, str(error))
                continue
            names = names - {None} or labels
            for found in labels, names:
                if len(found) > 1:
                    skipped.add(split, where, f"labels {' and '.join(map(repr, sorted(found)))} for one image")
                    break
            else:
                yield split, where, names.pop(), images[0][1]


def _members(file, split, skipped):
    """(key, suffix, bytes) of the images and labels in a tar file, as they come."""
    file_bytes = os.path.getsize(file)
    try:
        with open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r|", tarinfo=_Member) as tar:
            for member in tar:
                tar.members = []  # it would keep them all
                if tar.offset > file_bytes:  # where the next header should be; tarfile would look for it without end
                    raise tarfile.ReadError(f"ends inside of {member.name}")
                folder, slash, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key, suffix = folder + slash + stem, suffix.lower()
                is_image = "." + suffix in IMAGE_SUFFIXES
                if member.isdir():
                    continue
                if not (member.isreg() and not member.issparse()):
                    skipped.add(split, f"{file}: {member.name}", "a link, a device or a file with holes")
                elif not _stays_below(member.name):
                    skipped.add(split, f"{file}: {member.name}", "its name is absolute or leaves the folder")
                elif not is_image and suffix not in ("cls", "json"):
                    skipped.ignored["members that are neither images nor labels"] += 1
                elif member.size > (layout.MAX_RECORD_BYTES if is_image else MAX_LABEL_BYTES):
                    skipped.add(split, f"{file}: {member.name}", f"{member.size} bytes, too many")
                else:
                    yield key, suffix, tar.extractfile(member).read()
            # tarfile takes a damaged header for the end, and a cut between two members, too.
            raw.seek(tar.offset)
            num_bytes = 0
            while block := raw.read(2**20):
                num_bytes += len(block)
                if block.strip(b"\0"):
                    raise tarfile.ReadError(f"no header at byte {tar.offset}, where there is more than zeros")
            if num_bytes < tarfile.BLOCKSIZE * 2:
                raise tarfile.ReadError("ends without the two empty blocks that close a tar file")
    except RecursionError as error:  # tarfile's, for each header of a chain
        raise PackError(f"{file}: a member has too many headers: damaged; make the tar file anew") from error
    except (tarfile.TarError, EOFError, UnicodeError, ValueError, OverflowError) as error:
        if isinstance(error, PackError):
            raise
        raise PackError(f"{file}: cut short or not a tar file: {error}") from error


class _Member(tarfile.TarInfo):
    """Refuses long headers: tarfile reads them whole, and searches them in time that grows with their square. And many
    keys for all members, which it copies for each header."""

    def _proc_member(self, tar):
        if len(tar.pax_headers) > MAX_GLOBAL_KEYS:
            raise tarfile.ReadError(f"global headers of {len(tar.pax_headers)} keys, more than {MAX_GLOBAL_KEYS}")
        if self.type in HEADERS and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes, more than {MAX_HEADER_BYTES}")
        return super()._proc_member(tar)


def _label(suffix, data):
    """(label, class name or None) that a .cls or .json carries; ValueError where there is no label."""
    text, name = data.decode("utf-8-sig"), None
    if suffix == "json":
        try:
            value = json.loads(text)
        except RecursionError as error:
            raise ValueError("its .json is nested too deep") from error
        label, name = (value.get("label"), value.get("xc_class_name")) if isinstance(value, dict) else (None, None)
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise ValueError("its .json has no field label that is a number or a name")
        if name is not None and not (isinstance(name, str) and name.strip()):
            raise ValueError("its .json has a field xc_class_name that is no name")
        text = str(label)
        (text + (name or "")).encode()  # JSON can name half of a pair, which is no character
    if not text.strip():
        raise ValueError(f"its .{suffix} is empty")
    return text.strip(), name


def recordio_source(path, skipped):
    """Images of MXNet RecordIO files. Of a label of several numbers the first is the class."""
    for split, file in _shards(path, ".rec"):
        index = os.path.splitext(file)[0] + ".idx"
        if not os.path.exists(index):
            index = None
        else:
            _check_file(index)
        for number, (start, data) in enumerate(recordio.records(file, index)):
            where = f"{file}: record {number}"
            if data is None:
                skipped.add(split, where, f"more than {layout.MAX_RECORD_BYTES} bytes")
                continue
            try:
                label, image = recordio.unpack(data)
            except ValueError as error:
                skipped.add(split, f"{where} at byte {start}", str(error))
                continue
            if not len(image):  # the ranges that face-recognition sets keep in their first record and behind the images
                skipped.ignored["records without an image"] += 1
            elif not (math.isfinite(label) and label >= 0 and label == int(label)):
                skipped.add(split, where, f"label {label} is not a number of a class")
            elif label >= EXACT:
                raise PackError(f"{where}: label {int(label)}, but RecordIO has float32, which merges classes "
                                f"from {EXACT} on; pack this data set from another source")
            else:
                yield split, where, str(int(label)), image


def pack_source(path, skipped):
    """Records of a pack, or of a folder of packs."""
    for split, pack in open_splits(path).items():
        split = "" if os.path.exists(os.path.join(path, layout.INDEX_FILE)) else split
        for start, stop in pack.ranges():
            numbers = np.arange(start, stop)
            images, labels = pack.read(numbers)
            weights = pack.weights(start, stop)[:, None].tolist() if pack.has_weights else [()] * len(images)
            for number, image, label, weight in zip(numbers, images, labels, weights, strict=True):
                yield split, f"{pack.path}: record {number}", pack.class_name(label), image, *weight


KINDS = {"folder": folder_source, "manifest": manifest_source, "parquet": parquet_source,
         "webdataset": webdataset_source, "recordio": recordio_source, "pack": pack_source}
SUFFIXES = {"webdataset": ".tar", "recordio": ".rec", "parquet": ".parquet"}
