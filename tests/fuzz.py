"""Fuzzing of every reader of files that may come from strangers.

    python -m tests.fuzz TARGET --case FOLDER                       read one saved case, with the traceback if it fails
    python -m tests.fuzz TARGET --seed S --seconds T --work FOLDER  cases S, S + 1, … : a child of benchmarks/soak.py

A target's files are made by our own writers and are small. A case is a changed copy of them. Its reader may accept it
or refuse it with one of the target's clear errors, in one line; all else is a finding: another exception, too
much memory, a write outside of the case's folder out. A crash or a hang is seen by who watches the child.

Changes are drawn from a `random.Random`: hypothesis plays one in tests/test_fuzz.py, which shrinks what fails; in a
child it is a plain one of the case's number. atheris would see the branches of our Python code alone, not those of the
libraries in C and Rust which parse, and end at the first finding.
"""

import argparse
import contextlib
import csv
import io
import json
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data_tools.export
import data_tools.pack
import data_tools.show
import data_tools.split
from data_tools.fonts import faces as font_faces
from data_tools.packing import encode as encoding
from data_tools.packing.validate import CHECKS, check_image
from data_tools.sources import recordio
from xc import config
from xc.checkpoint import layout, newest
from xc.checkpoint import state as checkpoint
from xc.checkpoint import writer as saver
from xc.comm.world import World
from xc.data import images, pack, pack_split
from xc.data import loader as data
from xc.data import synthetic as synth
from xc.errors import UserError
from xc.gradients import exchanges as exchange
from xc.model import backbone
from xc.model import head_table as heads
from xc.optim import schedule
from xc.optim.noise_scale import NoiseScale
from xc.optim.optimizers import RowSGD, backbone_optimizer
from xc.run import folder as run_folder
from xc.run import metrics
from xc.run.loss_meter import Losses

MESSAGE_CHARACTERS = 2000


class Finding(Exception):
    """What a reader must not do."""


@dataclass(frozen=True)
class Target:
    make: Callable  # make(folder): files that the reader accepts
    change: Callable  # change(random, folder): one of many ways to spoil them
    read: Callable  # read(folder, out): the reader; what it writes goes below out
    clear: tuple  # the exceptions that may refuse a file
    memory_mb: int = 256  # that a case may take beyond what was in use before it


def attempt(target, folder):
    """ "accepted" or "refused", for a case in `folder`; Finding for anything else."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    before = _reset_peak_mb()
    try:
        with _guarded(out), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.read(folder / "in", out)
        outcome = "accepted"
    except Finding:
        raise
    except target.clear as error:
        if _chain_has(error, MemoryError):
            raise Finding("it asks for more memory than there is") from error
        text = str(error)
        if not text or "\n" in text or len(text) > MESSAGE_CHARACTERS:
            raise Finding(f"a message that is not one line: {text[:200]!r}, {len(text)} characters") from error
        outcome = "refused"
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {str(error)[:300]}") from error
    if _peak_mb() - before > target.memory_mb:
        raise Finding(f"took {_peak_mb() - before:.0f} MB")
    return outcome


def _chain_has(error, kind):
    while error is not None:
        if isinstance(error, kind):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reset_peak_mb():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _peak_mb()


def _peak_mb():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))


# Writes outside of one folder, as Python's audit events tell them; of HDF5's own opens none is for writing.

_allowed = None  # no guard


@contextlib.contextmanager
def _guarded(folder):
    global _allowed
    if not _guarded.__dict__.get("hooked"):
        sys.addaudithook(_audit)  # for the rest of this process
        _guarded.hooked = True
    _allowed = os.path.realpath(folder)
    try:
        yield
    finally:
        _allowed = None


_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod"}


def _audit(event, arguments):
    if _allowed is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not isinstance(path, str | bytes | os.PathLike):
            return
    elif event not in _CHANGES:
        return
    last = 2 if event in ("os.rename", "os.link", "os.symlink") else 1
    folder = next((number for number in arguments[last:] if isinstance(number, int) and number > 2), None)
    start = os.readlink(f"/proc/self/fd/{folder}") if event in ("os.remove", "os.rmdir") and folder else ""
    for path in arguments[last - 1 : last]:
        place = os.path.realpath(os.path.join(start, os.fsdecode(path)))
        if place != _allowed and not place.startswith(_allowed + os.sep) and place != os.devnull:
            raise Finding(f"{event} outside of the output folder: {place}")


def command(main, *arguments):
    """A command's main(), whose exit code 2 and one line at the end of stderr become a ValueError of that line."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            code = exit.code
    if code:
        line = errors.getvalue().rstrip("\n").rpartition("\n")[2]
        if code != 2 or "error: " not in line:
            raise Finding(f"exit code {code} with {errors.getvalue()[-300:]!r}")
        raise ValueError(line)


# Changes of bytes, text and JSON.

INTEGERS = (0, 1, -1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32 + 1, 2**53, 2**62, 2**63 - 1, -(2**63))
TEXTS = ("", " ", "0", "-1", "9" * 5000, "1e999", "nan", "inf", "..", "../../outside.png", "/etc/hostname",
         "a/../../b", "a\0b", "\0", "\n", "\r", "\t", '"', "'", '""', "\\", "\ufeff", "\udc80", "\u202e\x1b[31m",
         "é\u0301", "x" * 300, "x" * 200_000, "@", "--", "#", "%s", "{}", "%", ",", ";", "$\\frac$", "train", "🂡")
VALUES = (None, True, False, 0, -1, 0.5, 2**31, 2**63, -(2**64), 10**400, 1e308, float("nan"), float("inf"), [], {},
          [[]], [None], {"": 0}, "DEEP", "DIGITS", *TEXTS)


def change_bytes(random, path):
    """Flip, overwrite, insert, cut, repeat at random places of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 4)):
        place = random.randrange(len(content) + 1)
        some = random.choice((1, 2, 4, 8, 64, 1000))
        kind = random.randrange(7)
        if kind == 0 and place < len(content):
            content[place] ^= 1 << random.randrange(8)
        elif kind == 1:
            content[place : place + 1] = bytes([random.choice((0, 1, 127, 128, 255, random.randrange(256)))])
        elif kind == 2:
            width, order = random.choice((2, 4, 8)), random.choice(("little", "big"))
            number = random.choice(INTEGERS) % 256**width
            content[place : place + width] = number.to_bytes(width, order)
        elif kind == 3:
            content[place:place] = bytes(random.randrange(256) for _ in range(min(some, 8)))
        elif kind == 4:
            del content[place : place + some]
        elif kind == 5:
            content[place:place] = content[place : place + some]
        elif random.randrange(4) == 0:
            del content[place:]
    path.write_bytes(content)


def change_text(random, path):
    """Odd words and repeated, missing, exchanged lines in a text."""
    lines = path.read_bytes().split(b"\n")
    for _ in range(random.randint(1, 3)):
        number = random.randrange(len(lines))
        line, kind = lines[number], random.randrange(6)
        text = random.choice(TEXTS).encode(errors="surrogateescape")
        place = random.randrange(len(line) + 1)
        if kind == 0:
            lines[number] = line[:place] + text + line[place:]
        elif kind == 1:
            lines[number] = text
        elif kind == 2:
            separator = random.choice((b",", b" ", b"=", b"\t"))
            words = line.split(separator)
            words[random.randrange(len(words))] = text
            lines[number] = separator.join(words)
        elif kind == 3 and len(lines) > 1:
            del lines[number]
        elif kind == 4:
            lines.insert(number, lines[random.randrange(len(lines))])
        else:
            mixed = line[:1000]  # hypothesis draws no longer samples
            lines[number] = bytes(random.sample(list(mixed), len(mixed))) + line[1000:]
    path.write_bytes(b"\n".join(lines))


def change_json(random, value, changes=2):
    """The text of a JSON value with some of its parts replaced, renamed, left out or repeated."""
    for _ in range(random.randint(1, changes)):
        owner, key = None, None
        inside = value
        while isinstance(inside, dict | list) and inside and (owner is None or random.randrange(4)):
            owner, key = inside, random.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
            inside = owner[key]
        kind = random.randrange(6)
        if owner is None:
            value = random.choice(VALUES)
        elif kind == 0:
            del owner[key]
        elif kind == 1 and isinstance(owner, dict):
            owner[random.choice(TEXTS)] = owner.pop(key)
        elif kind == 2 and isinstance(owner, list):
            owner.insert(key, inside)
        elif kind == 3 and isinstance(inside, int):
            owner[key] = random.choice(INTEGERS)
        else:
            owner[key] = random.choice(VALUES)
    if random.randrange(20) == 0:
        value = "DEEP"
    return (json.dumps(value).replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
            .replace('"DIGITS"', "9" * 5000))


def change_json_file(random, path):
    if random.randrange(3) == 0:
        random.choice((change_bytes, change_text))(random, path)
    else:
        path.write_text(change_json(random, json.loads(path.read_text())))


def one_of(random, folder, pattern="*"):
    return random.choice(sorted(path for path in folder.rglob(pattern) if path.is_file()))


# Images.


def make_images(folder):
    """One of every kind, 9 × 7."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    color = Image.fromarray(pixels)
    grey, palette, alpha = color.convert("L"), color.convert("P"), color.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    blobs = {"exif": exif, "icc_profile": b"profile" * 9}
    frames = {"save_all": True, "append_images": [color.rotate(90), color], "duration": 3}
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
    whole, real = Image.fromarray(pixels[..., 0].astype(np.int32)), Image.fromarray(pixels[..., 0].astype(np.float32))
    for number, (image, kind, options) in enumerate([
            (color, "png", blobs), (deep, "png", {}), (palette, "png", {"transparency": 3}), (alpha, "png", frames),
            (grey.convert("1"), "png", {}), (color, "jpeg", blobs), (grey, "jpeg", {"progressive": True}),
            (color.convert("CMYK"), "jpeg", {}), (color, "webp", blobs), (alpha, "webp", {"lossless": True}),
            (color, "webp", frames), (color, "bmp", {}), (palette, "bmp", {}), (palette, "gif", {"transparency": 1}),
            (color, "gif", frames), (color, "tiff", blobs), (deep, "tiff", {}),
            (whole, "tiff", {}), (real, "tiff", {}), (color.convert("YCbCr"), "tiff", {"compression": "jpeg"}),
            *((color, "tiff", {"compression": name})
              for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
            (grey.convert("1"), "tiff", {"compression": "group4"}), (color, "tiff", frames)]):
        image.save(folder / f"{number:02d}.{kind}", kind.upper(), **options)


def change_image(random, folder):
    """Change one image, and let the checksums of a PNG be right again; the others go."""
    path = one_of(random, folder)
    for other in folder.iterdir():
        if other != path:
            other.unlink()
    change_bytes(random, path)
    if path.suffix == ".png" and random.randrange(4):
        path.write_bytes(with_checksums(path.read_bytes()))


def with_checksums(png):
    result, place = bytearray(png[:8]), 8
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        chunk = png[place + 4 : place + 8 + length]
        result += png[place : place + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        place += 12 + length
    return bytes(result + png[place:])


def read_images(folder, out):
    for path in sorted(folder.iterdir()):
        for channels in 1, 3:
            pixels = images.decode(path.read_bytes(), 16, channels, max_pixels=2**22)
            assert pixels.shape == (channels, 16, 16) and pixels.dtype == np.uint8
        for check in CHECKS:
            try:
                check_image(path.read_bytes(), 2**22, check)
            except ValueError as error:
                raise Finding(f"--check {check} refuses what decodes: {error}") from error
        image = images.open_image(path.read_bytes(), max_pixels=2**22)
        for kind in encoding.FORMATS:
            images.open_image(encoding.Encoding(5, kind).apply(image, b""))


# Packs.


def make_tree(folder):
    for number in range(12):
        path = folder / ("test" if number % 4 == 3 else "train") / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(path)


def make_packs(folder):
    make_tree(folder / "tree")
    command(data_tools.pack.main, folder / "tree", folder / "packs", "--workers", 0, "--shard-mb", "3e-4")
    shutil.rmtree(folder / "tree")


def change_packs(random, folder):
    path = one_of(random, folder, "*.h5")
    if random.randrange(2):
        with contextlib.suppress(Exception), h5py.File(path, "r+") as file:  # h5py refuses some of the changes
            change_hdf5(random, file)
    else:
        change_bytes(random, path)
    if path.name != pack.INDEX_FILE:  # so that the first look does not refuse it
        with h5py.File(path.with_name(pack.INDEX_FILE), "r+") as index:
            number = int(path.stem.rpartition("-")[2])
            index["shard_file_bytes"][number] = path.stat().st_size


def change_hdf5(random, file):
    """Another attribute, number, type, shape, storage, or a link in place of a dataset."""
    kind = random.randrange(4)
    if kind == 0:
        name = random.choice(sorted(file.attrs))
        del file.attrs[name]
        value = random.choice((
            *map(np.int64, INTEGERS), np.uint64(2**64 - 1), np.int8(1), np.float64(1), True, "", "xc-pack", "x" * 999,
            b"a\0b", *map(np.bytes_, (b"x" * 60_000, b"xc-pack", b"a\nb", b"\xff\xfe")), np.array(["a"], object),
            np.arange(3), [[1]], h5py.Empty("i8"), h5py.Empty("S3"), np.zeros((), "i4,f8"), None))
        if value is not None:
            file.attrs[name] = value
        return
    name = random.choice(sorted(file))
    values = file[name][...]
    if kind == 1:
        place = random.randrange(len(values))
        limits = np.iinfo(values.dtype)
        values[place] = min(max(random.choice((*INTEGERS, place)), limits.min), limits.max)
        file[name][...] = values
        return
    del file[name]
    if kind == 2:
        count = len(values)
        shape = random.choice(((), (0,), (1,), (count + 1,), (count, 1), (2**20,), (2**60,), (2**63 - 1,)))
        dtype = random.choice((values.dtype, ">i8", "u8", "f4", "S3", h5py.string_dtype(), h5py.vlen_dtype("i4"),
                               "i4,f8", h5py.enum_dtype({"a": 1}), h5py.ref_dtype, "V8", "?", "c8", "(2,)i8"))
        file.create_dataset(name, shape, dtype)
        return
    odd = random.randrange(7)
    other = file.filename + ".other"
    if odd == 0:
        file[name] = random.choice((h5py.SoftLink(f"/{name}"), h5py.SoftLink("/"), h5py.SoftLink("/" + "x" * 3000),
                                    h5py.ExternalLink("/etc/hostname", "/"), h5py.ExternalLink(file.filename, name)))
    elif odd == 1:
        sheet = h5py.VirtualLayout(values.shape, values.dtype)
        sheet[:] = h5py.VirtualSource(random.choice((other, ".", "/dev/zero")), name, values.shape, values.dtype)
        file.create_virtual_dataset(name, sheet)
    elif odd == 2:
        place = random.choice((other, "/etc/hostname", "/dev/zero", "../../outside"))
        file.create_dataset(name, values.shape, values.dtype, external=[(place, 0, values.nbytes)])
    elif odd == 3:
        file.create_dataset(name, data=values, chunks=True, compression="gzip", fletcher32=True)
    elif odd == 4:
        file[name] = file
    elif odd == 5:
        file[name] = np.dtype("i8")
    else:
        file.create_group(name)[name] = values


def read_packs(folder, out):
    for one in pack.open_splits(folder / "packs").values():
        some = min(300, len(one))
        one.class_names(0, min(1000, one.num_classes))
        one.labels(0, some)
        split = pack_split.Images(one, 1, 8)
        split.examples(np.arange(some))
        split.order(0).records(0, 3)
        one.verify()
        one.close()
    command(data_tools.show.main, folder / "packs", "--verify", "--json")


def make_exported(folder):
    import matplotlib.pyplot  # noqa: F401  its first import makes folders of its own

    make_packs(folder)


def change_exported(random, folder):
    """As change_packs, or other class names; no digest is looked at but by --verify."""
    if random.randrange(3) == 0:
        change_packs(random, folder)
        return
    parts = (*(text for text in TEXTS if "\udc80" not in text), "a", "/", "/", ".", "%", "000000000.png", "list.csv",
             "é" * 90)
    with h5py.File(folder / "packs/train" / pack.INDEX_FILE, "r+") as index:
        count = index.attrs["num_classes"]
        names = ["".join(random.choices(parts, k=random.randint(0, 4))).encode() for _ in range(count)]
        del index["class_names"], index["class_name_offsets"]
        index["class_names"] = np.frombuffer(b"".join(names), np.uint8)
        index["class_name_offsets"] = np.cumsum([0, *map(len, names)], dtype=np.int64)


def read_exported(folder, out):
    refused = None
    for number, (main, *arguments) in enumerate((
            (data_tools.export.main, folder / "packs", out / "tree", "--to", "folder"),
            (data_tools.export.main, folder / "packs/train", out / "flat", "--to", "folder", "--classes", "0-1"),
            (data_tools.export.main, folder / "packs", out / "tars", "--to", "webdataset"),
            (data_tools.split.main, folder / "packs/train", out / "split", "--test", "0.3"),
            (data_tools.show.main, folder / "packs/train", "--json", "--sheet", out / "sheet.png"))):
        try:
            command(main, *arguments)
        except ValueError as error:
            refused = error
            assert number == 4 or not os.path.lexists(arguments[1])
    if refused:
        raise refused


# What is packed: trees and manifests.


def change_tree(random, folder):
    """Odd names, links, pipes and images that are none."""
    folders = sorted(path for path in folder.rglob("*") if path.is_dir())
    for _ in range(random.randint(1, 4)):
        images = sorted(path for path in folder.rglob("*") if path.is_file())
        if not images:
            return
        path, place, kind = random.choice(images), random.choice(folders), random.randrange(9)
        name = random.choice(TEXTS).replace("\0", "").replace("/", "_")[:200] or "x"
        target = os.path.join(place, os.fsdecode(name.encode(errors="surrogateescape")) + random.choice(("", ".png")))
        with contextlib.suppress(OSError):
            if kind == 0:
                os.rename(path, target)
            elif kind == 1:
                os.rename(place, target)
            elif kind == 2:
                os.symlink(random.choice((".", "..", "/", "/etc/hostname", "/dev/zero", "nowhere", target)), target)
            elif kind == 3:
                os.mkfifo(target)
            elif kind == 4:
                Path(target).write_bytes(b"")
            elif kind == 5:
                os.makedirs(os.path.join(target, *("d",) * random.choice((1, 5, 60))), exist_ok=True)
            elif kind == 6:
                change_bytes(random, path)
            elif kind == 7:
                os.link(path, target)
            else:
                shutil.rmtree(place)


def read_tree(folder, out):
    command(data_tools.pack.main, folder, out / "packs", "--workers", 0, "--max-skipped", "50%")
    assert all(one.verify() for one in pack.open_splits(out / "packs").values())


def make_manifest(folder):
    make_tree(folder / "images")
    shutil.copy(folder / "images/train/class0/0.png", folder.parent / "outside.png")  # must not be reached
    with open(folder / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for path in sorted((folder / "images").rglob("*.png")):
            place = path.relative_to(folder)
            rows.writerow([place, place.parts[2], place.parts[1]])


def change_manifest(random, folder):
    random.choice((change_bytes, change_text, change_text))(random, folder / "list.csv")


def read_manifest(folder, out):
    command(data_tools.pack.main, folder / "list.csv", out / "packs", "--workers", 0, "--max-skipped", "50%")
    assert all(one.verify() for one in pack.open_splits(out / "packs").values())


def make_tars(folder):
    """A tar of each of Python's formats, whose headers differ."""
    image = io.BytesIO()
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(image, "PNG")
    for number, form in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        with tarfile.open(folder / f"train-{number}.tar", "w", format=form) as tar:
            for key, label in ("a", b"1"), ("n" * 130 if number else "n", b'{"label": "x"}'), ("d/\xe9", b"1"):
                for suffix, data in ("png", image.getvalue()), ("json" if b"{" in label else "cls", label):
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def change_tar(random, folder):
    """Change bytes, mostly in a header or a label, and let the checksums of the headers be right again."""
    path = one_of(random, folder)
    content = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        members = [(member.offset, member.offset_data) for member in tar]
    for _ in range(random.randint(1, 3)):
        start, data = random.choice(members)
        place = random.choice((start, start + 100, start + 124, start + 156, start + 257, data - 512, data))
        place = min(place + random.randrange(12), len(content) - 1)
        content[place] = random.choice((0, 32, 47, 49, 55, 120, 128, 255, random.randrange(256)))
    for start in {place for pair in members for place in (pair[0], pair[1] - 512)} if random.randrange(4) else ():
        header = content[start : start + 148] + b" " * 8 + content[start + 156 : start + 512]
        content[start + 148 : start + 156] = b"%06o\0 " % sum(header)
    path.write_bytes(content)
    if random.randrange(3) == 0:
        change_bytes(random, path)


def make_rec(folder):
    image, data, places = io.BytesIO(), b"", []
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(image, "PNG")
    for number, labels in enumerate(((3.0, 9.0), (), (), (2.0,), ())):
        content = b"" if number == 0 else image.getvalue()
        record = recordio.IMAGE.pack(len(labels), float(number % 2), number, 0) + struct.pack(
            f"<{len(labels)}f", *labels) + content
        pieces = [record[:40], record[40:]] if number == 4 else [record]
        kinds = (recordio.FIRST, recordio.LAST) if number == 4 else (recordio.WHOLE,)
        places.append(len(data))
        for kind, piece in zip(kinds, pieces, strict=True):
            data += recordio.PART.pack(recordio.MAGIC, kind << 29 | len(piece)) + piece + bytes(-len(piece) % 4)
    (folder / "a.rec").write_bytes(data)
    (folder / "a.idx").write_text("".join(f"{number}\t{place}\n" for number, place in enumerate(places)))


def change_rec(random, folder):
    if random.randrange(4) == 0:
        change_text(random, folder / "a.idx")
        return
    if random.randrange(2):
        (folder / "a.idx").unlink()
    change_bytes(random, folder / "a.rec")


def make_parquet(folder):
    make_tree(folder / "images")
    shutil.copy(folder / "images/train/class0/0.png", folder.parent / "outside.png")  # must not be reached
    paths = sorted((folder / "images").rglob("*.png"))
    places = [path.relative_to(folder) for path in paths]
    labels = [place.parts[2] for place in places]
    columns = {"path": [str(place) for place in places], "split": [place.parts[1] for place in places]}
    for name, label, more in (("paths", labels, columns), ("bytes", pyarrow.array(labels).dictionary_encode(),
                                                           {"image": [path.read_bytes() for path in paths]})):
        table = pyarrow.table({"label": label, **more})
        pyarrow.parquet.write_table(table, folder / f"{name}.parquet", row_group_size=5, compression="snappy")


def change_parquet(random, folder):
    """Change one of the files; the other goes."""
    path = one_of(random, folder, "*.parquet")
    for other in folder.glob("*.parquet"):
        if other != path:
            other.unlink()
    change_bytes(random, path)


def read_source(kind, pattern=None):
    """The reader of a source of images: of the files that match a pattern, None: of the whole folder."""

    def read(folder, out):
        for number, source in enumerate(sorted(folder.glob(pattern)) if pattern else [folder]):
            packs = out / f"packs{number}"
            command(data_tools.pack.main, source, packs, "--from", kind, "--workers", 0, "--max-skipped", "50%")
            assert all(one.verify() for one in pack.open_splits(packs).values())

    return read


# Checkpoints, run folders and what is in them.

CLASSES, WIDTH = 23, 4
IDENTITY = {"seed": 0, "classes_digest": "abc"}
SETTINGS = {
    "full": ("--head-momentum", "0.9"),
    "knn": ("--head", "knn", "--neighbors", "3"),
    "refresh": ("--head", "knn", "--neighbors", "3", "--graph", "approx", "--graph-angle", "5"),
    "selective": ("--head", "selective"),
    "dgc": ("--exchange", "dgc"),
}


def a_state(flags, begun):
    """A state of training; `begun`: with all that a run has after some steps."""
    cfg = config.parse(["--data", "unused", "--out", "unused", "--feature-dim", str(WIDTH), "--active-classes", "12",
                        "--global-batch", "4", *flags])
    world = World()
    with contextlib.redirect_stderr(io.StringIO()):  # warnings of --exchange dgc on one rank
        net = backbone.build("mlp", (6,), WIDTH, 0, world)
        head = heads.build(cfg, CLASSES, world)
        gradients = exchange.build(net, world, cfg)
    body = backbone_optimizer(net, cfg, gradients.keeps_momentum)
    if begun:
        head.refresh(0, due=True)
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        body.step()
    return checkpoint.State(net, body, head, RowSGD(head, cfg.head_momentum, 0.0), gradients, NoiseScale(), Losses())


def make_runs(folder):
    for name, flags in SETTINGS.items():
        writer = saver.Saver(folder / name, World(), IDENTITY, keep=2)
        for step in 3, 4:
            writer.save(a_state(flags, begun=True), schedule.Position(step, 7 * step, 7), 0.5)
        writer.finish(last=True)


def change_meta(random, folder):
    """Half of the time with a checksum that is right, so that what is behind it is met."""
    path = one_of(random, _only_one(random, folder), "meta.json")
    change_json_file(random, path)
    if random.randrange(2):
        with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
            layout.write_meta(path.parent, json.loads(path.read_text()))


def change_tables(random, folder):
    """Change a file of tensors, and let meta.json say that it is as it was written."""
    run = _only_one(random, folder)
    path = one_of(random, run, "*.safetensors")
    kind = random.randrange(4)
    if kind == 0:
        change_bytes(random, path)
    elif kind == 1:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = change_json(random, json.loads(content[8 : 8 + length])).encode()
        length = len(header) if random.randrange(8) else random.choice(INTEGERS) % 2**64
        path.write_bytes(length.to_bytes(8, "little") + header + content[8 + length :])
    elif kind == 2:
        change_tensors(random, path)
    else:
        others = ("rows-000000000000-999999999999", "neighbors-x", "index-000000000000-000000000001",
                  "index-000000000023-000000000000", "residuals-999999-000000")
        name = random.choice((*(p.name for p in path.parent.glob("*.safetensors")),
                              *(f"{other}.safetensors" for other in others)))
        if name != path.name:
            (shutil.copy if random.randrange(2) else os.rename)(path, path.with_name(name))
    meta_path = path.with_name("meta.json")
    if meta_path.exists():
        meta = json.loads(meta_path.read_text())
        meta["files"] = {p.name: {"bytes": p.stat().st_size, "crc32": zlib.crc32(p.read_bytes())}
                         for p in path.parent.glob("*.safetensors") if layout._FILE.fullmatch(p.name)}
        layout.write_meta(path.parent, meta)


def change_tensors(random, path):
    tensors = load_file(path)
    for _ in range(random.randint(1, 2)):
        name = random.choice(sorted(tensors))
        tensor, kind = tensors[name].clone(), random.randrange(6)
        if kind == 0:
            del tensors[name]
            other = random.choice((*TEXTS, "u.0", "v.-5", "u.99999999999", "x.y", "a.b.c"))
            tensors[other.encode(errors="replace").decode()] = tensor
        elif kind == 1:
            shape = random.choice(((), (0,), (0, 0), (1,), (1, 1), (5,), (2**20,), (*tensor.shape, 1),
                                   tensor.shape[1:]))
            tensors[name] = tensor.new_zeros(shape)
        elif kind == 2:
            types = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool)
            tensors[name] = tensor.to(random.choice(types))
        elif tensor.numel():
            flat = tensor.view(-1)
            number = random.choice((*INTEGERS, 3, 23, 24))
            if tensor.is_floating_point():
                number = random.choice((float("nan"), float("inf"), -1.0, 1e38))
            elif tensor.dtype != torch.bool:
                limits = torch.iinfo(tensor.dtype)
                number = min(max(number, limits.min), limits.max)
            place = random.randrange(len(flat))
            flat[place : place + random.choice((1, len(flat)))] = number
            tensors[name] = tensor
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)


def _only_one(random, folder):
    """Choose one of the runs; the others go."""
    runs = sorted(folder.iterdir())
    chosen = random.choice(runs)
    for run in runs:
        if run != chosen:
            shutil.rmtree(run)
    return chosen


def read_run(folder, out):
    for run in sorted(folder.iterdir()):
        state = a_state(SETTINGS[run.name], begun=False)
        with contextlib.redirect_stderr(io.StringIO()):
            newest = newest.to_resume("auto", run, World())
        with World().agreed():
            checkpoint.load(newest, state, IDENTITY)
        state.head.select(torch.tensor([0, 5, 22]), 3)  # looks into the graph
        checkpoint.files_of(state, World())  # what was read can be written


def make_metrics(folder):
    log = metrics.Metrics(folder, 0, schedule.Position(), 9, 63)
    for step in range(1, 5):
        log.log(schedule.Position(step, 7 * step, 7), loss=1 / step)
    log.close()
    shutil.rmtree(folder / "tensorboard")


def change_metrics(random, folder):
    path = folder / "metrics.jsonl"
    if random.randrange(2):
        random.choice((change_bytes, change_text))(random, path)
    else:
        lines = path.read_text().splitlines()
        number = random.randrange(len(lines))
        lines[number] = change_json(random, json.loads(lines[number]))
        path.write_text("\n".join(lines))


def read_metrics(folder, out):
    shutil.copy(folder / "metrics.jsonl", out)
    with metrics._open_after(out / "metrics.jsonl", 3) as lines:
        lines.write("{}\n")


# Settings.


def make_arguments(folder):
    cfg = config.parse(["--data", "some packs", "--out", "a run", "--lr-drops", "0.1", "0.2", "--schedule", "step"])
    (folder / "run.args").write_text(config.as_arguments(cfg) + "--epochs 3  # a remark\n--head knn --seed 5\n")


def change_arguments(random, folder):
    path, kind = folder / "run.args", random.randrange(8)
    if kind == 0:
        with open(path, "a") as file:
            file.write(f"@{random.choice((path, folder, '/dev/zero', 'nowhere', folder / 'other', ''))}\n")
        (folder / "other").write_text(f"@{path}\n")
    elif kind == 1:
        path.write_text("".join(f"--{random.choice(FLAGS)} {random.choice((*INTEGERS, *'0123', '1e9', 'x'))}\n"
                                for _ in range(3)), errors="surrogateescape")
    else:
        random.choice((change_bytes, change_text))(random, path)


FLAGS = [name.replace("_", "-") for name in config.Config.__dataclass_fields__]


def read_arguments(folder, out):
    cfg = config.parse([f"@{folder / 'run.args'}"])
    with World().agreed():
        run_folder.check(cfg)
        schedule.Schedule.of(cfg, 1000, 1)
    (out / "again.args").write_text(config.as_arguments(cfg), errors="surrogateescape")


def make_synth(folder):
    (folder / "description").write_text("synth:classes=50,dim=16,levels=2,branching=5,spread=0.5,noise=0.1,examples=3,"
                                        "test=9,seed=7,images=1")


def change_synth(random, folder):
    path = folder / "description"
    if random.randrange(2):
        random.choice((change_text, change_bytes))(random, path)
    else:
        pairs = path.read_text().split(",")
        place = random.randrange(len(pairs))
        key = pairs[place].partition("=")[0]
        pairs[place] = f"{key}={random.choice((*INTEGERS, 0.5, 16, 100, 4096, 10**8, 1e-300, 'nan'))}"
        path.write_text(",".join(pairs))


def read_synth(folder, out):
    text = (folder / "description").read_bytes().decode(errors="surrogateescape")
    cfg = config.parse([f"--data={text}", "--out", "unused"])
    if not cfg.data.startswith(synth.PREFIX):
        raise UserError("not a description")
    for split in data.open_splits(cfg).values():
        split.examples(split.order(0).records(0, 3))


# Pictures of steps, and fonts.


def make_timeline(folder):
    import matplotlib.pyplot  # noqa: F401  its first import makes folders of its own

    events = [{"ph": "M", "pid": 0, "name": "process_name", "args": {"name": "rank 0"}}]
    for step in range(3):
        for lane, name, tid in (("step", f"step {step}", 0), ("compute", "forward", 1000), ("network", "sum", 2000)):
            events.append({"ph": "X", "pid": 0, "tid": tid, "cat": lane, "name": name, "ts": 1e3 * step, "dur": 9e2})
    (folder / "timeline.json").write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def change_timeline(random, folder):
    change_json_file(random, folder / "timeline.json")


def read_timeline(folder, out):
    command(data_tools.show.main, folder / "timeline.json", "--json")


def make_fonts(folder):
    from fontTools import subset, ttLib
    from matplotlib import get_data_path

    for name, text in ("DejaVuSans", "Ab%é"), ("STIXGeneral", "xyz"):
        font, some = ttLib.TTFont(f"{get_data_path()}/fonts/ttf/{name}.ttf"), subset.Subsetter()
        some.populate(text=text)
        some.subset(font)
        font.save(folder / f"{name}.ttf")
    assert len(font_faces.find_faces([folder])[0]) == 2


def change_fonts(random, folder):
    path = one_of(random, folder)
    if random.randrange(10):
        change_bytes(random, path)
    else:
        path.unlink()
        random.choice((os.mkfifo, os.mkdir, lambda name: os.symlink("/dev/zero", name)))(path)


def read_fonts(folder, out):
    faces, _ = font_faces.find_faces([folder])
    for face in faces:
        font = font_faces.open_face(face.path, face.index, 64)
        for code in face.code_points[:20]:
            font_faces.draw(font, chr(code), 32)


TARGETS = {
    "packs": Target(make_packs, change_packs, read_packs, (ValueError,)),
    "exported": Target(make_exported, change_exported, read_exported, (ValueError,)),
    "images": Target(make_images, change_image, read_images, (ValueError,)),
    "tree": Target(make_tree, change_tree, read_tree, (ValueError,)),
    "manifest": Target(make_manifest, change_manifest, read_manifest, (ValueError,)),
    "webdataset": Target(make_tars, change_tar, read_source("webdataset"), (ValueError,)),
    "recordio": Target(make_rec, change_rec, read_source("recordio", "*.rec"), (ValueError,)),
    "parquet": Target(make_parquet, change_parquet, read_source("parquet", "*.parquet"), (ValueError,)),
    "repack": Target(make_packs, change_packs, read_source("pack", "packs"), (ValueError,)),
    "meta": Target(make_runs, change_meta, read_run, (ValueError,)),
    "tables": Target(make_runs, change_tables, read_run, (ValueError,)),
    "metrics": Target(make_metrics, change_metrics, read_metrics, ()),
    "arguments": Target(make_arguments, change_arguments, read_arguments, (ValueError,)),
    "synth": Target(make_synth, change_synth, read_synth, (UserError,)),
    "timeline": Target(make_timeline, change_timeline, read_timeline, (ValueError,)),
    "fonts": Target(make_fonts, change_fonts, read_fonts, (), font_faces.FONT_BYTES >> 19),
}


class Cases:
    """Cases of one target in a folder: `base` holds the files as they were made, `case` the last changed copy."""

    def __init__(self, name, folder):
        self.target, self.base, self.case = TARGETS[name], folder / "base", folder / "case"
        self.base.mkdir(parents=True)
        (self.base / "in").mkdir()
        self.target.make(self.base / "in")
        shutil.copytree(self.base, self.case, symlinks=True)
        if attempt(self.target, self.case) != "accepted":
            raise AssertionError(f"{name}: the files as they were made are not accepted")

    def run(self, random):
        """The outcome of a new case."""
        shutil.rmtree(self.case)
        shutil.copytree(self.base, self.case, symlinks=True)
        self.target.change(random, self.case / "in")
        return attempt(self.target, self.case)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--case", type=Path, help="a saved case")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=10, help="how long to go on")
    parser.add_argument("--work", type=Path, help="a new folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        with tempfile.TemporaryDirectory() as folder:
            Cases(args.target, Path(folder) / "made")  # imports what makes folders of its own
            subprocess.run(["cp", "-a", args.case / "in", folder], check=True)
            print(attempt(TARGETS[args.target], Path(folder)))
        return
    cases, number, end = Cases(args.target, args.work), args.seed, time.monotonic() + args.seconds
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, resource.RLIM_INFINITY))
    while time.monotonic() < end:
        print(f"case {number}", flush=True)
        try:
            print(cases.run(random.Random(number)), flush=True)
        except Finding as finding:
            traceback.print_exc()
            print("finding " + " ".join(str(finding).split()), flush=True)
            return
        number += 1
    print("end", flush=True)


if __name__ == "__main__":
    main()
