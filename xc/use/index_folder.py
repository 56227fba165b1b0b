"""The folder of an index, as `xc.index build` writes it and `xc.index query` opens it.

    index.faiss    of faiss: the vector of row i has the number i; any faiss reads it
    names.parquet  name and place of row i, in row groups of 16,384: one is read for a name, whatever their number
    index.json     below

    format, version
    of               "classes": place is the class; "images": place is the number of the image in the source
    source, run      the images, and the run, by absolute path; source is "" of classes
    working_folder   of the command: names of images may be relative to it
    checkpoint, backbone_crc32, classes_digest, feature_dim, logits     what made the vectors, and must make the queries
    type, factory    --type, and what it was to faiss
    count            vectors
    search           {name: value}: cells or candidates that a search looks at; saved in index.faiss as well
    recall_at_1, recall_at_10, recall_queries     see index_recall.py
    index_bytes, names_bytes, seconds

The folder appears complete or not at all.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# isort: split
import faiss  # after torch: both load an OpenMP library

from xc.errors import UserError
from xc.use.tables import ParquetTable

FORMAT, VERSION = "xc-index", 1
INDEX, NAMES, META = "index.faiss", "names.parquet", "index.json"
GROUP = 2**14  # names of a row group
_MOST_META = 2**20  # bytes
_TYPES = {"of": str, "source": str, "working_folder": str, "run": str, "checkpoint": str, "backbone_crc32": int,
          "classes_digest": str, "feature_dim": int, "logits": str, "type": str, "count": int, "index_bytes": int,
          "names_bytes": int}


class NamesWriter:
    """The table of names, appended in any pieces."""

    def __init__(self, path):
        import pyarrow as pa

        self._table = ParquetTable(path, [("name", pa.string()), ("place", pa.int64())])
        self._names, self._places = [], []

    def add(self, names, places):
        """names: list of n; places: n numbers"""
        self._names += names
        self._places += places
        while len(self._names) >= GROUP:
            self._write(GROUP)

    def close(self):
        if self._names:
            self._write(len(self._names))
        self._table.close()

    def _write(self, count):
        self._table.write({"name": self._names[:count], "place": self._places[:count]})
        del self._names[:count], self._places[:count]


@dataclass(frozen=True)
class Index:
    """An index that is open. faiss: its index, on rank 0; None on the others."""

    folder: Path
    meta: dict
    faiss: object
    _names: object

    def named(self, rows):
        """{row: (name, place)} of some rows (any shape)."""
        found = {}
        wanted = np.unique(rows)
        for group in np.unique(wanted // GROUP).tolist():
            here = wanted[wanted // GROUP == group]
            table = self._names.read_row_group(group).take(here - group * GROUP)
            names, places = (table.column(column).to_pylist() for column in ("name", "place"))
            found |= dict(zip(here.tolist(), zip(names, places, strict=True), strict=True))
        return found


def what_made(trained):
    """The facts of a Trained that an index and its queries must have in common."""
    return {"checkpoint": trained.folder.name, "backbone_crc32": trained.meta["files"]["backbone.safetensors"]["crc32"],
            "classes_digest": trained.meta.get("classes_digest", ""), "feature_dim": trained.feature_dim,
            "logits": trained.cfg.logits}


def check_same(folder, meta, trained):
    """UserError where queries by a Trained would not be in the space of the index."""
    for name, value in what_made(trained).items():
        if name != "checkpoint" and value != meta[name]:
            raise UserError(f"{folder} was built with {name} {meta[name]} and {trained.folder} has {value}: "
                            "query with the run and checkpoint of the index, or build the index again")


def read_meta(folder):
    """The content of index.json; UserError where the folder is no index."""
    folder = Path(folder)
    try:
        with open(folder / META, "rb") as file:
            meta = json.loads(file.read(_MOST_META))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder} is no index ({META}: {error}): name the --out of xc.index build") from error
    if not isinstance(meta, dict) or (meta.get("format"), meta.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{folder} is no index of format {FORMAT}, version {VERSION}: build it again")
    wrong = [name for name, kind in _TYPES.items() if type(meta.get(name)) is not kind]
    if wrong:
        raise UserError(f"{folder / META} is damaged: {wrong[0]} is {meta.get(wrong[0])!r}: build the index again")
    return meta


def open_index(folder, meta, searches):
    """The Index at a folder. faiss maps the file, so that a search reads what it looks at.

    meta      of `read_meta`
    searches  whether this rank does: the others need no index

    UserError where a file is missing, damaged, or of another width than index.json says.
    """
    folder = Path(folder)
    faiss.omp_set_num_threads(torch.get_num_threads())
    if not searches:
        return Index(folder, meta, None, None)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    for name, size in (INDEX, meta["index_bytes"]), (NAMES, meta["names_bytes"]):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise UserError(f"{path} has {found} bytes, not {size}: build the index again" if found is not None else
                            f"{path} is missing: build the index again")
    try:
        index, names = faiss.read_index(str(folder / INDEX), faiss.IO_FLAG_MMAP_IFC), ParquetFile(folder / NAMES)
    except (RuntimeError, MemoryError, ArrowException, OSError) as error:
        raise UserError(f"{folder} cannot be read ({error}): build the index again") from error
    groups = -(-meta["count"] // GROUP)
    for what, found, expected in ((f"vectors of {INDEX} have width", index.d, meta["feature_dim"]),
                                  (f"number of vectors of {INDEX} is", index.ntotal, meta["count"]),
                                  (f"number of names of {NAMES} is", names.metadata.num_rows, meta["count"]),
                                  (f"number of row groups of {NAMES} is", names.metadata.num_row_groups, groups)):
        if found != expected:
            raise UserError(f"{folder}: the {what} {found}, and {META} says {expected}: build the index again")
    return Index(folder, meta, index, names)


def write_index(folder, index, meta):
    """Write index.faiss, and index.json with the sizes of the other files."""
    faiss.write_index(index, str(Path(folder) / INDEX))
    sizes = {f"{name.partition('.')[0]}_bytes": (Path(folder) / name).stat().st_size for name in (INDEX, NAMES)}
    text = json.dumps({"format": FORMAT, "version": VERSION, **meta, **sizes}, indent=1)
    (Path(folder) / META).write_text(text + "\n", encoding="utf-8")
