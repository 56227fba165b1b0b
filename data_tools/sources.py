"""What data sets come as. A source is an iterator of (split or "", path below a root, class name)."""

import csv
import os
from collections import Counter

from xc import pack as layout
from xc.pack import PackError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def folder_source(root, ignored):
    """Images of a tree, in a fixed order. What is passed over is counted in `ignored`, a Counter."""
    top = {entry.name for entry in _entries(root, Counter()) if entry.is_dir()}
    has_splits = "train" in top and top <= set(layout.SPLITS)
    folders = [""]
    while folders:
        folder = folders.pop()
        inner = []
        for entry in _entries(os.path.join(root, folder), ignored):
            path = os.path.join(folder, entry.name)
            if entry.is_dir():
                inner.append(path)
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                split, _, name = folder.partition("/") if has_splits else ("", "", folder)
                if not name:
                    raise PackError(f"{path}: an image of no class; it belongs into a folder named after its class")
                yield split, path, name
            else:
                ignored["files that are not images"] += 1
        folders += reversed(inner)


def _entries(folder, ignored):
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                ignored["hidden files and folders"] += 1
            elif entry.is_symlink() and entry.is_dir():  # may lead out of the tree, or round in circles
                ignored["links to folders"] += 1
            else:
                yield entry


def manifest_source(path):
    """Rows of a CSV or TSV file, in its order."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            header = file.readline(2**16)
            delimiter = "\t" if "\t" in header else ","
            columns = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
            if len(set(columns)) != len(columns) or not {"path", "label"} <= set(columns):
                raise PackError(f"{path}: the first line must name the columns path, label and, if wanted, split once "
                                f"each; it is {header.strip()[:80]!r}")
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            for cells in filter(None, rows):
                where = f"{path}: line {rows.line_num + 1}"
                if len(cells) != len(columns):
                    raise PackError(f"{where}: {len(cells)} cells, but the header has {len(columns)}")
                row = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
                parts = row["path"].split("/")
                if parts[0] == "" or ".." in parts or "\0" in row["path"]:
                    raise PackError(f"{where}: path {row['path']!r} must be relative and stay below the root")
                if "split" in row and row["split"] not in layout.SPLITS:
                    raise PackError(f"{where}: split {row['split']!r} is none of {', '.join(layout.SPLITS)}")
                if not row["label"]:
                    raise PackError(f"{where}: no label")
                yield row.get("split", ""), row["path"], row["label"]
    except (UnicodeDecodeError, csv.Error) as error:
        raise PackError(f"{path}: not a CSV or TSV file in UTF-8: {error}") from error
