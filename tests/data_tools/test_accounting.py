"""Nothing is lost: every image of a source is packed, skipped or left out, in exactly one of these, whatever it is."""

import io
import json
import random
from collections import Counter, defaultdict

import pyarrow as pa
import pytest
from PIL import Image

from tests.support.commands import run_pack
from tests.support.images import picture
from tests.support.rows import count_records
from tests.support.sources import image_record, skipped_rows, write_parquet, write_rec, write_tar

SUFFIXES = [".png", ".PNG", ".jpg", ".JPEG", ".dat", "", ".v2.png", ".jfif"]
NEVER_DATA = [".DS_Store", "Thumbs.db", "README.md", "LICENSE", "._0.png", "desktop.ini"]
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"
KINDS = ["folder", "split folder", "csv", "jsonlines", "list", "parquet of paths", "parquet of bytes", "tar of labels",
         "tar of folders", "recordio", "pack", "csv per split"]


def content(number):
    """Bytes of the image of a number: some fit no name, some are damaged, some come again."""
    kind = number % 11
    if kind == 3:
        return picture(number)[:-20]
    if kind == 5:
        return b"<html>page %d</html>" % number
    if kind == 7:
        return HEIC + b"%d" % number
    if kind == 9:
        file = io.BytesIO()
        Image.frombytes("RGB", (4, 4), bytes(number % 256 for _ in range(48))).save(file, "JPEG")
        return file.getvalue()
    return picture(number // 2)


class Written:
    """A source that is made, and what was written: {name: bytes} of images, and names of other files."""

    def __init__(self, folder, seed):
        self.folder, self.random = folder, random.Random(seed)
        self.images, self.others = {}, set()
        self.labels = [str(self.random.randint(0, 6)) for _ in range(60)]
        folder.mkdir()

    def file(self, path, data):
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_bytes(data)

    def suffix(self, number):
        """A name by which the image is known as one, by itself or by its content."""
        return self.random.choice(SUFFIXES[:4] if number % 11 == 5 else SUFFIXES)

    def tree(self, split="", first=0):
        for number, label in enumerate(self.labels, first):
            hidden = "." * (number % 13 == 4)
            path = f"{split}{label}/{hidden}{number}x{self.suffix(number)}"
            self.images[path] = content(number)
            self.file(path, content(number))
        for path in f"{split}1/notes.txt", f"{split}2/.hidden/notes":
            self.others.add(path)
            self.file(path, b"text")
        for number, name in enumerate(NEVER_DATA):
            self.file(f"{split}{number}/{name}", b"text")
        return self.folder

    def paths(self, first=0):
        """Images in one folder, for tables; one of them is not there."""
        for number, label in enumerate(self.labels, first):
            path = f"im/{number}{self.suffix(number)}"
            self.images[path] = content(number)
            if number % 17 != 16:
                self.file(path, content(number))
            yield path, label

    def members(self, file, with_labels):
        for number, label in enumerate(self.labels):
            suffix = self.suffix(number) or ".png"
            name = f"s/{number:03}{suffix}" if with_labels else f"{label}/{number:03}{suffix}"
            self.images[f"{file}: {name}"] = content(number)
            if with_labels and number % 6 == 0:
                yield name.removesuffix(suffix) + ".cls", label.encode()
            yield name, content(number)
            if with_labels and number % 6 not in (0, 4):  # of 4 there is no label
                yield f"s/{number:03}{'.v2' * (suffix == '.v2.png')}.json", json.dumps({"label": label}).encode()


def write(kind, written):
    """Makes a source of a kind; returns the arguments of data_tools.pack that name it."""
    folder = written.folder
    if kind == "folder":
        return [written.tree()]
    if kind == "split folder":
        for number, split in enumerate(("Training/", "valid/", "TEST/")):
            written.tree(split, 100 * number)
        return [folder]
    if kind == "csv per split":
        for name, first in ("train", 0), ("test", 100):
            rows = "".join(f"{path};{label}\n" for path, label in written.paths(first))
            (folder / f"{name}.csv").write_text(f"file;class\n{rows}")
        return [folder / "train.csv", folder / "test.csv"]
    if kind == "csv":
        splits = ["validation", "Train", "TRAINING"]
        (folder / "a.csv").write_text("path,label,split\n" + "".join(
            f"{path},{label},{splits[i % 3]}\n" for i, (path, label) in enumerate(written.paths())))
    elif kind == "jsonlines":
        (folder / "a.jsonl").write_text("".join(json.dumps({"file_name": path, "label": int(label)}) + "\n"
                                                for path, label in written.paths()))
    elif kind == "list":
        (folder / "a.lst").write_text("".join(f"{i}\t{label}.0\t{path}\n"
                                              for i, (path, label) in enumerate(written.paths())))
    elif kind == "parquet of paths":
        paths, labels = zip(*written.paths(), strict=True)
        write_parquet(folder / "a.parquet", filename=paths, category=labels)
    elif kind == "parquet of bytes":
        images = [content(number) for number in range(60)]
        written.images = {f"{folder}/a.parquet: row {number}": data for number, data in enumerate(images, 1)}
        write_parquet(folder / "a.parquet", image=pa.array(images), label=[float(label) for label in written.labels])
    elif kind.startswith("tar"):
        write_tar(folder / "a.tar", written.members(folder / "a.tar", kind == "tar of labels"))
    elif kind == "recordio":
        images = [content(number) for number in range(60)]
        written.images = {f"{folder}/a.rec: record {number}": data for number, data in enumerate(images)}
        write_rec(folder / "a.rec", [image_record(float(label), data)
                                     for label, data in zip(written.labels, images, strict=True)])
    else:
        good = {f"{label}/{i}.png": picture(i // 2) for i, label in enumerate(written.labels)}
        for path, data in good.items():
            written.file(f"tree/{path}", data)
        run_pack(folder / "tree", folder / "a")
        written.images = {f"{folder}/a: record {i}": data for i, data in enumerate(
            data for (_, _, data), count in count_records(folder / "a").items() for _ in range(count))}
        return [folder / "a"]
    return [max(folder.glob("a.*"))]  # a.rec, not a.idx


FLAGS = {"all": [], "chosen": ["--min-images", 5, "--max-images-per-class", 6, "--duplicates", "drop"],
         "listed": ["--classes"], "without": ["--without"]}


WITH_SPLITS = {"split folder": "test", "csv per split": "test", "csv": "val"}  # which of them is left out


@pytest.mark.parametrize("kind, flags", [(kind, flags) for kind in KINDS for flags in FLAGS
                                         if flags != "without" or kind in WITH_SPLITS])
def test_images_are_packed_or_skipped_or_left_out(tmp_path, kind, flags):
    written = Written(tmp_path / "src", seed=len(kind) + len(flags))
    sources, more = write(kind, written), list(FLAGS[flags])
    if flags == "listed":
        (tmp_path / "list").write_text("1\n3\n5\n")
        more.append(tmp_path / "list")
    if flags == "without":
        more.append(WITH_SPLITS[kind])
    run_pack(*sources, tmp_path / "out", *more, "--max-skipped", 10**6, "--workers", 0)
    packed = Counter()
    for (_, _, data), count in count_records(tmp_path / "out").items():
        packed[data] += count
    skipped = [path for path, _ in skipped_rows(tmp_path / "out")]
    left_out = []
    if (tmp_path / "out" / "left_out.tsv").exists():
        left_out = [line.split("\t")[0] for line in (tmp_path / "out" / "left_out.tsv").read_text().splitlines()[1:]]
    names = Counter(name.removeprefix(f"{tmp_path / 'src'}/") for name in skipped + left_out)
    assert max(names.values(), default=1) == 1, "an image is in both lists, or twice in one"
    expected = {name.removeprefix(f"{tmp_path / 'src'}/"): data for name, data in written.images.items()}
    if kind != "pack":  # whose records have no names of their own
        left = defaultdict(int)
        for name, data in expected.items():
            left[data] += name not in names
        assert packed == Counter({data: count for data, count in left.items() if count})
    others = names.keys() - expected.keys()
    assert {name for name in others if "cls" not in name and "json" not in name} <= written.others
    assert packed.total() + len(names.keys() & expected.keys()) == len(expected)
