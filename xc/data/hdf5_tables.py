"""HDF5 files of flat tables from untrusted sources: checked when opened, read with pread."""

import os
import weakref

import h5py
import numpy as np

from xc.errors import one_line


class PackError(ValueError):
    """A pack is missing, damaged, hostile or of another version. The text is one line and names the file."""

    def __init__(self, text):
        super().__init__(one_line(text))


def _scalar(attributes, name):
    """The value of an attribute that is an integer or a text of fixed length; None for another one, which is not read.

    HDF5 can loop for ever on a damaged text of variable length.
    """
    attribute = attributes.get_id(name)
    return attributes[name] if attribute.shape == () and attribute.dtype.kind in "iuS" else None


class TableFile:
    """An HDF5 file of flat tables, open for reading; len(file[name]) is the length of a table.

    HDF5 tells where the tables lie in the file and pread reads them: threads may share a TableFile. PackError for
    anything wrong with the file.
    """

    def __init__(self, path, format, version, attributes, tables):
        """
        format, version  values that the attributes of these names must have
        attributes       names of the attributes to read
        tables           {name: dtype} of the datasets that the file must have
        """
        self.path = path
        if not os.path.isfile(path):  # opening a named pipe would block
            raise PackError(f"{path}: no such file; not a pack, or its packing did not end")
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        try:
            with h5py.File(path, "r", locking=False) as file:
                self._attributes = {name: _scalar(file.attrs, name) for name in attributes if name in file.attrs}
                if not {"format", "version"} <= self._attributes.keys():
                    raise self.error("not a pack: no attributes format and version")
                if self.integer("version") != version:
                    raise self.error(f"layout version {self.integer('version')}, known is {version}; pack again")
                if self.text("format") != format:
                    raise self.error(f'not a pack: no attribute format = "{format}"')
                self._tables = {name: self._find(file, name, np.dtype(dtype)) for name, dtype in tables.items()}
        except PackError:
            raise
        except Exception as error:  # h5py raises many kinds for a damaged file
            raise self.error(f"not readable as HDF5: {error}") from error

    def error(self, what):
        """A PackError that names this file."""
        return PackError(f"{self.path}: {what}")

    def has(self, name):
        """Whether there is an attribute of that name."""
        return name in self._attributes

    def integer(self, name):
        """An attribute as an int from 0 up."""
        value = self._attributes.get(name)
        if not isinstance(value, np.integer) or value < 0:
            raise self.error(f"attribute {name} must be an integer from 0 up, not {value!r}")
        return int(value)

    def text(self, name):
        """An attribute as a str."""
        value = self._attributes.get(name)
        if not isinstance(value, bytes):
            raise self.error(f"attribute {name} must be a text of fixed length, not {value!r}")
        return value.decode(errors="surrogateescape")

    def __getitem__(self, name):
        """range(length) of a table."""
        return self._tables[name][1]

    def read(self, name, start, stop):
        """Elements start … stop − 1 of a table, as an array."""
        return np.frombuffer(self.read_bytes(name, start, stop), self._tables[name][2])

    def read_bytes(self, name, start, stop):
        """Elements start … stop − 1 of a table, as bytes."""
        position, elements, dtype = self._tables[name]
        assert 0 <= start <= stop <= len(elements), (name, start, stop)
        position, left, parts = position + int(start) * dtype.itemsize, int(stop - start) * dtype.itemsize, []
        while left:  # one read returns at most 2 GB
            parts.append(os.pread(self._fd, left, position))
            if not parts[-1]:
                raise self.error(f"ends at byte {position}, inside of {name}: it was cut while open")
            left, position = left - len(parts[-1]), position + len(parts[-1])
        return b"".join(parts)

    def blocks(self, name):
        """Yields arrays of a whole table, 2**20 elements at a time."""
        for start in range(0, len(self[name]), 2**20):
            yield self.read(name, start, min(start + 2**20, len(self[name])))

    def offsets(self, name, target, start, stop):
        """(stop − start + 1,) int64, checked: where items start … stop − 1 start and end in the table `target`."""
        offsets, end = self.read(name, start, stop + 1), len(self[target])
        ordered = offsets[0] >= 0 and offsets[-1] <= end and (offsets[1:] >= offsets[:-1]).all()
        # The first and last item must reach the ends, or part of the target would belong to no item.
        if not ordered or (start == 0 and offsets[0] != 0) or (stop == len(self[name]) - 1 and offsets[-1] != end):
            raise self.error(f"{name}[{start}:{stop + 1}] do not rise from 0 to {end}, the length of {target}")
        return offsets

    def _find(self, file, name, dtype):
        """(position in the file, range(length), dtype) of a plain dataset that lies in this file alone."""
        links = file.id.links  # file[name] would follow the link
        if not links.exists(name.encode()) or links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise self.error(f"{name} is missing or a link to elsewhere")
        data = file[name]
        if not isinstance(data, h5py.Dataset) or data.ndim != 1 or data.dtype != dtype:
            raise self.error(f"{name} is not a flat dataset of {dtype}")
        properties = data.id.get_create_plist()
        if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count():
            raise self.error(f"{name} is not stored in one piece in this file (chunked, virtual or external)")
        position, num_bytes = data.id.get_offset(), data.shape[0] * dtype.itemsize
        if num_bytes and (position is None or position + num_bytes > os.path.getsize(self.path)):
            raise self.error(f"{name} claims {num_bytes} bytes that the file does not have")
        return position or 0, range(data.shape[0]), dtype
