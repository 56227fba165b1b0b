"""What is packed: tables, tar shards, RecordIO, Parquet."""

import csv
import io
import json
import shutil
import struct
import tarfile

import numpy as np
import pyarrow.parquet
from PIL import Image

import data_tools.pack
from data_tools.sources import recordio
from tests.fuzz.case import command
from tests.fuzz.changes import change_bytes, change_text, one_of
from tests.fuzz.images import make_tree
from xc.data import pack


def make_manifest(folder):
    make_tree(folder / "images")
    shutil.copy(folder / "images/train/class0/0.png", folder.parent / "outside.png")  # must not be reached
    with open(folder / "list.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["path", "label", "split"])
        for path in sorted((folder / "images").rglob("*.png")):
            place = path.relative_to(folder)
            rows.writerow([place, place.parts[2], place.parts[1]])


    with open(folder / "list.csv", newline="") as file, open(folder / "list.jsonl", "w") as objects, open(
            folder / "list.lst", "w") as lines:
        for number, row in enumerate(csv.DictReader(file)):
            objects.write(json.dumps(row) + "\n")
            if row["split"] == "train":  # a list has no column for it
                lines.write(f"{number}\t{number % 3}.0\t{row['path']}\n")


def change_manifest(random, folder):
    """Change one of the tables; the others go."""
    path = one_of(random, folder, "list.*")
    for other in folder.glob("list.*"):
        if other != path:
            other.unlink()
    random.choice((change_bytes, change_text, change_text))(random, path)


def read_manifest(folder, out):
    for path in folder.glob("list.*"):
        packs = out / path.suffix
        command(data_tools.pack.main, path, packs, "--workers", 0, "--max-skipped", "50%")
        assert all(one.verify() for one in pack.open_splits(packs).values())


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
