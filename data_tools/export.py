"""Writes a pack as files that other programs read: python -m data_tools.export PACK OUT --to folder|webdataset

The bytes of the images stay as they are. OUT appears when it is whole, or not at all. What data_tools.pack makes of
OUT has the same records; its labels are the same, too, where every class has an image and the class names are in the
order that data_tools.pack gives them, else with --classes PACK. (A tree of val or test alone is to data_tools.pack one
without splits.)

folder      OUT/<class name>/<record number>.<suffix by content>, of a folder of packs OUT/<split>/<class name>/…, and
            OUT/list.csv with path, label (the class name), split and weight, which data_tools.pack takes, too.
            A / in a class name makes folders. What no folder can be called, or data_tools.pack would not find there,
            is escaped; list.csv has the names themselves. Undone by dropping every %/ and then decoding every %XX:
                %XX    the byte XX: of a %, of control characters, of a / at the name's ends or after a /, of a . at
                       the begin of a folder or in one that is called like a file here, of a folder __MACOSX, and
                       of folders train, val, test at the top of a pack whose classes all lie in such
                %/     the name of a folder goes on in the next, as it has more than 200 bytes
            White space at the ends of a class name is kept in OUT, but data_tools.pack takes it off in list.csv.
webdataset  OUT/<split>-000000.tar … (images-… of a pack without splits), each of at most --shard-mb; of every record
            NNNNNNNNN.<suffix by content> and NNNNNNNNN.cls, its label in digits. Where that is not the name of its
            class, NNNNNNNNN.json has it too, by which data_tools.pack goes: {"label": 0, "xc_class_name": "cat"}.
            OUT/classes.txt has the class names, line n + 1 that of label n (with \\\\ \\n \\r for a backslash and for
            ends of lines in them). The same pack gives the same bytes: all times are 0. Weights are left out.
"""

import contextlib
import csv
import json
import os
import re
import tarfile
import time

import numpy as np

from data_tools.common.class_ids import intervals_of
from data_tools.common.command import Parser, between, check_paths, new_folder, printing, stop_on_signals
from data_tools.common.progress import Progress
from data_tools.sources.base import MACOS_FOLDER, SPLIT_OF
from xc.pack import INDEX_FILE, SPLITS, PackError, open_splits

SUFFIXES = ((rb"\x89PNG\r\n\x1a\n", "png"), (rb"\xff\xd8\xff", "jpg"), (rb"RIFF....WEBP", "webp"), (rb"BM", "bmp"),
            (rb"GIF8[79]a", "gif"), (rb"II[*+]\0|MM\0[*+]|MM\*\0|II\0\*", "tif"), (rb"P5\s", "pgm"),
            (rb"P6\s", "ppm"))
LIST = "list.csv"
MAX_FOLDER, MAX_NAME = 200, 3000  # bytes of a folder's name, and of a class's folders; Linux takes 255 and 4,095
MAX_FOLDERS = 100  # of a class: what makes and removes them calls itself for each
TAR_END = 2 * tarfile.BLOCKSIZE


def suffix_of(image):
    """Of a file with these bytes; ValueError where they are none of the formats that packs hold."""
    for pattern, suffix in SUFFIXES:
        if re.match(pattern, image, re.DOTALL):
            return suffix
    raise ValueError("not an image of a known format")


def folder_of(name, shun_splits=False):
    """A relative path for a class name, for every name another one; see above. ValueError where there is none.

    shun_splits  whether folders train, val and test at the top would be taken for splits
    """
    if not name:
        raise ValueError("an empty name, which no folder can have")
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"a name of {len(name.encode())} bytes, more than a path can have")
    text = re.sub(r"[%\x00-\x1f\x7f]|^/+|/+\Z|(?<=/)/+", lambda found: _escape(found[0]), name)
    first, *others = text.split("/")
    if shun_splits and first in SPLIT_OF:
        first = _escape(first)
    pieces = [piece for folder in (first, *others) for piece in _pieces(folder)]
    text = "/".join(pieces)
    if len(text.encode()) > MAX_NAME or len(pieces) > MAX_FOLDERS:
        raise ValueError(f"a name that makes {len(pieces)} folders and {len(text.encode())} bytes, more than a path "
                         "can have")
    return text


def _escape(text):
    return "".join(f"%{byte:02X}" for byte in text.encode())


def _pieces(folder):
    """A folder's name as one or more that are not too long, cut between characters and escapes, none with a meaning."""
    pieces, size = [""], 0
    for token in re.findall(r"%[0-9A-F]{2}|.", folder, re.DOTALL):
        size += len(token.encode())
        if size > MAX_FOLDER:
            pieces[-1] += "%"
            pieces.append("")
            size = len(token.encode())
        if token == "." and not pieces[-1]:  # hidden, or .. itself
            token = _escape(token)
        pieces[-1] += token
    if re.fullmatch(rf"[0-9]{{9,}}\.[a-z]+|{re.escape(LIST)}", pieces[-1]):
        pieces[-1] = pieces[-1].replace(".", _escape("."))
    elif pieces[-1] == MACOS_FOLDER:
        pieces[-1] = _escape(pieces[-1])
    return pieces


class Folders:
    """Writes records as image files below a folder."""

    def __init__(self, out, is_split, shun_splits, has_weights):
        self.out, self.is_split, self.shun_splits, self.has_weights = out, is_split, shun_splits, has_weights
        self.file = open(os.path.join(out, LIST), "w", encoding="utf-8", newline="")
        self.list = csv.writer(self.file)
        self.list.writerow(["path", "label"] + ["split"] * is_split + ["weight"] * has_weights)

    def add(self, split, number, image, label, pack):
        name = pack.class_name(label)
        folder = os.path.join(split if self.is_split else "", folder_of(name, self.shun_splits))
        path = os.path.join(folder, f"{number:09}.{suffix_of(image)}")
        try:
            file = open(os.path.join(self.out, path), "xb")
        except FileNotFoundError:
            os.makedirs(os.path.join(self.out, folder))
            file = open(os.path.join(self.out, path), "xb")
        with file:
            file.write(image)
        weight = pack.weights(number, number + 1).tolist() if self.has_weights else []
        self.list.writerow([path, name] + [split] * self.is_split + weight)

    def end_split(self):
        pass

    def close(self):
        self.file.close()


class TarShards:
    """Writes records as tar files. A file ends before the record that would exceed shard_bytes."""

    def __init__(self, out, is_split, pack, shard_bytes):
        self.out, self.is_split, self.shard_bytes = out, is_split, shard_bytes
        self.file, self.number = None, 0
        with open(os.path.join(out, "classes.txt"), "w", encoding="utf-8", newline="") as file:
            for start in range(0, pack.num_classes, 2**16):
                for name in pack.class_names(start, min(start + 2**16, pack.num_classes)):
                    file.write(name.replace("\\", r"\\").replace("\n", r"\n").replace("\r", r"\r") + "\n")

    def add(self, split, number, image, label, pack):
        digits, name = str(label), pack.class_name(label)
        record = *_member(f"{number:09}.{suffix_of(image)}", image), *_member(f"{number:09}.cls", digits.encode())
        if name != digits:
            facts = json.dumps({"label": int(label), "xc_class_name": name}).encode()
            record += _member(f"{number:09}.json", facts)
        if self.file and self.file.tell() + sum(map(len, record)) + TAR_END > self.shard_bytes:
            self._end_shard()
        if not self.file:
            path = f"{split if self.is_split else 'images'}-{self.number:06}.tar"
            self.file = open(os.path.join(self.out, path), "xb")
        self.file.writelines(record)

    def end_split(self):
        if self.file:
            self._end_shard()
        self.number = 0

    def close(self):
        if self.file:
            self.file.close()

    def _end_shard(self):
        self.file.write(bytes(TAR_END))
        self.file.flush()
        os.fsync(self.file.fileno())  # a network file system may refuse only now
        self.file.close()
        self.file, self.number = None, self.number + 1


def _member(name, data):
    """A file as a tar holds it, in pieces; written without tarfile.TarFile, which remembers all of them."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)


def chosen(pack, classes):
    """Yields record numbers (n,), those of classes (a bool of each; None: all), in their order, a few at a time."""
    for start, stop in pack.ranges():
        records = np.arange(start, stop)
        yield records if classes is None else records[classes[pack.labels(start, stop)]]


def export(src, out, *, to, split, classes, shard_mb):
    """Writes the pack src, or folder of packs, as the new folder out; the parameters are the flags of the command.

    returns  dict of totals: records, classes, bytes, seconds, and records of each split

    ValueError or OSError, with nothing left at out, for whatever the user can mend.
    """
    started = time.monotonic()
    out = os.path.abspath(out)
    packs = open_splits(src)
    check_paths([src], out, None)
    is_split = not os.path.exists(os.path.join(src, INDEX_FILE))
    if split is not None:
        if split not in packs or not is_split:
            raise PackError(f"--split {split}: {src} has {', '.join(packs) if is_split else 'no splits'}")
        packs = {split: packs[split]}
    first = next(iter(packs.values()))
    mask = None if classes is None else mask_of(classes, first.num_classes)
    counts = {split: pack.class_counts if mask is None else pack.class_counts * mask for split, pack in packs.items()}
    totals = {split: int(of_split.sum()) for split, of_split in counts.items()}
    labels = np.flatnonzero(sum(counts.values()))
    if not len(labels):
        raise PackError(f"--classes {classes}: {src} has no images of these classes; name others")
    num_bytes = 0
    with new_folder(out) as partial:
        if to == "folder":  # most packs without splits say at their first class that they will not seem to have some
            seems_split = not is_split and all(first.class_name(n).partition("/")[0] in SPLIT_OF for n in labels)
            writer = Folders(partial, is_split, seems_split, first.has_weights)
        else:
            writer = TarShards(partial, is_split, first, shard_mb * 1e6)
        with contextlib.closing(writer), Progress("exporting", sum(totals.values())) as progress:
            for split, pack in packs.items():
                for records in chosen(pack, mask):
                    for number, image, label in zip(records, *pack.read(records), strict=True):
                        try:
                            writer.add(split, number, image, label, pack)
                        except PackError:
                            raise
                        except ValueError as error:
                            raise PackError(f"{pack.path}: record {number} of class {label}: {error}") from error
                        num_bytes += len(image)
                    progress.add(len(records))
                writer.end_split()
    return {"records": sum(totals.values()), "classes": len(labels), "bytes": num_bytes,
            "splits": totals if is_split else {}, "seconds": round(time.monotonic() - started, 3)}


def mask_of(classes, num_classes):
    """(C,) bool: which classes a list such as 5-9,17,@file names; ValueError where it names others."""
    mask = np.zeros(num_classes, bool)
    for first, last in intervals_of(classes):
        if last >= num_classes:
            raise PackError(f"--classes names {last}, but the pack has the classes 0 to {num_classes - 1}")
        mask[first : last + 1] = True
    return mask


def main(argv=None):
    parser = Parser(prog="data_tools.export", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("src", metavar="PACK", help="a pack, or a folder with packs train, val, test")
    add("out", metavar="OUT", help="the folder to make")
    add("--to", choices=("folder", "webdataset"), required=True, help="a tree of images, or tar files")
    add("--split", choices=SPLITS, help="only this one (all)")
    add("--classes", metavar="LIST", help="only these labels, as 5-9,17,@file; a file has labels on any lines (all)")
    add("--shard-mb", type=between(1e-6, 2**20, float), default=1000, help="most of one tar file (%(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of text")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    try:
        facts = export(**args)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"{args['out']}: {error}; nothing was kept")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was kept\n")
    with printing(parser):
        if as_json:
            print(json.dumps(facts))
        else:
            print(f"{args['out']}: {facts['records']} images of {facts['classes']} classes, "
                  f"{facts['bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    stop_on_signals()
    main()
