"""Packs: data sets of encoded images in a few large HDF5 files. This page is the layout; here is the reader.

    OUT/index.h5                     written last: a folder without it is not a pack
    OUT/shard-00000.h5 …             the records, in one global order that was shuffled when they were packed
    OUT/skipped.tsv                  path and reason of every image that was left out (no reader needs it)

    shard    bytes               uint8   (sum of sizes,)  the image files as they were, one behind the other
             offsets             int64   (n + 1,)  record i is bytes[offsets[i]:offsets[i + 1]]; offsets[0] = 0
             labels              int64   (n,)      0 … num_classes − 1
             crc32               uint32  (n,)      zlib.crc32 of each record
             weights             float32 (n,)      optional: how often to draw each record, in proportion; from 0 up
             attributes          format = "xc-pack", version = 2, num_records, shard (its own number)
    index    shard_records       int64   (shards,) records of each shard; a record's number counts through all shards
             shard_file_bytes    int64   (shards,) size of each shard file: a cut file is seen without reading it
             class_names         uint8   (sum of lengths,)  UTF-8, in the order of the labels
             class_name_offsets  int64   (C + 1,)
             class_counts        int64   (C,)      records of each class; 0 is possible
             attributes          format, version, num_records, num_classes, num_bytes (sum of image sizes), source
                                 (name of what was packed), seed (of the shuffle), skipped (images left out),
                                 classes_digest (SHA-256, hex, of class_name_offsets then class_names), and
                                 has_weights = 1 where every shard has weights, which is left out where none has

A data set with splits is a folder of packs, OUT/train and also OUT/val, OUT/test, with one class table between them.

Every dataset is one-dimensional, little-endian, contiguous and uncompressed: images are compressed already, and a
record is then one stretch of the file. HDF5 says where the stretches lie; they are read with pread, which has no
file position, so threads share a handle without a lock and a fork does no harm. Attributes are integers and texts of
fixed length in UTF-8: HDF5 keeps texts of variable length in a heap, and can loop for ever on a damaged one. The same
source, seed, --shard-mb and number of parts give the same bytes, so no file holds a time. All numbers have 64 bits, and
opening a pack or reading a record costs nothing that grows with the number of classes.

Packs may come from strangers: links to other files, virtual, external, chunked and oddly typed datasets are refused,
every offset, label and checksum is checked before use, and no buffer is larger than the file that fills it.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import threading
import weakref
import zlib

import h5py
import numpy as np
from PIL import Image

from xc.errors import one_line

FORMAT, VERSION = "xc-pack", 2
INDEX_FILE, SHARD_FILE = "index.h5", "shard-{:05d}.h5"
PARTIAL = ".partial-"  # part of the name of a folder that is still being written
SPLITS = ("train", "val", "test")
SHARD_TABLES = {"bytes": "|u1", "offsets": "<i8", "labels": "<i8", "crc32": "<u4"}
WEIGHT_TABLES = {"weights": "<f4"}  # of the shards of a pack with weights, also
INDEX_TABLES = {"shard_records": "<i8", "shard_file_bytes": "<i8", "class_names": "|u1",
                "class_name_offsets": "<i8", "class_counts": "<i8"}
RECORD_TABLE_BYTES = 8 + 8 + 4  # of a shard's file that a record takes beside its image
ATTRIBUTES = ("format", "version", "num_records", "shard", "num_classes", "num_bytes", "source", "seed", "skipped",
              "classes_digest", "has_weights")
MAX_RECORD_BYTES = 2**28
MAX_OPEN_SHARDS = 256  # per Pack; a process may often have 1024 files open
NAMES = 2**12  # that are read at once: a name can have some kilobytes
RUN_RECORDS = 256  # neighbours in one read, at most; bounds what is copied
RANGE_BYTES = 2**23  # of the images in one of `ranges`, at most, but for one image that is larger
MAX_KEPT_RUNS = 768  # runs of neighbours whose tables a Pack keeps: 4 MB

# Pillow warns above a number of pixels of its own; open_image has a limit that is stricter and an error.
Image.MAX_IMAGE_PIXELS = None


class PackError(ValueError):
    """A pack that is missing, damaged, hostile or of another version. The text is one line and names the file."""

    def __init__(self, text):
        super().__init__(one_line(text))


class Pack:
    """One pack, open for reading; threads may share it. The constructor reads the index only.

    num_records, num_classes, num_bytes, num_shards, seed, skipped: int; source, classes_digest: str; has_weights: bool
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        if not os.path.isdir(self.path):
            raise PackError(f"{self.path}: no such folder; a pack is a folder written by data_tools.pack")
        if any(part.startswith(".") and PARTIAL in part for part in os.path.abspath(self.path).split(os.sep)[-3:]):
            raise PackError(f"{self.path}: left by a packing that did not end; give its command again, or delete it")
        self._index = index = _File(os.path.join(self.path, INDEX_FILE), INDEX_TABLES)
        self.num_records, self.num_classes = index.integer("num_records"), index.integer("num_classes")
        self.num_bytes, self.skipped = index.integer("num_bytes"), index.integer("skipped")
        self.seed, self.source = index.integer("seed"), index.text("source")
        self.classes_digest = index.text("classes_digest")
        self.has_weights = index.has("has_weights") and index.integer("has_weights") > 0
        self.num_shards = len(index["shard_records"])
        lengths = {name: len(index[name]) for name in ("shard_file_bytes", "class_name_offsets", "class_counts")}
        if list(lengths.values()) != [self.num_shards, self.num_classes + 1, self.num_classes]:
            raise index.error(f"{lengths} do not fit {self.num_shards} shards and {self.num_classes} classes")
        if not (self.num_records and self.num_classes):
            raise index.error("holds no records")
        self._check_shard_files(index.read("shard_file_bytes", 0, self.num_shards))
        records = index.read("shard_records", 0, self.num_shards)
        self._starts = np.concatenate([[0], np.cumsum(records)])  # (shards + 1,) first record of each shard
        most = index.read("shard_file_bytes", 0, self.num_shards) // RECORD_TABLE_BYTES
        if (records < 0).any() or (records > most).any() or self._starts[-1] != self.num_records:
            raise index.error(f"shard_records do not add up to num_records {self.num_records}")
        self._shard_tables = SHARD_TABLES | (WEIGHT_TABLES if self.has_weights else {})
        self._shards, self._kept_runs, self._lock = {}, {}, threading.Lock()

    def __len__(self):
        return self.num_records

    def class_name(self, label):
        return self.class_names(label, label + 1)[0]

    def class_names(self, start, stop):
        """Names of the labels start … stop − 1, as a list of str."""
        if not 0 <= start <= stop <= self.num_classes:
            raise IndexError(f"labels {start}:{stop} are outside 0:{self.num_classes}")
        offsets = self._index.offsets("class_name_offsets", "class_names", start, stop)
        names, ends = self._index.read_bytes("class_names", offsets[0], offsets[-1]), (offsets - offsets[0]).tolist()
        try:
            return [names[a:b].decode() for a, b in itertools.pairwise(ends)]
        except UnicodeDecodeError as error:
            raise self._index.error(f"a name of classes {start}:{stop} is not UTF-8") from error

    @functools.cached_property
    def class_counts(self):
        """(C,) int64: records of each class. Read at the first use; the only thing here that grows with C."""
        counts = self._index.read("class_counts", 0, self.num_classes)
        if (counts < 0).any() or (counts > self.num_records).any() or counts.sum() != self.num_records:
            raise self._index.error(f"class_counts do not add up to num_records {self.num_records}")
        return counts

    def read(self, records):
        """Encoded images and labels of the given records.

        records  (n,)  int, record numbers in any order, also more than once
        returns  list of n bytes; (n,) int64 labels

        Neighbours are fetched together. IndexError for a number outside the pack, PackError for a damaged record.
        """
        records = np.asarray(records)
        if records.ndim != 1 or (len(records) and records.dtype.kind not in "iu"):
            raise TypeError(f"records must be a flat array of integers, not {records.dtype} {records.shape}")
        if len(records) and not (0 <= records.min() and records.max() < self.num_records):
            raise IndexError(f"records {records.min()} … {records.max()} are outside 0 … {self.num_records - 1}")
        numbers, places = np.unique(records.astype(np.int64), return_inverse=True)
        images, labels = [], []
        for some_images, some_labels in self._runs(numbers):
            images += some_images
            labels += some_labels
        return [images[place] for place in places], np.array(labels, np.int64)[places]

    def ranges(self):
        """Yields (start, stop) over all records in their order, so few at a time that memory holds their images, of
        whatever size: up to RUN_RECORDS of one shard, and RANGE_BYTES or one image."""
        for number, _, num_records in self._stretches(0, self.num_records):
            for first in range(0, num_records, RUN_RECORDS):
                last = min(first + RUN_RECORDS, num_records)
                offsets = self._shard(number).offsets("offsets", "bytes", first, last)
                shift, start = int(self._starts[number]) + first, 0
                while start < last - first:
                    fitting = int(np.searchsorted(offsets, offsets[start] + RANGE_BYTES, side="right")) - 1
                    stop = min(max(fitting, start + 1), last - first)
                    yield shift + start, shift + stop
                    start = stop

    def labels(self, start, stop):
        """(stop − start,) int64: labels of the records start … stop − 1."""
        if not 0 <= start <= stop <= self.num_records:
            raise IndexError(f"records {start}:{stop} are outside 0:{self.num_records}")
        parts = [self._labels(*stretch) for stretch in self._stretches(start, stop)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def weights(self, start, stop):
        """(stop − start,) float32: weights of the records start … stop − 1, finite and from 0 up.

        PackError where the pack has none, or a weight is another.
        """
        if not self.has_weights:
            raise PackError(f"{self.path}: has no weights; pack a manifest with a column weight")
        if not 0 <= start <= stop <= self.num_records:
            raise IndexError(f"records {start}:{stop} are outside 0:{self.num_records}")
        parts = [self._weights(*stretch) for stretch in self._stretches(start, stop)]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def verify(self, progress=lambda num_records: None):
        """Reads and checks everything: checksums, offsets, labels, weights, counts, sums, class names.

        progress  called with the number of records done since the last call
        returns   the number of records; PackError names the first bad one
        """
        num_bytes, counts = 0, np.zeros(self.num_classes, np.int64)
        for start, stop in self.ranges():
            images, labels = self.read(np.arange(start, stop))
            num_bytes += sum(map(len, images))
            np.add.at(counts, labels, 1)
            progress(len(images))
        if num_bytes != self.num_bytes:
            raise self._index.error(f"num_bytes is {self.num_bytes}, the records have {num_bytes}")
        wrong = np.flatnonzero(counts != self.class_counts)
        if len(wrong):
            raise self._index.error(f"class_counts[{wrong[0]}] is {self.class_counts[wrong[0]]}, "
                                    f"the records have {counts[wrong[0]]}")
        if self.has_weights:
            for start in range(0, self.num_records, 2**20):
                self.weights(start, min(start + 2**20, self.num_records))
        for start in range(0, self.num_classes, NAMES):
            self.class_names(start, min(start + NAMES, self.num_classes))
        index = self._index
        if classes_digest(index.blocks("class_name_offsets"), index.blocks("class_names")) != self.classes_digest:
            raise index.error("classes_digest does not match the class names")
        return self.num_records

    def close(self):
        """Closes the shards; a later read opens them again."""
        with self._lock:
            self._shards.clear()
            self._kept_runs.clear()

    def _check_shard_files(self, sizes):
        for number, size in enumerate(sizes):
            path = os.path.join(self.path, SHARD_FILE.format(number))
            if not os.path.isfile(path):
                raise PackError(f"{path}: no such file, but {INDEX_FILE} lists {self.num_shards} shards")
            found = os.path.getsize(path)
            if found != size:
                raise PackError(f"{path}: {found} bytes, not {size}: cut short or not of this pack")

    def _shard(self, number):
        with self._lock:
            shard = self._shards.pop(number, None)
            if shard is None:
                shard = _File(os.path.join(self.path, SHARD_FILE.format(number)), self._shard_tables)
                num_records = int(self._starts[number + 1] - self._starts[number])
                lengths = {len(shard[name]) - (name == "offsets") for name in self._shard_tables if name != "bytes"}
                found = shard.integer("shard"), shard.integer("num_records"), lengths
                if found != (number, num_records, {num_records}):
                    raise shard.error(f"not the shard {number} of {num_records} records that {INDEX_FILE} lists")
            self._shards[number] = shard  # the most recently used is last
            if len(self._shards) > MAX_OPEN_SHARDS:
                del self._shards[next(iter(self._shards))]  # closes when its last reader is done
            return shard

    def _stretches(self, start, stop):
        """Cuts the records start … stop − 1 by shards: yields (shard, first, end), counted inside that shard."""
        while start < stop:
            number = int(np.searchsorted(self._starts, start, side="right")) - 1
            first, end = self._starts[number], min(stop, self._starts[number + 1])
            yield number, int(start - first), int(end - first)
            start = end

    def _labels(self, number, start, stop):
        labels = self._shard(number).read("labels", start, stop)
        bad = np.flatnonzero((labels < 0) | (labels >= self.num_classes))
        if len(bad):
            what = f"label {labels[bad[0]]} is outside 0 … {self.num_classes - 1}"
            raise self._bad_record(number, start + bad[0], what)
        return labels

    def _weights(self, number, start, stop):
        weights = self._shard(number).read("weights", start, stop)
        bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
        if len(bad):
            raise self._bad_record(number, start + bad[0], f"weight {weights[bad[0]]} is not a number from 0 up")
        return weights

    def _runs(self, numbers):
        """Yields lists (bytes, labels) of records, (n,) rising: those of a bounded number of neighbours at a time."""
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        places = numbers - self._starts[shards]
        first = (np.diff(numbers, prepend=-2) > 1) | (places % RUN_RECORDS == 0)  # of a run
        begins = np.flatnonzero(first)
        counts = np.diff(begins, append=len(numbers))
        scattered = 2 * len(begins) > len(numbers)
        for number, start, count in zip(shards[begins].tolist(), places[begins].tolist(), counts.tolist(), strict=True):
            yield self._run(number, start, start + count, scattered)

    def _run(self, number, start, stop, scattered):
        tables, first = None, start % RUN_RECORDS
        if scattered:  # others of its neighbours may be asked for soon
            with contextlib.suppress(PackError):  # of a neighbour, perhaps
                tables = self._kept_tables(number, start // RUN_RECORDS)
        if tables is None:
            tables, first = self._tables(number, start, stop), 0
        last = first + stop - start
        offsets = tables[0][first : last + 1].tolist()
        labels, crcs = (table[first:last].tolist() for table in tables[1:])
        block = self._shard(number).read_bytes("bytes", offsets[0], offsets[-1])
        images = [block[a - offsets[0] : b - offsets[0]] for a, b in itertools.pairwise(offsets)]
        for i, (image, crc) in enumerate(zip(images, crcs, strict=True)):
            if zlib.crc32(image) != crc:
                raise self._bad_record(number, start + i, "wrong checksum: the file was changed or damaged")
        return images, labels

    def _kept_tables(self, number, run):
        """`_tables` of RUN_RECORDS neighbours, kept."""
        tables = self._kept_runs.get((number, run))
        if tables is None:
            num_records = int(self._starts[number + 1] - self._starts[number])
            tables = self._tables(number, run * RUN_RECORDS, min((run + 1) * RUN_RECORDS, num_records))
            with self._lock:
                self._kept_runs[number, run] = tables
                if len(self._kept_runs) > MAX_KEPT_RUNS:
                    del self._kept_runs[next(iter(self._kept_runs))]
        return tables

    def _tables(self, number, start, stop):
        """(offsets, labels, checksums) of the records start … stop − 1 of a shard."""
        shard = self._shard(number)
        labels = self._labels(number, start, stop)
        offsets = shard.offsets("offsets", "bytes", start, stop)
        large = np.flatnonzero(np.diff(offsets) > MAX_RECORD_BYTES)
        if len(large):
            raise self._bad_record(number, start + large[0], f"more than {MAX_RECORD_BYTES} bytes")
        return offsets, labels, shard.read("crc32", start, stop)

    def _bad_record(self, number, place, what):
        return self._shard(number).error(f"record {self._starts[number] + place}: {what}")


def open_splits(path):
    """{"train": Pack, …} of a folder of packs, or {"train": Pack} where path is one pack itself.

    PackError where there is no pack, or the packs do not have one class table.
    """
    path = os.fspath(path)
    if os.path.exists(os.path.join(path, INDEX_FILE)):
        return {"train": Pack(path)}
    names = [name for name in SPLITS if os.path.isdir(os.path.join(path, name))]
    if "train" not in names:
        raise PackError(f"{path}: not a pack: it holds neither {INDEX_FILE} nor a folder train with one")
    packs = {name: Pack(os.path.join(path, name)) for name in names}
    for pack in packs.values():
        if (pack.num_classes, pack.classes_digest) != (packs["train"].num_classes, packs["train"].classes_digest):
            raise PackError(f"{pack.path}: its classes are not those of train; pack it with --classes {path}")
    return packs


def classes_digest(*parts):
    """Hex SHA-256 of iterables of arrays, one after the other: the identity of a class table."""
    digest = hashlib.sha256()
    for part in parts:
        for block in part:
            digest.update(block)
    return digest.hexdigest()


def _scalar(attributes, name):
    """An attribute's value, None where it is not one integer or text of fixed length (see above), which HDF5 must then
    not be asked for."""
    kept = attributes.get_id(name)
    return attributes[name] if kept.shape == () and kept.dtype.kind in "iuS" else None


class _File:
    """An HDF5 file of flat tables. HDF5 says where they lie, pread fetches them; len(file[name]) is a table's length.

    path    a file with format and version as above
    tables  {name: dtype} of the datasets it must have
    """

    def __init__(self, path, tables):
        self.path = path
        if not os.path.isfile(path):  # also keeps a named pipe from blocking
            raise PackError(f"{path}: no such file; not a pack, or its packing did not end")
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        try:
            with h5py.File(path, "r", locking=False) as file:
                self._attributes = {name: _scalar(file.attrs, name) for name in ATTRIBUTES if name in file.attrs}
                if not {"format", "version"} <= self._attributes.keys():
                    raise self.error("not a pack: no attributes format and version")
                if self.integer("version") != VERSION:
                    raise self.error(f"layout version {self.integer('version')}, known is {VERSION}; pack again")
                if self.text("format") != FORMAT:
                    raise self.error(f'not a pack: no attribute format = "{FORMAT}"')
                self._tables = {name: self._find(file, name, np.dtype(dtype)) for name, dtype in tables.items()}
        except PackError:
            raise
        except Exception as error:  # h5py has many kinds for a damaged file
            raise self.error(f"not readable as HDF5: {error}") from error

    def error(self, what):
        return PackError(f"{self.path}: {what}")

    def has(self, name):
        return name in self._attributes

    def integer(self, name):
        value = self._attributes.get(name)
        if not isinstance(value, np.integer) or value < 0:
            raise self.error(f"attribute {name} must be an integer from 0 up, not {value!r}")
        return int(value)

    def text(self, name):
        value = self._attributes.get(name)
        if not isinstance(value, bytes):
            raise self.error(f"attribute {name} must be a text of fixed length, not {value!r}")
        return value.decode(errors="surrogateescape")

    def __getitem__(self, name):
        return self._tables[name][1]

    def read(self, name, start, stop):
        """Elements start … stop − 1 of a table, as an array."""
        return np.frombuffer(self.read_bytes(name, start, stop), self._tables[name][2])

    def read_bytes(self, name, start, stop):
        """The same as bytes."""
        place, elements, dtype = self._tables[name]
        assert 0 <= start <= stop <= len(elements), (name, start, stop)
        place, left, parts = place + int(start) * dtype.itemsize, int(stop - start) * dtype.itemsize, []
        while left:  # a read gives 2 GB at most
            parts.append(os.pread(self._fd, left, place))
            if not parts[-1]:
                raise self.error(f"ends at byte {place}, inside of {name}: it was cut while open")
            left, place = left - len(parts[-1]), place + len(parts[-1])
        return b"".join(parts)

    def blocks(self, name):
        """A whole table, 2**20 elements at a time."""
        for start in range(0, len(self[name]), 2**20):
            yield self.read(name, start, min(start + 2**20, len(self[name])))

    def offsets(self, name, target, start, stop):
        """(stop − start + 1,) int64, checked: where the items start … stop − 1 begin and end in the table target."""
        offsets, end = self.read(name, start, stop + 1), len(self[target])
        ordered = offsets[0] >= 0 and offsets[-1] <= end and (offsets[1:] >= offsets[:-1]).all()
        # The first and the last item must touch the ends, or part of the target would belong to nobody.
        if not ordered or (start == 0 and offsets[0] != 0) or (stop == len(self[name]) - 1 and offsets[-1] != end):
            raise self.error(f"{name}[{start}:{stop + 1}] do not rise from 0 to {end}, the length of {target}")
        return offsets

    def _find(self, file, name, dtype):
        """(place in the file, range(length), dtype) of a dataset that is plain and lies in this file alone."""
        links = file.id.links  # asking through file[name] would follow the link
        if not links.exists(name.encode()) or links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
            raise self.error(f"{name} is missing or a link to elsewhere")
        data = file[name]
        if not isinstance(data, h5py.Dataset) or data.ndim != 1 or data.dtype != dtype:
            raise self.error(f"{name} is not a flat dataset of {dtype}")
        properties = data.id.get_create_plist()
        if properties.get_layout() != h5py.h5d.CONTIGUOUS or properties.get_external_count():
            raise self.error(f"{name} is not stored in one piece in this file (chunked, virtual or external)")
        place, num_bytes = data.id.get_offset(), data.shape[0] * dtype.itemsize
        if num_bytes and (place is None or place + num_bytes > os.path.getsize(self.path)):
            raise self.error(f"{name} claims {num_bytes} bytes that the file does not have")
        return place or 0, range(data.shape[0]), dtype
