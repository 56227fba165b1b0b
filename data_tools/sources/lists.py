"""Lists without a header: `path label` on every line, and MXNet's .lst, `number label … path` with tabs."""

import re

from data_tools.sources.base import Format
from data_tools.sources.columns import class_name, path_below
from data_tools.sources.manifest import MAX_ROW, Lines
from data_tools.sources.names import claims_image
from xc.data.pack import PackError

_SPACED = re.compile(r"(.*\S)\s+(\S+)")  # the path may have spaces, the label has none
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


def records(path, how, skipped):
    """Yields the lines of a list, in its order. If a line of a .lst has several labels, the first is the class."""
    lines = Lines(path, how)
    with lines.file:
        for line in lines:
            lines.left = MAX_ROW
            if (text := line.strip("\r\n")) and not text.startswith("#"):
                where = f"{path}: line {lines.number}"
                image, label = _lst(where, text) if _is_lst(path) else _spaced(where, text)
                yield "", path_below(where, image, how.root), class_name(label), None


def _spaced(where, text):
    match = _SPACED.fullmatch(text.strip())
    if not match:
        raise PackError(f"{where}: not a path, a space and a label: {text[:80]!r}")
    return match.groups()


def _lst(where, text):
    number, *labels, image = text.split("\t") if "\t" in text else (text, "")
    if not (number.strip().isdigit() and labels and all(_NUMBER.fullmatch(label.strip()) for label in labels)):
        raise PackError(f"{where}: not a number, a label in numbers and a path with tabs between them: {text[:80]!r}")
    return image.strip(), labels[0].strip()


def _is_lst(path):
    return path.lower().endswith(".lst")


def _is_file(path, head):
    if _is_lst(path):
        return True
    line = head.split(b"\n")[0].decode(errors="replace").strip()
    match = _SPACED.fullmatch(line)
    return bool(match) and claims_image(match[1]) and not any(mark in line for mark in ",;|\"")


FORMAT = Format(records, is_file=_is_file, takes_folders=False, names_files=True)
