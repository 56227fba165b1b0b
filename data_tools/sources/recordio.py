"""Reads MXNet RecordIO files of images (.rec), one record after the other.

A part is the magic number 0xced7230a, then a number whose upper 3 bits are the kind of the part and whose lower 29
bits are its length, then its bytes, and zeros up to a multiple of 4; all little-endian.
A record is one part of kind 0; or parts of kinds 1 (first), 2 and 3 (last), where the data had the magic number between
two parts.
An image is a record of flag (uint32), label (float32), id and id2 (uint64), then `flag` labels (float32) that replace
the one label, then the image file.
"""

import math
import os
import struct

from data_tools.sources.base import Format, check_file, shards
from xc.data import pack as layout
from xc.data.pack import PackError

MAGIC = struct.pack("<I", 0xCED7230A)
PART = struct.Struct("<4sI")
IMAGE = struct.Struct("<IfQQ")
WHOLE, FIRST, MIDDLE, LAST = range(4)
EXACT = 2**24  # below it float32, the type of the labels, tells all integers apart


def records(path, how, skipped):
    """Yields the images of MXNet RecordIO files. If a label has several numbers, the first is the class.

    Face-recognition sets keep ranges in labels of records without an image: their first, and those after the images.
    """
    for split, file in shards(path, ".rec", how, skipped):
        index = os.path.splitext(file)[0] + ".idx"
        if not os.path.exists(index):
            index = None
        else:
            check_file(index)
        for number, (start, data) in enumerate(read_records(file, index)):
            where = f"{file}: record {number}"
            if data is None:
                skipped.add(split, where, f"more than {layout.MAX_RECORD_BYTES} bytes")
                continue
            try:
                label, image, has_labels = unpack(data)
            except ValueError as error:
                skipped.add(split, f"{where} at byte {start}", str(error))
                continue
            if not len(image):
                if not has_labels:
                    skipped.add(split, where, "no image")
            elif how.leaves_out(split):
                yield split, where, "", image
            elif not (math.isfinite(label) and label >= 0 and label == int(label)):
                skipped.add(split, where, f"label {label} is not a class number")
            elif label >= EXACT:
                raise PackError(f"{where}: label {int(label)}, but RecordIO has float32, which merges classes "
                                f"from {EXACT} on; pack this data set from another source")
            else:
                yield split, where, str(int(label)), image


def read_records(path, index=None):
    """Yields (offset, bytes) of every record; None instead of more than MAX_RECORD_BYTES.

    index  the .idx file, with a number, a tab and a record's offset on each line. It is only compared, not needed.

    PackError where the file is truncated or not RecordIO, or the index belongs to another file.
    """
    size = os.path.getsize(path)
    offsets = None if index is None else _offsets(index)
    with open(path, "rb", buffering=2**20) as file:
        while (start := file.tell()) < size:
            if offsets is not None:
                _check_offset(index, path, next(offsets, None), start)
            yield start, _record(path, file, size)
    if offsets is not None:
        _check_offset(index, path, next(offsets, None), None)


def unpack(record):
    """(label, bytes of the image file, whether it has several labels); the image is empty where the record has none.

    ValueError where the record is too short for its header.
    """
    if len(record) < IMAGE.size:
        raise ValueError(f"{len(record)} bytes, too few for a header of {IMAGE.size}")
    flag, label, _, _ = IMAGE.unpack_from(record)
    end = IMAGE.size + 4 * flag
    if end > len(record):
        raise ValueError(f"{len(record)} bytes, too few for {flag} labels")
    if flag:
        [label] = struct.unpack_from("<f", record, IMAGE.size)
    return label, record[end:], flag > 0


def _record(path, file, size):
    parts, num_bytes, expected = [], 0, (WHOLE, FIRST)
    while True:
        start = file.tell()
        head = file.read(PART.size)
        magic, number = PART.unpack(head) if len(head) == PART.size else (None, 0)
        kind, length = number >> 29, number & (2**29 - 1)
        if magic is not None and (magic != MAGIC or kind not in expected):
            raise PackError(f"{path}: no record at byte {start}: damaged, or not RecordIO")
        end = start + PART.size + (length + 3) // 4 * 4
        if magic is None or end > size:
            raise PackError(f"{path}: ends inside the record at byte {start}: cut short")
        num_bytes += length + len(MAGIC)
        if num_bytes <= layout.MAX_RECORD_BYTES:
            parts.append(file.read(length))
        file.seek(end)
        if kind in (WHOLE, LAST):
            return MAGIC.join(parts) if num_bytes <= layout.MAX_RECORD_BYTES else None
        expected = (MIDDLE, LAST)


def _offsets(index):
    """Yields (number of the line, offset in it or None) of every line of an index that is not blank."""
    with open(index, "rb") as file:
        number = 0
        while line := file.readline(2**12):
            number += 1
            if not line.strip():
                continue
            cells = line.split(b"\t")
            yield number, int(cells[1]) if len(cells) == 2 and cells[1].strip().isdigit() else None


def _check_offset(index, path, line, start):
    """PackError unless the line (number, offset) of the index has this start; both are None after the last."""
    number, place = line or (None, None)
    if place != start or (line is None) != (start is None):
        says = f"line {number} is of {'no byte' if place is None else f'byte {place}'}" if line else "has no more lines"
        has = "has no more records" if start is None else f"has a record at byte {start}"
        raise PackError(f"{index}: {says}, but {path} {has}; give the right index, or move it away: it is not needed")


FORMAT = Format(records, ".rec", lambda path, head: head[:4] == MAGIC)
