"""Packs a data set of images into a few large files: python -m data_tools.pack SRC OUT

SRC  a tree of images; an image's class is the path of its folder below SRC (letters/a/1.png is of class letters/a).
     Or a manifest (CSV, TSV or Parquet with the columns path, label and, if wanted, split), WebDataset tar shards,
     MXNet RecordIO, or a pack: data_tools/sources.py. Several become one pack.
OUT  the pack, a new folder; its layout is documented in xc/pack.py.

With folders train, val, test (train at least) at the top of the tree and nothing else there, with a column split, or
with shards named after splits, OUT is a folder of packs with one class table, that of train. Labels are the places of
the class names in sorted order; where all names are numbers they are sorted as numbers, so labels 0 … C − 1 of a CSV
keep their values.

Every image is decoded once as a check; its bytes are kept unless --resize, --format or --quality asks for others. Those
that fail are left out, counted and listed in OUT/skipped.tsv. OUT appears only when everything is done; before that
there is a folder .OUT.partial-… beside it, which no reader accepts.
The same SRC and seed give the same bytes whatever the number of workers and the memory. While it runs, memory holds
what --memory-mb allows, one shard of every split, and some megabytes and one decoded image per worker; what sorting
needs beyond that are files in that folder, once as large as the images that did not come in files of their own.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
import time
import warnings
import zlib
from array import array
from collections import Counter, deque
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

import h5py
import numpy as np
from tqdm import tqdm

from data_tools.class_table import ClassTable, name_hash
from data_tools.encoding import FORMATS, Encoding
from data_tools.listing import CLASS_SPLITS, MAX_NAME_BYTES, Listing, counts_file
from data_tools.sources import KINDS, open_source
from xc import pack as layout
from xc.message import one_line
from xc.pack import PackError, open_image, open_splits

CHUNK_RECORDS, CHUNK_BYTES = 64, 2**23  # what a worker is given, and where it stops and hands the rest back
NAMES = 2**16  # class names read at once
NAMED = 5  # how many of a long list a message names


# Reading and checking: what workers do.


def check_images(images, max_pixels, encoding):
    """[(bytes or None, crc32 or reason why not)] of images; ends early after CHUNK_BYTES were read.

    images    [(path, None) or (any text, bytes)]; bytes that were given and stay as they are are not given back
    encoding  how they are encoded anew
    """
    results, num_bytes = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow mentions odd metadata of images that decode well
        for path, given in images:
            try:
                data = _read(path) if given is None else given
                data = encoding.apply(open_image(data, max_pixels), data)
            except (OSError, ValueError) as error:
                results.append((None, getattr(error, "strerror", None) or str(error)))
                continue
            results.append((None if data is given else data, zlib.crc32(data)))
            num_bytes += len(data)
            if num_bytes >= CHUNK_BYTES:
                break
    return results


def _read(path):
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
        raise ValueError("not a file")
    if status.st_size > layout.MAX_RECORD_BYTES:
        raise ValueError(f"{status.st_size} bytes, more than {layout.MAX_RECORD_BYTES}")
    with open(path, "rb") as file:
        return file.read()


def read_in_order(pool, window, roots, chunks, *options):
    """Yields (record, its bytes or None, crc32 or reason why not) of lists of records, in their order.

    At most `window` lists are under way or waiting to be written. options are those of check_images.
    """

    def start(chunk):
        images = [(os.path.join(roots[record.root], record.path), record.data) for record in chunk]
        return chunk, pool.submit(check_images, images, *options)

    chunks, pending = iter(chunks), deque()
    while True:
        for chunk in itertools.islice(chunks, window - len(pending)):
            pending.append(start(chunk))
        if not pending:
            return
        chunk, future = pending.popleft()
        try:
            results = future.result()
        except BrokenProcessPool as error:
            raise PackError(f"a worker died (out of memory, or a decoder crashed) at or soon after "
                            f"{chunk[0].path}") from error
        if len(results) < len(chunk):
            pending.appendleft(start(chunk[len(results) :]))
        for record, (data, crc_or_reason) in zip(chunk, results, strict=False):
            yield record, data if isinstance(crc_or_reason, str) or data is not None else record.data, crc_or_reason


class InProcess(Executor):
    """The pool of --workers 0."""

    def submit(self, function, *arguments):
        future = Future()
        future.set_result(function(*arguments))
        return future


def _pool(workers):
    if workers == 0:
        return InProcess()
    methods = multiprocessing.get_all_start_methods()  # not fork: HDF5 and threads do not survive it
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    return ProcessPoolExecutor(workers, context, _start_worker)


def _start_worker():
    """A worker leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# Writing.


class PackWriter:
    """Writes the shards of one pack, then its index. A shard ends before the record that would exceed shard_bytes."""

    def __init__(self, folder, shard_bytes, class_counts):
        """class_counts  (C,) int64 zeros, which the writer counts up"""
        self.folder, self.shard_bytes, self.class_counts = folder, shard_bytes, class_counts
        self.shard_records, self.shard_file_bytes, self.num_bytes, self.num_added = [], [], 0, 0
        os.makedirs(folder, exist_ok=True)
        self._clear()

    @property
    def num_records(self):
        return sum(self.shard_records)

    def add(self, data, crc, label):
        if self._labels and len(self._bytes) + len(data) > self.shard_bytes:
            self.end_shard()
        self._bytes += data
        self._ends.append(len(self._bytes))
        self._labels.append(label)
        self.num_added += 1
        self._crcs.append(crc)
        self.class_counts[label] += 1

    def end_shard(self):
        number = len(self.shard_records)
        tables = {"bytes": np.frombuffer(self._bytes, np.uint8), "offsets": self._ends, "labels": self._labels,
                  "crc32": self._crcs}
        size = _write(os.path.join(self.folder, layout.SHARD_FILE.format(number)), layout.SHARD_TABLES, tables,
                      num_records=len(self._labels), shard=number)
        self.shard_records.append(len(self._labels))
        self.shard_file_bytes.append(size)
        self.num_bytes += len(self._bytes)
        self._clear()

    def write_index(self, table, **attributes):
        tables = {"shard_records": self.shard_records, "shard_file_bytes": self.shard_file_bytes,
                  "class_names": table.names, "class_name_offsets": table.ends, "class_counts": self.class_counts}
        _write(os.path.join(self.folder, layout.INDEX_FILE), layout.INDEX_TABLES, tables, num_records=self.num_records,
               num_classes=len(table), num_bytes=self.num_bytes,
               classes_digest=layout.classes_digest([table.ends], [table.names]), **attributes)

    def _clear(self):
        self._bytes, self._ends, self._labels, self._crcs = bytearray(), array("q", [0]), array("q"), array("I")


def _write(path, kinds, tables, **attributes):
    """Writes an HDF5 file of flat tables, kinds {name: dtype}, tables {name: array}; returns its size in bytes."""
    arrays = {name: np.asarray(tables[name], dtype) for name, dtype in kinds.items()}
    with open(path, "wb") as file:  # find out here whether there is room: HDF5 fails late and in pages of text
        os.posix_fallocate(file.fileno(), 0, sum(array.nbytes for array in arrays.values()) + 2**16)
    with h5py.File(path, "w") as file:
        for name, value in {"format": layout.FORMAT, "version": layout.VERSION, **attributes}.items():
            file.attrs[name] = np.int64(value) if isinstance(value, int) else np.bytes_(os.fsencode(value))
        for name, array in arrays.items():
            file.create_dataset(name, data=array, track_times=False)
    with open(path, "rb") as file:
        os.fsync(file.fileno())  # a network file system may refuse only now
    return os.path.getsize(path)


class Skipped:
    """Writes the images that are left out to a file, and ends the packing where they are too many.

    allowed  "100", or "1%" of the total, which is known when all are listed
    ignored  Counter of what is no image: {what: number}
    """

    def __init__(self, file, allowed):
        self.count, self.of_split, self.ignored = 0, Counter(), Counter()
        self._file, self._allowed, self._total, self._first = file, allowed, None, []
        self._most = math.inf if allowed.endswith("%") else int(allowed)
        print("path", "reason", sep="\t", file=file)

    def add(self, split, path, reason):
        escapes = {ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"}
        print(path.translate(escapes), reason.translate(escapes), sep="\t", file=self._file)
        self.count += 1
        self.of_split[split] += 1
        if self.count <= NAMED:
            self._first.append(f"{path} ({reason})")
        self._check()

    def set_total(self, total):
        self._total = total
        if self._allowed.endswith("%"):
            self._most = int(float(self._allowed[:-1]) / 100 * total)
        self._check()

    def _check(self):
        if self.count > self._most:
            of = "" if self._total is None else f" of {self._total}"
            raise PackError(f"{self.count}{of} images cannot be used, but --max-skipped {self._allowed} "
                            f"allows {self._most}: {self}; mend or remove them, or allow more")

    def __str__(self):
        return ", ".join(self._first) + (", …" if self.count > NAMED else "")


class Progress:
    """A bar where stderr is a terminal, otherwise a line every few seconds. total, in `unit`, may be unknown."""

    line_seconds = 5

    def __init__(self, what, total=None, unit="images"):
        self.what, self.total, self.unit, self.done, self._shown = what, total, unit, 0, time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit=f" {unit}", unit_scale=True) if sys.stderr.isatty() else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self._bar is not None:
            self._bar.close()

    def add(self, count):
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._shown >= self.line_seconds:
            self._shown = time.monotonic()
            note(f"{self.what}: {self.done:.0f}{f' of {self.total:.0f}' if self.total else ''} {self.unit}")


def note(text):
    print(text, file=sys.stderr, flush=True)


# The command.


def pack(src, out, *, kind, classes, root, split, seed, shard_mb, memory_mb, workers, max_pixels, max_skipped,
         resize, format, quality):
    """Packs src, a list of paths, into the new folder out and says what became of it; the parameters are the flags.

    returns  dict of totals over the splits: records, classes, bytes, shards, skipped, seconds

    PackError or OSError, with nothing left at out, for whatever the user can mend.
    """
    started = time.monotonic()
    out = os.path.abspath(out)
    check_paths(src, out, root)
    sources = [open_source(path, kind, root) for path in src]
    if quality is not None and format == "png":
        raise PackError("--quality is of jpeg and webp, png loses nothing; leave it out")
    encoding = Encoding(resize, format, quality)
    given, wanted = None, None
    if classes is not None and os.path.isfile(classes):
        wanted = names_in(classes)
    elif classes is not None:
        given = open_splits(classes)["train"]

    with new_folder(out) as partial, open(os.path.join(partial, "skipped.tsv"), "w", encoding="utf-8",
                                          errors="surrogateescape") as skipped_file:
        work = os.path.join(partial, "work")  # files that go when the pack is whole
        os.mkdir(work)
        skipped, listing = Skipped(skipped_file, max_skipped), Listing(work, int(memory_mb * 1e6), seed, wanted, split)
        with Progress("listing") as progress:
            for number, source in enumerate(sources):
                for record in source.records(skipped):
                    if not listing.add(number, *record, source.may_repeat):
                        skipped.ignored[f"images of classes that {classes} does not name"] += 1
                    progress.add(1)
        splits = listing.splits
        if not CLASS_SPLITS & set(splits):
            raise PackError(f"{', '.join(src)}: no images"
                            f"{' of split train, which gives the classes' if splits else ''}{_why(skipped)}")
        if "" in splits and len(splits) > 1:
            raise PackError(f"{', '.join(src)}: some images have a split and others none; give all one, or none")
        for what, count in sorted(skipped.ignored.items()):
            note(f"ignored {count} {what}")
        if repeats := listing.check_paths():
            note(f"{repeats} rows name a path again; their images are packed as often as they are named")
        table = ClassTable(os.path.join(work, "classes"), listing.class_names() if given is None else names_of(given),
                           int(memory_mb * 1e6) // 4)
        if listing.has_gaps:
            note("the class names are numbers with gaps: their labels are 0, 1, 2, … without gaps")
        if wanted is not None and len(wanted) > len(table):
            note(f"{len(wanted) - len(table)} classes of {classes} have no images and get no label")
        owner = "train" if given is None else "the pack of --classes"
        listed = {split: listing.class_counts(split, table, owner) for split in splits}
        total = sum(int(counts.sum()) for counts in listed.values()) + skipped.count
        skipped.set_total(total)

        writers = {split: PackWriter(os.path.join(partial, split), shard_mb * 1e6,
                                     counts_file(os.path.join(work, f"written-{split}"), len(table)))
                   for split in splits}
        with _pool(workers) as pool, Progress("packing", total - skipped.count) as progress:
            roots, chunks = [source.root for source in sources], listing.chunks(table, CHUNK_RECORDS, CHUNK_BYTES)
            images = read_in_order(pool, 2 * workers + 1, roots, chunks, max_pixels, encoding)
            for record, data, crc_or_reason in images:
                if data is None:
                    skipped.add(record.split, record.path, crc_or_reason)
                else:
                    writers[record.split].add(data, crc_or_reason, record.label)
                progress.add(1)
        for split, writer in writers.items():
            if not writer.num_added:
                raise PackError(f"no image{_of(split)} can be used: {skipped}")
            writer.end_shard()
        for split, writer in writers.items():  # last: a folder without an index is not a pack
            writer.write_index(table, source=", ".join(os.path.basename(os.path.abspath(path)) for path in src),
                               seed=seed, skipped=skipped.of_split[split])
        lost = {split: np.flatnonzero((listed[split] > 0) & (writers[split].class_counts == 0)) for split in splits}
        lost = {split: (len(labels), [table.name(label) for label in labels[:NAMED]]) for split, labels in lost.items()}
        with_images = {split: np.count_nonzero(writers[split].class_counts) for split in splits}
        shutil.rmtree(work)

    if skipped.count:
        note(f"skipped {skipped.count} images, listed in {os.path.join(out, 'skipped.tsv')}: {skipped}")
    for split, writer in writers.items():
        count, names = lost[split]
        if count:
            note(f"warning: {count} classes{_of(split)} lost all their images; they keep their labels: "
                 + ", ".join(names) + (", …" if count > NAMED else ""))
        place = os.path.join(out, split).rstrip("/")
        print(f"{place}: {writer.num_records} images of {with_images[split]} classes, {writer.num_bytes / 1e6:.1f} MB "
              f"in {len(writer.shard_records)} shards")
    return {"records": sum(writer.num_records for writer in writers.values()), "classes": len(table),
            "bytes": sum(writer.num_bytes for writer in writers.values()),
            "shards": sum(len(writer.shard_records) for writer in writers.values()),
            "skipped": skipped.count, "seconds": round(time.monotonic() - started, 3)}


def names_in(path):
    """Sorted array of the hashes of the class names in a text file, one a line."""
    hashes = set()
    with open(path, "rb") as file:
        while line := file.readline(MAX_NAME_BYTES + 3):
            if name := line.rstrip(b"\r\n"):
                hashes.add(name_hash(name))
    return array("Q", sorted(hashes))


def names_of(pack):
    """The class names of a pack (bytes), in the order of their labels."""
    for start in range(0, pack.num_classes, NAMES):
        for name in pack.class_names(start, min(start + NAMES, pack.num_classes)):
            yield name.encode()


def _why(skipped):
    what = [f"{count} {what} ignored" for what, count in sorted(skipped.ignored.items())]
    if skipped.count:
        what.append(f"{skipped.count} skipped: {skipped}")
    return f" ({'; '.join(what)})" if what else ""


def check_paths(src, out, root):
    """PackError for what can be known to fail before anything is read."""
    parent = os.path.dirname(out)
    for path in src:
        if not os.path.exists(path):
            raise PackError(f"{path}: no such file or folder; give a tree of images, a manifest, tar shards, RecordIO "
                            "or a pack")
        if root is not None and os.path.isdir(path):
            raise PackError(f"--root {root} is for the paths of a manifest, but {path} is a folder; leave it out")
        if os.path.isdir(path) and os.path.realpath(out).startswith(os.path.join(os.path.realpath(path), "")):
            raise PackError(f"{out} lies inside of {path}; give a place outside")
    if root is not None and not os.path.isdir(root):
        raise PackError(f"--root {root}: no such folder")
    if os.path.lexists(out):
        raise PackError(f"{out} exists; remove it or give another name")
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK)):
        raise PackError(f"{parent}: no such folder, or not writable; make it first, {os.path.basename(out)} goes there")


@contextmanager
def new_folder(out):
    """A folder beside out that is renamed to it at the end, or removed where that is not reached."""
    partial = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}{layout.PARTIAL}{secrets.token_hex(4)}")
    os.mkdir(partial)
    try:
        yield partial
        os.rename(partial, out)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _of(split):
    return split and f" of {split}"


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(' '.join(message.split()))}\n")


def between(least, most, kind=int):
    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return kind(text)

    return number


def share_or_count(text):
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", text):
        raise argparse.ArgumentTypeError(f"{text} is neither a number like 100 nor a share like 1%")
    return text


def held_out(text):
    name, _, share = text.partition("=")
    if name not in layout.SPLITS[1:] or not re.fullmatch(r"0?\.\d*[1-9]\d*", share):
        raise argparse.ArgumentTypeError(f"{text} is not like test=0.01: val or test, and a share between 0 and 1")
    return name, float(share)


def main(argv=None):
    parser = Parser(prog="data_tools.pack", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("src", metavar="SRC", nargs="+", help="one or several of what is listed in the README; several become one pack")
    add("out", metavar="OUT", help="the folder to make")
    add("--classes", metavar="PACK", help="use the class table of this pack; an unknown class is an error. Or a text "
        "file with a class name on each line: take images of these classes only")
    add("--from", dest="kind", choices=KINDS, help="what SRC is, where its content does not tell")
    add("--root", metavar="DIR", help="where the paths in a manifest start (the folder of that file)")
    add("--split", type=held_out, metavar="NAME=SHARE", help="draw this share of the images for the split val or test, "
        "as in test=0.01, where the source has no splits")
    add("--seed", type=between(0, 2**63 - 1), default=0, help="of the shuffle (%(default)s)")
    add("--shard-mb", type=between(1e-6, 2**20, float), default=256, help="most image data in one file (%(default)s)")
    add("--memory-mb", type=between(1e-3, 2**20, float), default=1024,
        help="what shuffling and sorting may hold in memory; more goes through files beside OUT (%(default)s)")
    add("--workers", type=between(0, 4096), default=os.cpu_count(), help="processes, 0: only this one (%(default)s)")
    add("--max-pixels", type=between(1, layout.MAX_PIXELS), default=50_000_000,
        help=f"skip images with more (%(default)s); at most {layout.MAX_PIXELS}, which readers take")
    add("--max-skipped", type=share_or_count, default="1%", metavar="LIMIT",
        help="fail where more images cannot be used, a number or a share (%(default)s)")
    add("--resize", type=between(1, 2**14), metavar="PIXELS", help="make larger images so small that the shorter side "
        "has this length; of PNG, JPEG and WebP the format stays, others become PNG")
    add("--format", choices=FORMATS, help="encode images that have another format anew (the bytes are kept)")
    add("--quality", type=between(1, 100), help="encode all images anew, JPEG and WebP with this quality; without it, "
        "images that must be encoded anew get 90")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(pack(**vars(args))))
    except PackError as error:
        parser.error(str(error))
    except (OSError, RuntimeError) as error:  # h5py has either for a disk that refuses
        parser.error(f"{args.out}: {error}; nothing was kept")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was kept\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up as after Ctrl-C
    main()
