"""Manifests: tables in CSV or TSV with a line for every image."""

import csv
import math
import os
import re

import numpy as np

from data_tools.sources.base import SPLIT_OF, Format, stays_below
from xc.pack import PackError

MAX_LINE = 2**16  # characters of the first line
MAX_ROW = 2**20  # characters of every other row, which may be several lines
MAX_PATH_BYTES = 4096  # of a path, which Linux takes to 4,095
MAX_WEIGHT = float(np.finfo(np.float32).max)


def records(path, skipped):
    """Yields the rows of a CSV or TSV file, in its order."""
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
                check_row(where, row)
                yield row.get("split", ""), os.path.normpath(row["path"]), row["label"], None, *weight_of(where, row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise PackError(f"{path}: not a CSV or TSV file in UTF-8: {error}") from error


class _Lines:
    """Lines of a file, at most MAX_ROW characters for one row: a row without an end must not fill the memory."""

    def __init__(self, path, file):
        self.path, self.file, self.left = path, file, MAX_ROW

    def __iter__(self):
        while line := self.file.readline(self.left + 1):
            self.left -= len(line)
            if self.left < 0:
                raise PackError(f"{self.path}: a row is longer than {MAX_ROW} characters: is a quote not closed?")
            yield line


def check_row(where, row):
    """PackError where the texts of a manifest's row are not allowed; its split becomes train, val or test."""
    if "path" in row and not stays_below(row["path"]):
        raise PackError(f"{where}: path {row['path']!r} must be relative and stay below the root")
    if "path" in row and (num_bytes := len(row["path"].encode())) > MAX_PATH_BYTES:
        raise PackError(f"{where}: path of {num_bytes} bytes, more than {MAX_PATH_BYTES}")
    if "split" in row:
        if row["split"] not in SPLIT_OF:
            raise PackError(f"{where}: split {row['split']!r} is none of {', '.join(SPLIT_OF)}")
        row["split"] = SPLIT_OF[row["split"]]
    if not row["label"]:
        raise PackError(f"{where}: no label")


def weight_of(where, row):
    """(weight,) of a manifest's row; () where there is no such column."""
    if "weight" not in row:
        return ()
    text, number = row["weight"], math.nan
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        number = float(text)
    if not 0 <= number <= MAX_WEIGHT:
        raise PackError(f"{where}: weight {text!r} is not a number from 0 to {MAX_WEIGHT:.4g}; give every row one, or "
                        "leave the column out")
    return (number,)


FORMAT = Format(records, takes_folders=False, names_files=True)
