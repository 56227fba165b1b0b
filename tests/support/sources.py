"""Sources of images of every kind that data_tools.pack reads."""

import io
import json
import struct
import tarfile

import pyarrow as pa
import pyarrow.parquet

from data_tools.sources import recordio
from tests.support.commands import run_pack


def write_tar(path, members):
    """Write a tar of members [(name or TarInfo, bytes)]; returns its path."""
    with tarfile.open(path, "w") as tar:
        for member, data in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def odd(name, kind=None, **fields):
    """A TarInfo with any type and fields."""
    member = tarfile.TarInfo(name)
    member.type = kind or tarfile.REGTYPE
    for field, value in fields.items():
        setattr(member, field, value)
    return member


def samples(files, first=0):
    """Members of a tar with the images of {path: bytes}, labels alternately as .cls and .json."""
    for number, (name, data) in enumerate(files.items(), first):
        label = name.rpartition("/")[0]
        yield f"s/{number:06d}.png", data
        if number % 2:
            yield f"s/{number:06d}.cls", label.encode()
        else:
            yield f"s/{number:06d}.json", json.dumps({"label": int(label), "more": [1]}).encode()


def record_part(kind, data):
    """One part of a RecordIO record: header, data, padding."""
    return recordio.PART.pack(recordio.MAGIC, kind << 29 | len(data)) + data + bytes(-len(data) % 4)


def written(record):
    """A record in its parts, cut where the magic number stands at a multiple of 4, as mxnet does."""
    pieces, start = [], 0
    for place in range(0, len(record) - 3, 4):
        if record[place : place + 4] == recordio.MAGIC:
            pieces.append(record[start:place])
            start = place + 4
    pieces.append(record[start:])
    if len(pieces) == 1:
        return record_part(recordio.WHOLE, record)
    kinds = [recordio.FIRST] + [recordio.MIDDLE] * (len(pieces) - 2) + [recordio.LAST]
    return b"".join(map(record_part, kinds, pieces))


def image_record(label, image, number=0):
    """A record of an image with one label or a list of labels."""
    if isinstance(label, list):
        return recordio.IMAGE.pack(len(label), 0.0, number, 0) + struct.pack(f"<{len(label)}f", *label) + image
    return recordio.IMAGE.pack(0, label, number, 0) + image


def write_rec(path, records, index=True):
    """Write a .rec of records, and its .idx beside it; returns the path."""
    places, data = [], b""
    for record in records:
        places.append(len(data))
        data += written(record)
    path.write_bytes(data)
    if index:
        path.with_suffix(".idx").write_text("".join(f"{i}\t{place}\n" for i, place in enumerate(places)))
    return path


def write_parquet(to, **columns):
    """Write a Parquet file with small row groups; returns its path."""
    pyarrow.parquet.write_table(pa.table(columns), to, row_group_size=7)
    return to


SOURCES = ["folder", "manifest", "parquet of paths", "parquet of bytes", "parquet of structs", "webdataset", "recordio",
           "pack"]


def make_source(kind, folder, files):
    """A source of one kind with the images of {class/name: bytes}."""
    folder.mkdir(exist_ok=True)
    labels = [name.rpartition("/")[0] for name in files]
    if kind == "folder":
        for name, data in files.items():
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes(data)
        return folder / "tree"
    if kind == "manifest":
        root = make_source("folder", folder, files)
        rows = zip(["path", *files], ["label", *labels], strict=True)
        (root / "list.tsv").write_text("".join(f"{path}\t{label}\n" for path, label in rows))
        return root / "list.tsv"
    if kind == "parquet of paths":
        root = make_source("folder", folder, files)
        return write_parquet(root / "list.parquet", path=list(files), label=labels)
    if kind == "parquet of bytes":
        return write_parquet(folder / "a.parquet", image=list(files.values()), label=[int(label) for label in labels])
    if kind == "parquet of structs":
        images = [{"bytes": data, "path": None} for data in files.values()]
        return write_parquet(folder / "a.parquet", image=images, label=pa.array(labels).dictionary_encode())
    if kind == "webdataset":
        (folder / "tars").mkdir()
        names = list(files)
        for shard in range(3):
            some = {name: files[name] for name in names[shard::3]}
            write_tar(folder / "tars" / f"{shard}.tar", samples(some))
        return folder / "tars"
    if kind == "recordio":
        images = [image_record(float(label), data) if i % 2 else image_record([float(label), 7.5], data)
                  for i, (label, data) in enumerate(zip(labels, files.values(), strict=True))]
        first = image_record([float(len(images)), 99.0], b"")
        return write_rec(folder / "train.rec", [first, *images, image_record([1.0, 3.0], b"")])
    assert kind == "pack"
    run_pack(make_source("folder", folder, files), folder / "source.pack", "--seed", 5, "--shard-mb", 1e-3)
    return folder / "source.pack"


def table(path, columns):
    """Write {name: values} as CSV, JSON Lines or Parquet, by the suffix of the path; returns the path."""
    rows = list(zip(*columns.values(), strict=True))
    if path.suffix == ".parquet":
        return write_parquet(path, **columns)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    else:
        path.write_text("".join(",".join(map(str, row)) + "\n" for row in [list(columns), *rows]))
    return path


def skipped_rows(pack):
    """[[path, reason]] of the skipped images of a pack."""
    return [line.split("\t") for line in (pack / "skipped.tsv").read_text().splitlines()[1:]]
