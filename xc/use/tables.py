"""The files that predictions and features are written to, one row group at a time. Rank 0 alone writes."""

import csv
import json
import os

import numpy as np

_ESCAPES = {ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"}


def text(name):
    """A name as UTF-8 text; bytes of a file name that are none are written as \\udcXX."""
    return name.encode(errors="backslashreplace").decode()


class ParquetTable:
    """columns {name: list} of equal length are appended; fields: [(name, pyarrow type)]"""

    def __init__(self, path, fields):
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        self._pa, self._schema = pyarrow, pyarrow.schema(fields)
        self._writer = ParquetWriter(path, self._schema)

    def write(self, columns):
        arrays = [column if isinstance(column, self._pa.Array) else self._pa.array(column, field.type)
                  for column, field in zip(columns.values(), self._schema, strict=True)]
        self._writer.write_table(self._pa.table(arrays, self._schema))

    def close(self):
        self._writer.close()


class CsvTable:
    def __init__(self, path, names):
        self._file = open(path, "w", encoding="utf-8", newline="")  # noqa: SIM115
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(names)

    def write(self, columns):
        self._writer.writerows(zip(*columns.values(), strict=True))  # None is an empty cell

    def close(self):
        self._file.close()


class JsonLines:
    def __init__(self, path, names):
        self._file = open(path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115

    def write(self, columns):
        for row in zip(*columns.values(), strict=True):
            self._file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")

    def close(self):
        self._file.close()


def row_table(path, suffix, fields):
    """A table for rows of {name: kind of pyarrow} in a file of this suffix: .csv, .jsonl or .parquet."""
    if suffix == ".csv":
        return CsvTable(path, list(fields))
    if suffix == ".jsonl":
        return JsonLines(path, list(fields))
    import pyarrow as pa

    return ParquetTable(path, [(name, pa.type_for_alias(kind)) for name, kind in fields.items()])


def prediction_table(path, suffix):
    """A table for rows of path, rank, class, probability, reason."""
    return row_table(path, suffix, {"path": "string", "rank": "int32", "class": "string", "probability": "double",
                                    "reason": "string"})


class FeatureParquet:
    """Rows of path, features (a list of D float32, all null where there are none), reason."""

    def __init__(self, path, width):
        import pyarrow as pa

        self._pa, self._width = pa, width
        self._table = ParquetTable(path, [("path", pa.string()), ("features", pa.list_(pa.float32(), width)),
                                          ("reason", pa.string())])

    def write(self, names, features, reasons):
        """names, reasons: lists of n; features: (n, D) float32, anything where there is a reason"""
        # Lists of nulls: pyarrow writes lists that are null themselves, and cannot read them where their size is fixed.
        missing = np.repeat([reason is not None for reason in reasons], self._width)
        numbers = self._pa.array(features.ravel(), self._pa.float32(), mask=missing)
        lists = self._pa.FixedSizeListArray.from_arrays(numbers, self._width)
        self._table.write({"path": names, "features": lists, "reason": reasons})

    def close(self):
        self._table.close()


class FeatureArray:
    """A .npy of float32 (n, D), NaN where there are no features; and a text with a line for each row: its name, and
    after a tab the reason, if there is one."""

    def __init__(self, path, names_path, width):
        self._file = open(path, "wb")  # noqa: SIM115
        self._names = open(names_path, "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        self._width, self._count = width, 0
        self._write_header()

    def write(self, names, features, reasons):
        self._file.write(np.ascontiguousarray(features, "<f4"))
        for name, reason in zip(names, reasons, strict=True):
            cells = [name] if reason is None else [name, reason]
            self._names.write("\t".join(cell.translate(_ESCAPES) for cell in cells) + "\n")
        self._count += len(names)

    def close(self):
        self._write_header()
        self._file.close()
        self._names.close()

    def _write_header(self):
        """Of 128 bytes, whatever the number of rows, which is known at the end."""
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self._count}, {self._width}), }}"
        self._file.seek(0)
        self._file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n")
        self._file.seek(0, os.SEEK_END)
