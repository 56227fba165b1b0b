"""Packs, and what is made of them."""

import contextlib
import os
import shutil

import h5py
import numpy as np

import data_tools.export
import data_tools.pack
import data_tools.show
import data_tools.split
from tests.fuzz.case import command
from tests.fuzz.changes import INTEGERS, TEXTS, change_bytes, one_of
from tests.fuzz.images import make_tree
from xc.data import pack
from xc.data import pack_split as data


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
        split = data.PackSplit(one, 1, 8)
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
