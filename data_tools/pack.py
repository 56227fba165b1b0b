"""Packs a data set of images into a few large files: python -m data_tools.pack SRC OUT

SRC  a tree of images; an image's class is the path of its folder below SRC (letters/a/1.png is of class letters/a).
     Or a CSV or TSV file with a header line and the columns path, label and, if wanted, split.
OUT  the pack, a new folder; its layout is documented in xc/pack.py.

With folders train, val, test (train at least) at the top of the tree and nothing else there, or with a column split,
OUT is a folder of packs with one class table, that of train. Labels are the places of the class names in sorted
order; where all names are numbers they are sorted as numbers, so labels 0 … C − 1 of a CSV keep their values.

Every image is decoded once as a check. Those that fail are left out, counted and listed in OUT/skipped.tsv. OUT
appears only when everything is done; before that there is a folder .OUT.partial-… beside it, which no reader accepts.
The same SRC and seed give the same bytes whatever the number of workers. While it runs, memory holds the list of
paths, one shard, and some megabytes and one decoded image per worker.
"""

import argparse
import itertools
import json
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

from data_tools.sources import folder_source, manifest_source
from xc import pack as layout
from xc.message import one_line
from xc.pack import PackError, open_image, open_splits

CHUNK_RECORDS, CHUNK_BYTES = 64, 2**23  # what a worker is given, and where it stops and hands the rest back
NAMED = 5  # how many of a long list a message names


# The list of records and the class table.


class Records:
    """Paths and class numbers of one split, without an object per record."""

    def __init__(self):
        self._paths, self._ends, self.classes = bytearray(), array("q", [0]), array("q")

    def __len__(self):
        return len(self.classes)

    def add(self, path, number):
        self._paths += os.fsencode(path)
        self._ends.append(len(self._paths))
        self.classes.append(number)

    def path(self, i):
        return os.fsdecode(bytes(self._paths[self._ends[i] : self._ends[i + 1]]))


def scan(source):
    """({split: Records}, [class names by class number, in order of appearance]) of all of a source."""
    splits, numbers = {}, {}
    with Progress("listing") as progress:
        for split, path, name in source:
            splits.setdefault(split, Records()).add(path, numbers.setdefault(name, len(numbers)))
            progress.add(1)
    return {split: splits[split] for split in ("", *layout.SPLITS) if split in splits}, list(numbers)


def class_table(splits, names, given):
    """(class names in order of their labels, {split: (n,) int64 labels}).

    names  of the class numbers in splits
    given  the table to use, a list of names; None: the sorted names of train, or of all where there are no splits
    """
    odd = next((name for name in names if name != name.encode(errors="replace").decode()), None)
    if odd is not None:
        raise PackError(f"class name {odd!r} is not valid UTF-8; rename the class")
    owner = "the pack of --classes"
    if given is None:
        owner, used = "train", np.zeros(len(names), bool)
        used[splits["train" if "train" in splits else ""].classes] = True
        given = _sorted([name for name, is_used in zip(names, used, strict=True) if is_used])
    places = {name: label for label, name in enumerate(given)}
    label_of = np.array([places.get(name, -1) for name in names], np.int64)
    labels = {split: label_of[records.classes] for split, records in splits.items()}
    for split in splits:
        unknown = np.flatnonzero(labels[split] < 0)
        if len(unknown):
            name = names[splits[split].classes[unknown[0]]]
            raise PackError(f"class {name!r}{split and ' of ' + split} is not one of {owner} ({len(unknown)} images "
                            f"are of such classes); add it there or leave it out here")
    return given, labels


def _sorted(names):
    if not all(name.isascii() and name.isdigit() for name in names):
        return sorted(names)
    names = sorted(names, key=lambda name: (len(name.lstrip("0")), name.lstrip("0"), name))  # by value, of any length
    if any(name.lstrip("0") != str(label).lstrip("0") for label, name in enumerate(names)):
        note("the class names are numbers with gaps: their labels are 0, 1, 2, … without gaps")
    return names


# Reading and checking: what workers do.


def check_files(root, paths, max_pixels):
    """[(bytes, crc32) or (None, reason why not)] of image files; ends early after CHUNK_BYTES."""
    results, num_bytes = [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow mentions odd metadata of images that decode well
        for path in paths:
            try:
                data = _read(os.path.join(root, path))
                open_image(data, max_pixels)
            except (OSError, ValueError) as error:
                results.append((None, getattr(error, "strerror", None) or str(error)))
                continue
            results.append((data, zlib.crc32(data)))
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


def read_in_order(pool, window, root, records, order, max_pixels):
    """Yields (record number, bytes or None, crc32 or reason why not) of the records in the given order.

    At most `window` chunks are under way or waiting to be written.
    """

    def start(chunk):
        return chunk, pool.submit(check_files, root, [records.path(i) for i in chunk], max_pixels)

    places, pending = iter(range(0, len(order), CHUNK_RECORDS)), deque()
    while True:
        for place in itertools.islice(places, window - len(pending)):
            pending.append(start(order[place : place + CHUNK_RECORDS]))
        if not pending:
            return
        chunk, future = pending.popleft()
        try:
            results = future.result()
        except BrokenProcessPool as error:
            raise PackError(f"a worker died (out of memory, or a decoder crashed) at or soon after "
                            f"{records.path(chunk[0])}") from error
        if len(results) < len(chunk):
            pending.appendleft(start(chunk[len(results) :]))
        for i, result in zip(chunk, results, strict=False):
            yield i, *result


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

    def __init__(self, folder, shard_bytes, num_classes):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.class_counts = np.zeros(num_classes, np.int64)
        self.shard_records, self.shard_file_bytes, self.num_bytes = [], [], 0
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

    def write_index(self, names, **attributes):
        names = [name.encode() for name in names]
        ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        flat = np.frombuffer(b"".join(names), np.uint8)
        tables = {"shard_records": self.shard_records, "shard_file_bytes": self.shard_file_bytes,
                  "class_names": flat, "class_name_offsets": ends, "class_counts": self.class_counts}
        _write(os.path.join(self.folder, layout.INDEX_FILE), layout.INDEX_TABLES, tables, num_records=self.num_records,
               num_classes=len(names), num_bytes=self.num_bytes, classes_digest=layout.classes_digest([ends], [flat]),
               **attributes)

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

    allowed  "100", or "1%" of total
    """

    def __init__(self, file, allowed, total):
        self.count = 0
        self._file, self._allowed, self._total, self._first = file, allowed, total, []
        self._most = int(float(allowed[:-1]) / 100 * total) if allowed.endswith("%") else int(allowed)
        print("path", "reason", sep="\t", file=file)

    def add(self, path, reason):
        escapes = {ord("\\"): r"\\", ord("\t"): r"\t", ord("\n"): r"\n", ord("\r"): r"\r"}
        print(path.translate(escapes), reason.translate(escapes), sep="\t", file=self._file)
        self.count += 1
        if self.count <= NAMED:
            self._first.append(f"{path} ({reason})")
        if self.count > self._most:
            raise PackError(f"{self.count} of {self._total} images cannot be used, but --max-skipped {self._allowed} "
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


def pack(src, out, *, classes, root, seed, shard_mb, workers, max_pixels, max_skipped):
    """Packs src into the new folder out and says what became of it; the parameters are the flags of the command.

    returns  dict of totals over the splits: records, classes, bytes, shards, skipped, seconds

    PackError or OSError, with nothing left at out, for whatever the user can mend.
    """
    started = time.monotonic()
    out = os.path.abspath(out)
    check_paths(src, out, root)
    table = None
    if classes is not None:
        train = open_splits(classes)["train"]
        table = train.class_names(0, train.num_classes)

    ignored = Counter()
    if os.path.isdir(src):
        root, source = src, folder_source(src, ignored)
    else:
        root, source = root or os.path.dirname(src), manifest_source(src)
    splits, names = scan(source)
    for what, count in sorted(ignored.items()):
        note(f"ignored {count} {what}")
    if not splits.keys() & {"", "train"}:
        raise PackError(f"{src}: no images{' of split train, which gives the classes' if splits else ''}")
    names, labels = class_table(splits, names, table)

    total = sum(map(len, splits.values()))
    with new_folder(out) as partial:
        writers = {split: PackWriter(os.path.join(partial, split), shard_mb * 1e6, len(names)) for split in splits}
        listing = open(os.path.join(partial, "skipped.tsv"), "w", encoding="utf-8", errors="surrogateescape")
        with listing, _pool(workers) as pool, Progress("packing", total) as progress:
            skipped = Skipped(listing, max_skipped, total)
            for split, records in splits.items():
                order = np.random.default_rng([seed, ("", *layout.SPLITS).index(split)]).permutation(len(records))
                for i, data, crc_or_reason in read_in_order(pool, 2 * workers + 1, root, records, order, max_pixels):
                    if data is None:
                        skipped.add(records.path(i), crc_or_reason)
                    else:
                        writers[split].add(data, crc_or_reason, labels[split][i])
                    progress.add(1)
                if not writers[split].class_counts.any():
                    raise PackError(f"no image{_of(split)} can be used: {skipped}")
                writers[split].end_shard()
        for split, writer in writers.items():  # last: a folder without an index is not a pack
            writer.write_index(names, source=os.path.basename(os.path.abspath(src)), seed=seed,
                               skipped=len(splits[split]) - writer.num_records)

    if skipped.count:
        note(f"skipped {skipped.count} images, listed in {os.path.join(out, 'skipped.tsv')}: {skipped}")
    for split, writer in writers.items():
        lost = np.flatnonzero((np.bincount(labels[split], minlength=len(names)) > 0) & (writer.class_counts == 0))
        if len(lost):
            note(f"warning: {len(lost)} classes{_of(split)} lost all their images; they keep their labels: "
                 + ", ".join(names[label] for label in lost[:NAMED]) + (", …" if len(lost) > NAMED else ""))
        place, num_classes = os.path.join(out, split).rstrip("/"), np.count_nonzero(writer.class_counts)
        print(f"{place}: {writer.num_records} images of {num_classes} classes, {writer.num_bytes / 1e6:.1f} MB in "
              f"{len(writer.shard_records)} shards")
    return {"records": sum(writer.num_records for writer in writers.values()), "classes": len(names),
            "bytes": sum(writer.num_bytes for writer in writers.values()),
            "shards": sum(len(writer.shard_records) for writer in writers.values()),
            "skipped": skipped.count, "seconds": round(time.monotonic() - started, 3)}


def check_paths(src, out, root):
    """PackError for what can be known to fail before anything is read."""
    parent = os.path.dirname(out)
    if not os.path.exists(src):
        raise PackError(f"{src}: no such file or folder; give a tree of images or a CSV or TSV file")
    if root is not None and os.path.isdir(src):
        raise PackError(f"--root {root} is for the paths of a CSV or TSV file, but {src} is a folder; leave it out")
    if root is not None and not os.path.isdir(root):
        raise PackError(f"--root {root}: no such folder")
    if os.path.lexists(out):
        raise PackError(f"{out} exists; remove it or give another name")
    if not (os.path.isdir(parent) and os.access(parent, os.W_OK)):
        raise PackError(f"{parent}: no such folder, or not writable; make it first, {os.path.basename(out)} goes there")
    if os.path.isdir(src) and os.path.realpath(out).startswith(os.path.join(os.path.realpath(src), "")):
        raise PackError(f"{out} lies inside of {src}; give a place outside")


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


def main(argv=None):
    parser = Parser(prog="data_tools.pack", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("src", metavar="SRC", help="a tree of images, or a CSV or TSV file with columns path, label and maybe split")
    add("out", metavar="OUT", help="the folder to make")
    add("--classes", metavar="PACK", help="use the class table of this pack; an unknown class is an error")
    add("--root", metavar="DIR", help="where the paths in a CSV or TSV file start (the folder of that file)")
    add("--seed", type=between(0, 2**63 - 1), default=0, help="of the shuffle (%(default)s)")
    add("--shard-mb", type=between(1e-6, 2**20, float), default=256, help="most image data in one file (%(default)s)")
    add("--workers", type=between(0, 4096), default=os.cpu_count(), help="processes, 0: only this one (%(default)s)")
    add("--max-pixels", type=between(1, layout.MAX_PIXELS), default=50_000_000,
        help=f"skip images with more (%(default)s); at most {layout.MAX_PIXELS}, which readers take")
    add("--max-skipped", type=share_or_count, default="1%", metavar="LIMIT",
        help="fail where more images cannot be used, a number or a share (%(default)s)")
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
