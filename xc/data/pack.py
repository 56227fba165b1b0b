"""Packs: data sets of encoded images in a few large HDF5 files: the layout on disk, and the reader.

    OUT/index.h5                     written last: a folder without it is not a pack
    OUT/shard-00000.h5 …             the records, in one global order that was shuffled when they were packed
    OUT/skipped.tsv                  path and reason of every image that was left out (no reader needs it)

    shard    bytes               uint8   (sum of sizes,)  the image files, one after the other
             offsets             int64   (n + 1,)  record i is bytes[offsets[i]:offsets[i + 1]]; offsets[0] = 0
             labels              int64   (n,)      0 … num_classes − 1
             crc32               uint32  (n,)      zlib.crc32 of each record
             weights             float32 (n,)      optional: relative frequency of each record in training, from 0 up
             attributes          format = "xc-pack", version = 2, num_records, shard (number of this shard)
    index    shard_records       int64   (shards,) records of each shard; record numbers count through all shards
             shard_file_bytes    int64   (shards,) size of each shard file: reveals a truncated file
             class_names         uint8   (sum of lengths,)  UTF-8, in the order of the labels
             class_name_offsets  int64   (C + 1,)
             class_counts        int64   (C,)      records of each class; 0 is possible
             attributes          format, version, num_records, num_classes, num_bytes (sum of image sizes), source
                                 (name of what was packed), seed (of the shuffle), skipped (images left out),
                                 classes_digest (SHA-256, hex, of class_name_offsets then class_names), and
                                 has_weights = 1 if every shard has weights; missing if none has

A data set with splits is a folder of packs, OUT/train and perhaps OUT/val, OUT/test, which share one class table.

Every dataset is one-dimensional, little-endian, contiguous and uncompressed: images are compressed already, and a
record is then one range of bytes. HDF5 tells where the datasets lie; they are read with pread, which has no file
progress, so threads share a handle without a lock and a fork does no harm. Attributes are integers, or UTF-8 texts of
fixed length: HDF5 keeps texts of variable length in a heap, and can loop for ever on a damaged one. The same source,
seed, --shard-mb and number of parts give the same bytes, so no file holds a time. All numbers have 64 bits. The cost of
opening a pack and of reading a record does not grow with the number of classes.

Packs are untrusted: links to other files and virtual, external, chunked or oddly typed datasets are refused; offsets,
labels and checksums are checked before use; no buffer is larger than the file that fills it.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import threading
import zlib

import numpy as np
from PIL import Image

from xc.data.class_names import ATTRIBUTES, FORMAT, INDEX_TABLES, NAMES, VERSION, ClassNames
from xc.data.hdf5_tables import PackError, TableFile

INDEX_FILE, SHARD_FILE = "index.h5", "shard-{:05d}.h5"
PARTIAL = ".partial-"  # in the name of a folder that is still being written
SPLITS = ("train", "val", "test")
SHARD_TABLES = {"bytes": "|u1", "offsets": "<i8", "labels": "<i8", "crc32": "<u4"}
WEIGHT_TABLES = {"weights": "<f4"}  # also of the shards of a pack with weights
RECORD_TABLE_BYTES = 8 + 8 + 4  # that a record takes in a shard beside its image
MAX_RECORD_BYTES = 2**28
MAX_OPEN_SHARDS = 256  # per Pack; the usual limit of a process is 1024 files
RUN_RECORDS = 256  # most neighbours in one read
RANGE_BYTES = 2**23  # most bytes of images in one of `ranges`, unless a single image is larger
MAX_KEPT_RUNS = 768  # runs of RUN_RECORDS neighbours whose tables a Pack keeps: 4 MB

# Pillow only warns of images with too many pixels; open_image raises an error, with a stricter limit.
Image.MAX_IMAGE_PIXELS = None


class Pack:
    """One pack, open for reading; threads may share it. The constructor reads only the index. PackError.

    num_records, num_classes, num_bytes, num_shards, seed, skipped: int; source, classes_digest: str; has_weights: bool;
    names: ClassNames
    """

    def __init__(self, path):
        self.path = os.fspath(path)
        if not os.path.isdir(self.path):
            raise PackError(f"{self.path}: no such folder; a pack is a folder written by data_tools.pack")
        if any(part.startswith(".") and PARTIAL in part for part in os.path.abspath(self.path).split(os.sep)[-3:]):
            raise PackError(f"{self.path}: left by a packing that did not end; give its command again, or delete it")
        self.index_path = os.path.join(self.path, INDEX_FILE)
        self._index = index = _open(self.index_path, INDEX_TABLES)
        self.names = ClassNames(index)
        self.num_records, self.num_classes = index.integer("num_records"), self.names.num_classes
        self.num_bytes, self.skipped = index.integer("num_bytes"), index.integer("skipped")
        self.seed, self.source = index.integer("seed"), index.text("source")
        self.classes_digest = self.names.classes_digest
        self.has_weights = index.has("has_weights") and index.integer("has_weights") > 0
        self.num_shards = len(index["shard_records"])
        lengths = {name: len(index[name]) for name in ("shard_file_bytes", "class_counts")}
        if list(lengths.values()) != [self.num_shards, self.num_classes]:
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
        """Name of a label, as str."""
        return self.names.class_name(label)

    def class_names(self, start, stop):
        """Names of the labels start … stop − 1, as a list of str."""
        return self.names.class_names(start, stop)

    @functools.cached_property
    def class_counts(self):
        """(C,) int64: records of each class. Read at its first use; only this costs memory that grows with C."""
        return self.counts(0, self.num_classes)

    def counts(self, start, stop):
        """(stop − start,) int64: records of the classes start … stop − 1."""
        counts, all_of_them = self._index.read("class_counts", start, stop), stop - start == self.num_classes
        if (counts < 0).any() or (counts > self.num_records).any() or all_of_them and counts.sum() != self.num_records:
            raise self._index.error(f"class_counts do not add up to num_records {self.num_records}")
        return counts

    def read(self, records):
        """Encoded images and labels of the given records.

        records  (n,)  int, record numbers in any order, also more than once
        returns  list of n bytes; (n,) int64 labels

        Neighbours are read together. IndexError for a number outside the pack, PackError for a damaged record.
        """
        records = np.asarray(records)
        if records.ndim != 1 or (len(records) and records.dtype.kind not in "iu"):
            raise TypeError(f"records must be a flat array of integers, not {records.dtype} {records.shape}")
        if len(records) and not (0 <= records.min() and records.max() < self.num_records):
            raise IndexError(f"records {records.min()} … {records.max()} are outside 0 … {self.num_records - 1}")
        numbers, indices = np.unique(records.astype(np.int64), return_inverse=True)
        images, labels = [], []
        for some_images, some_labels in self._runs(numbers):
            images += some_images
            labels += some_labels
        return [images[index] for index in indices], np.array(labels, np.int64)[indices]

    def ranges(self):
        """Yields (start, stop) of ranges that cover all records in order and whose images fit in memory, of any size.

        A range lies in one shard and has up to RUN_RECORDS records, with RANGE_BYTES bytes or one image.
        """
        for number, _, num_records in self._by_shard(0, self.num_records):
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
        parts = [self._labels(*part) for part in self._by_shard(start, stop)]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def weights(self, start, stop):
        """(stop − start,) float32: weights of the records start … stop − 1, finite and from 0 up.

        PackError where the pack has no weights, or one is negative or not finite.
        """
        if not self.has_weights:
            raise PackError(f"{self.path}: has no weights; pack a manifest with a column weight")
        if not 0 <= start <= stop <= self.num_records:
            raise IndexError(f"records {start}:{stop} are outside 0:{self.num_records}")
        parts = [self._weights(*part) for part in self._by_shard(start, stop)]
        return np.concatenate([np.empty(0, np.float32), *parts])

    def verify(self, progress=lambda num_records: None):
        """Read and check everything: checksums, offsets, labels, weights, counts, sums, class names.

        progress  called with the number of records done since the last call
        returns   the number of records; PackError names the first bad one
        """
        index, num_bytes, counts = self._index, 0, np.zeros(self.num_classes, np.int64)
        for start, stop in self.ranges():
            images, labels = self.read(np.arange(start, stop))
            num_bytes += sum(map(len, images))
            np.add.at(counts, labels, 1)
            progress(len(images))
        if num_bytes != self.num_bytes:
            raise index.error(f"num_bytes is {self.num_bytes}, the records have {num_bytes}")
        wrong = np.flatnonzero(counts != self.class_counts)
        if len(wrong):
            raise index.error(f"class_counts[{wrong[0]}] is {self.class_counts[wrong[0]]}, the records have "
                              f"{counts[wrong[0]]}")
        for start in range(0, self.num_records if self.has_weights else 0, 2**20):
            self.weights(start, min(start + 2**20, self.num_records))
        for start in range(0, self.num_classes, NAMES):
            self.class_names(start, min(start + NAMES, self.num_classes))
        if classes_digest(index.blocks("class_name_offsets"), index.blocks("class_names")) != self.classes_digest:
            raise index.error("classes_digest does not match the class names")
        return self.num_records

    def close(self):
        """Close the shards; a later read opens them again."""
        with self._lock:
            self._shards, self._kept_runs = {}, {}

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
                shard = _open(os.path.join(self.path, SHARD_FILE.format(number)), self._shard_tables)
                num_records = int(self._starts[number + 1] - self._starts[number])
                lengths = {len(shard[name]) - (name == "offsets") for name in self._shard_tables if name != "bytes"}
                found = shard.integer("shard"), shard.integer("num_records"), lengths
                if found != (number, num_records, {num_records}):
                    raise shard.error(f"not the shard {number} of {num_records} records that {INDEX_FILE} lists")
            self._shards[number] = shard  # the last one is the most recently used
            if len(self._shards) > MAX_OPEN_SHARDS:
                del self._shards[next(iter(self._shards))]  # its file closes after its last reader
            return shard

    def _by_shard(self, start, stop):
        """Split the records start … stop − 1 by shards: yields (shard, first, end), numbers within that shard."""
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
        """Yields ([bytes], [labels]) of up to RUN_RECORDS neighbours at a time, of ascending record numbers (n,)."""
        shards = np.searchsorted(self._starts, numbers, side="right") - 1
        indices = numbers - self._starts[shards]
        first = (np.diff(numbers, prepend=-2) > 1) | (indices % RUN_RECORDS == 0)  # of a run
        begins = np.flatnonzero(first)
        counts = np.diff(begins, append=len(numbers))
        scattered = 2 * len(begins) > len(numbers)
        owners, starts = shards[begins].tolist(), indices[begins].tolist()
        for number, start, count in zip(owners, starts, counts.tolist(), strict=True):
            yield self._run(number, start, start + count, scattered)

    def _run(self, number, start, stop, scattered):
        tables, first = None, start % RUN_RECORDS
        if scattered:  # its neighbours may be read soon
            with contextlib.suppress(PackError):  # perhaps only a neighbour is damaged
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
        """`_tables` of RUN_RECORDS neighbours; keeps them in memory."""
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

    def _bad_record(self, number, index, what):
        return self._shard(number).error(f"record {self._starts[number] + index}: {what}")


def open_splits(path):
    """{"train": Pack, …} of a folder of packs, or {"train": Pack} where the path is a pack.

    PackError where there is no pack, or the packs have different class tables.
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


def _open(path, tables):
    """The TableFile of a pack's index or shard."""
    return TableFile(path, FORMAT, VERSION, ATTRIBUTES, tables)


def classes_digest(*parts):
    """Hex SHA-256 of iterables of arrays, one after the other; identifies a class table."""
    digest = hashlib.sha256()
    for block in itertools.chain(*parts):
        digest.update(block)
    return digest.hexdigest()
