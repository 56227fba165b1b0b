"""A file of the images that came as bytes: written in the order of the sources, read in the order of their keys.

Keys are random and uniform, so the file needs no sorting. It consists of extents. All images of an extent have keys
with the same first bits; whoever reads in the order of the keys stays within 1/2**BITS of the file at a time, and finds
it in the page cache.
"""

import os

from xc.data.pack import PackError

BITS = 7
FIRST_EXTENT, MOST_EXTENT = 2**12, 2**20  # bytes; every extent of the same bits is twice as large as the last


class ImageFileWriter:
    """Takes images and tells where they are; its buffers take memory_bytes, but 4 KiB for each of 2**BITS extents."""

    def __init__(self, path, memory_bytes):
        self._file = open(path, "wb", buffering=0)  # noqa: SIM115
        self._most = max(FIRST_EXTENT, min(2**16, memory_bytes >> BITS))
        self._end = 0  # of the file
        self._buffers = [bytearray() for _ in range(2**BITS)]  # not written yet
        self._places = [0] * 2**BITS  # in the file, of the buffers
        self._room = [0] * 2**BITS  # in the extents, after the buffers
        self._extents = [FIRST_EXTENT // 2] * 2**BITS  # bytes of the last extent

    def add(self, key, data):
        """The offset of an image with a key of 64 bits."""
        group = key >> 64 - BITS
        if len(data) > self._room[group]:
            if len(data) > MOST_EXTENT // 2:
                self._write(self._end, data)  # an extent of its own
                self._end += len(data)
                return self._end - len(data)
            self._flush(group)
            self._extents[group] = max(min(2 * self._extents[group], MOST_EXTENT), len(data))
            self._places[group], self._room[group] = self._end, self._extents[group]
            self._end += self._extents[group]
        buffer = self._buffers[group]
        offset = self._places[group] + len(buffer)
        buffer += data
        self._room[group] -= len(data)
        if len(buffer) >= self._most:
            self._flush(group)
        return offset

    def close(self):
        for group in range(2**BITS):
            self._flush(group)
        self._file.close()

    def _flush(self, group):
        buffer = self._buffers[group]
        if buffer:
            self._write(self._places[group], buffer)
            self._places[group] += len(buffer)
            self._buffers[group] = bytearray()

    def _write(self, place, data):
        with memoryview(data) as left:
            done = 0
            while done < len(left):
                done += os.pwrite(self._file.fileno(), left[done:], place + done)


def read_image(file, offset, num_bytes):
    """Bytes of an open file; PackError where it does not have all of them."""
    data = os.pread(file.fileno(), num_bytes, offset)
    if len(data) != num_bytes:
        raise PackError(f"{file.name}: ends at byte {offset + len(data)}, inside an image; begin anew with --restart")
    return data
