"""JSON Lines: an object on every line, as {"file_name": "a/1.jpg", "label": "cat"}."""

import json

from data_tools.sources.base import Format
from data_tools.sources.columns import Columns
from data_tools.sources.manifest import MAX_ROW, Lines
from xc.data.pack import PackError


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
            if lost := [name for name in (names[index] for index in columns.place.values()) if name not in value]:
                raise PackError(f"{where}: no field {', '.join(map(repr, lost))}, which the first line has")
            columns.look_for_splits([value.get(name) for name in names])
            row = {what: _text(where, names[index], value[names[index]]) for what, index in columns.place.items()}
            yield columns.record(where, row)
    if columns is not None:
        columns.end()


def _object(path, lines, line):
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        raise PackError(f"{path}: line {lines.number}{column}: not JSON: {getattr(error, 'msg', 'nested too deep')}; "
                        "every line must be one object") from error
    if not isinstance(value, dict):
        raise PackError(f"{path}: line {lines.number}: not an object with the fields path and label")
    return value


def _text(where, name, value):
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise PackError(f"{where}: field {name!r} is {json.dumps(value)[:40]}, neither a text nor a number")
    try:
        str(value).encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can have
        raise PackError(f"{where}: field {name!r} is not a text: {error}") from error
    return str(value).strip()


def _is_file(path, head):
    return path.lower().endswith((".jsonl", ".ndjson")) or head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


FORMAT = Format(records, is_file=_is_file, takes_folders=False, names_files=True)
