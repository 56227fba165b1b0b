"""Manifests: tables in text, with a line for every image and its columns named in the first line."""

import csv
import re

from data_tools.sources.base import Format
from data_tools.sources.columns import Columns
from data_tools.sources.names import claims_image
from xc.data.pack import PackError

MAX_LINE = 2**16  # characters of the first line
MAX_ROW = 2**20  # characters of every other row, which may be several lines
DELIMITERS = ",;\t|"
_UNDECODED = re.compile("[\udc80-\udcff]")  # a byte that the encoding does not have


def records(path, how, skipped):
    """Yields the rows of a table, in its order."""
    lines = Lines(path, how)
    with lines.file:
        delimiter, names = _header(path, lines, how)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        columns = None
        try:
            for cells in rows:
                lines.left = MAX_ROW
                if not any(cells):
                    continue
                where = f"{path}: line {lines.number}"
                if columns is None:
                    names = names or [str(number) for number in range(1, len(cells) + 1)]
                    columns = Columns(path, names, how if how.header else _by_number(how, len(cells)))
                if len(cells) != len(names) and any(cells[len(names):]) or len(cells) < len(names):
                    raise PackError(f"{where}: {len(cells)} cells, but {'the header' if how.header else 'the first'} "
                                    f"has {len(names)}; put a cell with {delimiter!r} in it into quotes")
                columns.look_for_splits(cells)
                yield columns.record(where, {what: cells[index].strip() for what, index in columns.place.items()})
        except csv.Error as error:
            raise PackError(f"{path}: line {lines.number}: not in the format CSV: {error}") from error
        except UnicodeError as error:
            raise PackError(f"{path}: after line {lines.number}: not in {how.encoding}: {error}; give its encoding by "
                            "--encoding") from error
        if columns is None:
            columns = Columns(path, names or ["path", "label"], how)
        columns.end()


class Lines:
    """Lines of a text file, at most MAX_ROW characters for one row: a row without an end must not fill the memory.

    number  of the last line

    PackError where a byte is not in the encoding, with line and column.
    """

    def __init__(self, path, how):
        self.path, self.number, self.left, self._how = path, 0, MAX_ROW, how
        encoding = "utf-8-sig" if how.encoding == "utf-8" else how.encoding
        self.file = open(path, encoding=encoding, errors="surrogateescape", newline="")  # noqa: SIM115

    def first(self):
        try:
            line = self.file.readline(MAX_LINE)
        except UnicodeError as error:
            raise PackError(f"{self.path}: not in {self._how.encoding}: {error}; give its encoding by --encoding"
                            ) from error
        if len(line) == MAX_LINE:
            raise PackError(f"{self.path}: the first line has more than {MAX_LINE} characters; it must name the "
                            "columns")
        return self._checked(line)

    def __iter__(self):
        while line := self.file.readline(self.left + 1):
            self.left -= len(line)
            if self.left < 0:
                raise PackError(f"{self.path}: line {self.number + 1}: a row is longer than {MAX_ROW} characters: is a "
                                "quote not closed?")
            yield self._checked(line)

    def _checked(self, line):
        self.number += 1
        if not line.isascii() and (bad := _UNDECODED.search(line)):
            byte, is_wide = ord(bad[0]) - 0xDC00, self.number == 1 and line[:2] in ("\udcff\udcfe", "\udcfe\udcff")
            raise PackError(f"{self.path}: line {self.number}, column {bad.start() + 1}: byte 0x{byte:02x} is not "
                            f"{self._how.encoding}; give the encoding of the file by --encoding, as "
                            f"{'utf-16' if is_wide else 'cp1252 or latin-1'}")
        if "\0" in line and self.number == 1:
            raise PackError(f"{self.path}: the first line has zero bytes: not a text, or in another encoding, as "
                            "--encoding utf-16-le")
        return line


def _header(path, lines, how):
    """(delimiter, names of the columns); no names, and nothing read, where the table has no header."""
    start = lines.file.tell()
    line = lines.first()
    if line.strip().lower()[:4] == "sep=":  # Excel's
        line = lines.first()
    if not line.strip():
        raise PackError(f"{path}: {'empty' if not line else 'its first line is empty'}; the first line must name the "
                        "columns, as path,label")
    if not how.header:
        try:
            delimiter = csv.Sniffer().sniff(line.rstrip("\r\n"), DELIMITERS).delimiter
        except csv.Error:  # a single column, or quotes
            delimiter = max(DELIMITERS, key=line.count)
        lines.file.seek(start)
        lines.number = 0
        return delimiter, []
    # Of quoted names and of names with spaces, the number of delimiters tells more than csv.Sniffer does.
    delimiter = max(DELIMITERS, key=line.count)
    try:
        names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter, strict=True), [])]
    except csv.Error as error:
        raise PackError(f"{path}: line 1: not in the format CSV: {error}") from error
    while names and not names[-1]:  # a spreadsheet's empty columns
        names.pop()
    if any(map(claims_image, names)):
        raise PackError(f"{path}: the first line must name the columns, as path,label; it is {line.strip()[:80]!r}; "
                        "give --no-header if it is an image already")
    return delimiter, names


def _by_number(how, count):
    """A Reading of a table without header: its columns are called 1, 2, …"""
    usual = dict(zip(("path", "label", "split", "weight"), map(str, range(1, count + 1)), strict=False))
    return how.with_columns({**usual, **how.columns})


FORMAT = Format(records, takes_folders=False, names_files=True)
