"""JSON Lines: an object on every line, as {"file_name": "a/1.jpg", "label": "cat"}."""

import json
import math

from data_tools.sources.base import Format
from data_tools.sources.columns import USUAL, Columns
from data_tools.sources.manifest import MAX_ROW, Lines
from xc.data.pack import PackError

# Fields that all lines have, or none.
LATE = {*USUAL["split"], *USUAL["weight"], "subset", "set", "partition", "phase", "usage"}


def records(path, how, skipped):
    """Yields the objects of a file, in its order."""
    columns, names = None, []
    lines = Lines(path, how)
    with lines.file:
        for line in lines:
            lines.left = MAX_ROW
            if not line.strip():
                continue
            where, value = f"{path}: line {lines.number}", _object(path, lines, line)
            if columns is None:
                names = list(value)
                columns = Columns(path, names, how)
            if new := [name for name in value if name not in names and name.strip().lower() in LATE]:
                raise PackError(f"{where}: field {new[0]!r}, which line 1 lacks; give all lines the same fields")
            if lost := [name for name in (names[index] for index in columns.place.values()) if name not in value]:
                raise PackError(f"{where}: no field {', '.join(map(repr, lost))}, which the first line has")
            columns.look_for_splits([value.get(name) for name in names])
            row = {what: _text(where, names[index], value[names[index]], may_be_bool=what == "split")
                   for what, index in columns.place.items()}
            yield columns.record(where, row)
    if columns is not None:
        columns.end()


def _object(path, lines, line):
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        place, reason = f"line {lines.number}", str(error)[:60]
        if isinstance(error, json.JSONDecodeError):
            place, reason = f"{place}, column {error.colno}", error.msg
        raise PackError(f"{path}: {place}: not JSON: {reason}; every line must be one object") from error
    if not isinstance(value, dict):
        raise PackError(f"{path}: line {lines.number}: not an object with the fields path and label")
    return value


def _text(where, name, value, may_be_bool):
    if value is None:
        return ""
    is_number = isinstance(value, int | float) and (may_be_bool or not isinstance(value, bool)) and math.isfinite(value)
    if not (isinstance(value, str) or is_number):
        raise PackError(f"{where}: field {name!r} is {json.dumps(value)[:40]}, neither a text nor a number")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can have
        raise PackError(f"{where}: field {name!r} is not a text: {error}") from error
    return str(value).strip()


def _is_file(path, head):
    return path.lower().endswith((".jsonl", ".ndjson")) or head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


FORMAT = Format(records, is_file=_is_file, takes_folders=False, names_files=True)
