"""Packs: made of any bytes, read in full, changed at any place."""

import hashlib
import os
import shutil
import zlib
from pathlib import Path

import h5py
import numpy as np

from data_tools.packing.class_table import ClassTable
from data_tools.packing.writer import PackWriter


def write_pack(folder, names, images, shard_bytes=1000):
    """A pack of [(bytes, label)] that need not be images, nor classes that data_tools.pack would take."""
    writer = PackWriter(folder, shard_bytes, np.zeros(len(names), np.int64))
    for image, label in images:
        writer.add(image, zlib.crc32(image), label)
    writer.end_shard()
    table = ClassTable(f"{folder}.classes", (name.encode() for name in names))
    writer.write_index(table, source="made", seed=0, skipped=0)
    shutil.rmtree(f"{folder}.classes")
    return folder


def records(pack):
    """Sorted (bytes, label, class name) of all records."""
    images, labels = pack.read(np.arange(len(pack)))
    return sorted((image, int(label), pack.class_name(label)) for image, label in zip(images, labels, strict=True))


def contents(pack):
    """{image bytes: class name} by reading everything."""
    images, labels = pack.read(np.arange(len(pack)))
    assert len(set(images)) == len(images)
    return {image: pack.class_name(label) for image, label in zip(images, labels, strict=True)}


def file_hashes(folder):
    """{path: SHA-256} of all files below a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def edit(pack, file, change):
    """Apply change(h5py file) to a file of a pack, and let the index agree with the new sizes."""
    with h5py.File(pack / file, "r+") as opened:
        change(opened)
    with h5py.File(pack / "index.h5", "r+") as index:
        for number in range(len(index["shard_file_bytes"])):
            index["shard_file_bytes"][number] = os.path.getsize(pack / f"shard-{number:05d}.h5")


def replace(name, make):
    """A change that makes dataset `name` anew: make(file, name, its old values)."""

    def change(file):
        values = file[name][...]
        del file[name]
        make(file, name, values)

    return change


def put(name, place, value):
    """A change that sets one element of dataset `name`."""

    def change(file):
        file[name][place] = value

    return change


def link(kind):
    """For `replace`: the old values, but stored elsewhere."""

    def make(file, name, values):
        other = Path(file.filename).parent.parent / "other.h5"
        with h5py.File(other, "w") as target:
            target[name] = values
        if kind == "external":
            file[name] = h5py.ExternalLink(str(other), name)
        elif kind == "soft":
            file["elsewhere"] = values
            file[name] = h5py.SoftLink("/elsewhere")
        elif kind == "virtual":
            source = h5py.VirtualSource(str(other), name, values.shape, values.dtype)
            sheet = h5py.VirtualLayout(values.shape, values.dtype)
            sheet[:] = source
            file.create_virtual_dataset(name, sheet)
        elif kind == "stored elsewhere":
            raw = other.with_suffix(".raw")
            raw.write_bytes(values.tobytes())
            file.create_dataset(name, values.shape, values.dtype, external=[(str(raw), 0, values.nbytes)])
        elif kind == "chunked":
            file.create_dataset(name, data=values, chunks=True)
        assert np.array_equal(file[name][...], values)  # who follows it gets the values

    return make


def add_weights(pack):
    """Give each record its own number as weight; returns the number of records."""
    with h5py.File(pack / "index.h5", "r+") as index:
        index.attrs["has_weights"] = np.int64(1)
        ends = np.cumsum(index["shard_records"])
    for number, shard in enumerate(np.split(np.arange(ends[-1], dtype=np.float32), ends[:-1])):
        edit(pack, f"shard-{number:05d}.h5", lambda f, shard=shard: f.create_dataset("weights", data=shard))
    return ends[-1]
