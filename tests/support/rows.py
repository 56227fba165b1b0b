"""Images as rows (split, label, name, bytes): written as a source, counted in packs, and what a pack says of them."""

import json
from collections import Counter

import numpy as np

from tests.support.sources import write_tar
from xc.data.pack import open_splits


def write_rows(folder, rows, kind):
    """A source with these images, and {(split, path of the report): (label, bytes)}."""
    if kind == "folder":
        for split, label, name, data in rows:
            path = folder / split / label / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return folder, {(split, "/".join(filter(None, (split, label, name)))): (label, data)
                        for split, label, name, data in rows}
    folder.mkdir()
    found = {}
    for split in {split for split, *_ in rows}:
        path, members = folder / f"{split or 'x'}-0.tar", []
        for split_of, label, name, data in rows:
            if split_of == split:
                members += [(name, data), (name.replace("png", "cls"), label.encode())]
                found[split, f"{path}: {name}"] = label, data
        write_tar(path, members)
    return folder, found


def count_records(out):
    """Counter of (split, label, bytes) of a pack or a folder of packs."""
    packs = open_splits(out)
    names = {split: split if (out / split).exists() else "" for split in packs}
    found = Counter()
    for split, pack in packs.items():
        images, labels = pack.read(np.arange(len(pack)))
        found.update((names[split], pack.class_name(label), image) for image, label in zip(images, labels, strict=True))
    return found


def count_rows(rows):
    """Counter of (split, label, bytes)."""
    return Counter((split, label, data) for split, label, _, data in rows)


def facts(capsys):
    """The JSON that a command has printed as its last line."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])
