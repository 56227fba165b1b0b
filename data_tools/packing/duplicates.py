"""Duplicates: images with the same bytes. They are found by a hash, sorted on disk, reported and left out.

Images with the same bytes are a group. An image of a group is a

    repeat    if another image of the group has its label and comes first in the order test, val, train or in the list
    leak      if it is in train and another image of the group is in val or test
    conflict  if the group has several labels

The report has a line for every image of every group: the hash, the number of labels of the group, split, label, path,
whether the image is the first of its label, a repeat or a leak, and whether it was kept or dropped.
"""

import itertools
import os
import struct
from collections import Counter, deque

from data_tools.packing.catalogue import SPLITS, Decision
from data_tools.packing.external_sort import Sorter
from data_tools.packing.skipped import row
from data_tools.packing.workers import CHUNK_RECORDS, content_hash, content_hashes, result_of

RULES = ("keep", "report", "drop", "drop-conflicting")
HASH_BYTES = 16
TEST_FIRST = SPLITS[::-1]  # the image that is kept comes from the first of these splits
DECISIONS = {"first": Decision.KEPT, "repeat": Decision.REPEAT, "leak": Decision.LEAK}


class Duplicates:
    """Takes the images that are listed, and decides which are left out as duplicates.

    folder        where sorting puts what memory_bytes do not hold
    pool, window  the workers that read files, and how many lists of files they have at most
    """

    # Hash of the image, hash of the class name, index of the split in TEST_FIRST, number, length of the class name. The
    # name and the path follow.
    KEY = struct.Struct(f">{HASH_BYTES}sQBQH")

    def __init__(self, folder, memory_bytes, pool, window):
        self._folder, self._memory_bytes = folder, memory_bytes
        self._sorter = Sorter(os.path.join(folder, "images"), memory_bytes // 2)
        self._pool, self._window, self._chunk, self._pending = pool, window, [], deque()

    def add(self, listed, root, path, label, data):
        """Takes an image: its Entry in the catalogue, path below a root, class name, bytes if it has no file."""
        label = label.encode()
        key = listed.name, TEST_FIRST.index(listed.split), listed.number, len(label)
        names = label + os.fsencode(path)
        if data is not None:
            self._sorter.add(self.KEY.pack(content_hash(data), *key) + names)
            return
        self._chunk.append((os.path.join(root, path), key, names))
        if len(self._chunk) == CHUNK_RECORDS:
            self._submit()

    def end(self):
        """Waits for the workers. No image can be added then."""
        self._submit()
        while self._pending:
            self._take()

    def resolve(self, rule, decisions, report):
        """Writes the report to a text file and sets decisions[number] by the rule, one of RULES. Call it once.

        returns  Counter of images (repeats, leaks, conflicts) and of groups (contents); Counter of those left out by
                 reason
        """
        report.write(row("hash", "labels", "split", "label", "path", "image", "done"))
        found, left_out = Counter(), Counter()
        for image, group in itertools.groupby(self._sorter, lambda item: item[:HASH_BYTES]):
            # A group may be as large as the whole list, and its last image may decide about its first.
            same, size = Sorter(os.path.join(self._folder, image.hex()), self._memory_bytes // 2), 0
            labels, last, is_tested = 0, None, False
            for item in group:
                _, name, place, *_ = self.KEY.unpack_from(item)
                labels, last = labels + (name != last), name
                is_tested = is_tested or TEST_FIRST[place] in ("test", "val")
                same.add(item)
                size += 1
            if size > 1:
                found["contents"] += 1
                for number, decision, cells in self._decide(same, labels, is_tested, rule, found):
                    decisions[number] = decision
                    left_out[decision.name.lower()] += decision != Decision.KEPT
                    report.write(row(image.hex(), labels, *cells, "kept" if decision == Decision.KEPT else "dropped"))
        return found, +left_out

    def _decide(self, group, labels, is_tested, rule, found):
        """Yields (number, Decision, cells of the report) of the images of a group, and counts them in `found`."""
        last = None
        for item in group:
            _, name, place, number, length = self.KEY.unpack_from(item)
            is_leak, is_repeat, last = is_tested and TEST_FIRST[place] == "train", name == last, name
            found.update(repeats=is_repeat, leaks=is_leak, conflicts=labels > 1)
            image = "leak" if is_leak else "repeat" if is_repeat else "first"
            decision = Decision.CONFLICT if rule == "drop-conflicting" and labels > 1 else DECISIONS[image]
            if rule == "report":
                decision = Decision.KEPT
            end = self.KEY.size + length
            label, path = item[self.KEY.size : end].decode(), os.fsdecode(item[end:])
            yield number, decision, (TEST_FIRST[place], label, path, image)

    def _submit(self):
        if self._chunk:
            future = self._pool.submit(content_hashes, [file for file, _, _ in self._chunk])
            self._pending.append((self._chunk, future))
            self._chunk = []
        if len(self._pending) >= self._window:
            self._take()

    def _take(self):
        chunk, future = self._pending.popleft()
        for (_, key, names), image in zip(chunk, result_of(future, chunk[0][0]), strict=True):
            if image is not None:  # an image that cannot be read is reported when it is packed
                self._sorter.add(self.KEY.pack(image, *key) + names)
