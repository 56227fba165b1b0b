"""Writes records as tar files in the layout of WebDataset."""

import json
import os
import tarfile

from data_tools.exports.suffixes import suffix_of

TAR_END = 2 * tarfile.BLOCKSIZE


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
        os.fsync(self.file.fileno())  # a network file system may fail only now
        self.file.close()
        self.file, self.number = None, self.number + 1


def _member(name, data):
    """The pieces of a file in a tar; tarfile.TarFile is not used because it remembers all members."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % tarfile.BLOCKSIZE)
