"""safetensors files that are larger than memory, read and written in pieces.

The safetensors library needs the tensors in memory to write them, makes another copy, and gives no checksum. It reads
slices of a mapped file, whose pages count as memory of the process, or reads whole tensors. So here the library only
checks that the header of a file fits its size. The format: 8 bytes with the length of the header, the header in JSON,
the bytes of the tensors.
"""

import json
import math
import os
import zlib

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

PIECE = 2**20  # bytes in memory at a time: few enough to stay in a cache from the checksum to the writing
_MOST_HEADER = 2**24  # bytes; a tensor takes a hundred
_ITEM_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32", torch.int32: "I32", torch.float16: "F16",
           torch.bfloat16: "BF16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
_NUMPY = {"F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "u1"}  # of `array`


class TensorFile:
    """The tensors of a file by name: dtype (as in safetensors, "F32"), shape, bytes. ValueError where it is corrupt."""

    def __init__(self, path):
        self.path = path
        try:
            with open(path, "rb") as file:
                size = int.from_bytes(file.read(8), "little")
                if size > _MOST_HEADER:
                    raise ValueError(f"a header of {size} bytes")
                with safe_open(path, "np"):  # raises where the header does not fit the file
                    self._header = json.loads(file.read(size))
        except (OSError, ValueError, RecursionError, SafetensorError) as e:
            raise ValueError(f"checkpoint file {path} cannot be used ({' '.join(str(e).split())})") from e
        self._header.pop("__metadata__", None)
        self._begin = 8 + size
        for name, entry in self._header.items():
            if entry["dtype"] not in _ITEM_BYTES:
                raise ValueError(f"checkpoint file {path} cannot be used: {name[:80]!r} has dtype "
                                 f"{entry['dtype']}")

    def __contains__(self, name):
        return name in self._header

    def __iter__(self):
        return iter(self._header)

    def dtype(self, name):
        return self._entry(name)["dtype"]

    def shape(self, name):
        return tuple(self._entry(name)["shape"])

    def tensor(self, name):
        """(dtype, shape, pieces of bytes), as `write` takes it."""
        return self.dtype(name), self.shape(name), self.rows(name, 0, self.shape(name)[0] if self.shape(name) else 1)

    def rows(self, name, first, last):
        """Rows first … last - 1 along dimension 0, as pieces of bytes."""
        entry = self._entry(name)
        row_bytes = _ITEM_BYTES[entry["dtype"]] * math.prod(entry["shape"][1:])
        left = (last - first) * row_bytes
        try:
            with open(self.path, "rb") as file:
                file.seek(self._begin + entry["data_offsets"][0] + first * row_bytes)
                while left:
                    piece = file.read(min(left, PIECE))
                    if not piece:
                        raise OSError("it was cut while it was read")
                    left -= len(piece)
                    yield piece
        except OSError as e:
            raise ValueError(f"checkpoint file {self.path} cannot be read ({e})") from e

    def array(self, name, first, last):
        """Rows first … last - 1 of a table of numbers, as a numpy array."""
        if self.dtype(name) not in _NUMPY or not 0 <= first <= last <= (self.shape(name) or (0,))[0]:
            raise ValueError(f"checkpoint file {self.path} cannot be used: {name} {self.dtype(name)} "
                             f"{self.shape(name)} has no rows {first} to {last}")
        data = np.frombuffer(b"".join(self.rows(name, first, last)), _NUMPY[self.dtype(name)])
        return data.reshape(last - first, *self.shape(name)[1:])

    def mapped(self, name, first, last):
        """Rows first … last - 1 of a table as a tensor whose memory is the file: only pages that are touched are read.

        A map of all rows would count against the memory that a process may ask for, so callers map blocks.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        if not shape or not 0 <= first <= last <= shape[0]:
            raise ValueError(f"checkpoint file {self.path} cannot be used: {name} {shape} has no rows {first} to "
                             f"{last}")
        row_bytes = _ITEM_BYTES[dtype] * math.prod(shape[1:])
        begin = self._begin + self._entry(name)["data_offsets"][0] + first * row_bytes
        try:
            # Copy on write, since torch takes no memory that cannot be written; nothing is written.
            data = np.memmap(self.path, np.uint8, "c", begin, (last - first) * row_bytes)
        except OSError as e:
            raise ValueError(f"checkpoint file {self.path} cannot be read ({e})") from e
        kind = next(kind for kind, text in DTYPES.items() if text == dtype)
        return torch.from_numpy(data).view(kind).view(last - first, *shape[1:])

    def _entry(self, name):
        if name not in self._header:
            raise ValueError(f"checkpoint file {self.path} cannot be used: it holds no {name}")
        return self._header[name]


def pieces_of(tensor):
    """(dtype, shape, pieces) of a tensor on any device, as `write` takes it."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    pieces = (flat[i : i + PIECE].cpu().numpy() for i in range(0, len(flat), PIECE))
    return DTYPES[tensor.dtype], tuple(tensor.shape), pieces


def write(path, tensors, metadata=None, progress=None):
    """Write a file and wait until it is on the disk; returns {bytes, crc32} for meta.json.

    tensors   {name: (dtype, shape, iterable of pieces of bytes)}
    metadata  {str: str} for the header
    progress  called with every number of bytes written
    """
    header, end = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    names = sorted(tensors, key=lambda name: (-_ITEM_BYTES[tensors[name][0]], name))  # keeps all of them aligned
    for name in names:
        dtype, shape, _ = tensors[name]
        begin, end = end, end + _ITEM_BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    crc = zlib.crc32(head)
    with open(path, "wb") as file:
        file.write(head)
        for name in names:
            for piece in tensors[name][2]:
                crc = zlib.crc32(piece, crc)
                file.write(piece)
                if progress:
                    progress(len(piece))
            assert file.tell() == len(head) + header[name]["data_offsets"][1], name
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(head) + end, "crc32": crc}
