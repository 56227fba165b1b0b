"""Duplicates: images with the same bytes. They are found by a hash, reported and left out.

Images with the same bytes are a group. An image of a group is a

    repeat    if another image of the group has its label and comes first in the order test, val, train or in the list
    leak      if it is in train and another image of the group is in val or test
    conflict  if the group has several labels

The report has a line for every image of every group: the hash, the number of labels of the group, split, label, path,
whether the image is the first of its label, a repeat or a leak, and whether it was kept or dropped.
"""

import os
from collections import Counter, deque

from data_tools.packing.catalogue import ADDED, SPLITS
from data_tools.packing.skipped import row
from data_tools.packing.workers import CHUNK_RECORDS, content_hash, content_hashes, result_of

RULES = ("keep", "report", "drop", "drop-conflicting")
TEST_FIRST = SPLITS[::-1]  # the image that is kept comes from the first of these splits
TESTS = sum(name in ("test", "val") for name in TEST_FIRST)  # they are the first

# Every image of every group, in order, with the number of labels of its group.
GROUPS = f"""
    SELECT hash, labels, place, one.number, is_first, is_tested AND place = {TEST_FIRST.index("train")}, name, path,
        root, offset IS NULL
    FROM (
        SELECT *, sum(is_first) OVER same AS labels, count(*) OVER same AS times,
            min(place) OVER same < {TESTS} AS is_tested
        FROM (SELECT *, class IS NOT lag(class) OVER (PARTITION BY hash ORDER BY class, place, number) AS is_first
              FROM contents)
        WINDOW same AS (PARTITION BY hash)) AS one
    CROSS JOIN names ON names.class = one.class CROSS JOIN listed ON listed.number = one.number
    WHERE times > 1 ORDER BY hash, one.class, place, one.number
"""


class Duplicates:
    """Takes the images that are listed, and decides which are left out as duplicates.

    db            connection to the table of the images
    pool, window  the workers that read files, and how many lists of files they have at most
    """

    def __init__(self, db, pool, window):
        self._db, self._pool, self._window = db, pool, window
        self._rows, self._chunk, self._pending = [], [], deque()
        db.execute("CREATE TABLE contents (hash, class, place, number)")

    def add(self, listed, root, path, data):
        """Takes an image: its Entry in the catalogue, path below a root, bytes if it has no file."""
        key = listed.name, TEST_FIRST.index(listed.split), listed.number
        if data is not None:
            self._add(content_hash(data), key)
            return
        self._chunk.append((os.path.join(root, path), key))
        if len(self._chunk) == CHUNK_RECORDS:
            self._submit()

    def end(self):
        """Waits for the workers. No image can be added then."""
        self._submit()
        while self._pending:
            self._take()
        self._insert()

    def resolve(self, rule, report, shown):
        """Writes the report to a text file, and into the table what the rule, one of RULES, leaves out. Call it once.

        shown    shown(path, root, is_file): the path of an image for messages

        returns  Counter of images (repeats, leaks, conflicts) and of groups (contents)
        """
        report.write(row("hash", "labels", "split", "label", "path", "image", "done"))
        self._db.execute("CREATE TABLE dropped (number, reason)")
        found, dropped, last = Counter(), [], None
        for image, labels, place, number, is_first, is_leak, name, path, root, is_file in self._db.execute(GROUPS):
            found.update(contents=image != last, repeats=not is_first, leaks=is_leak, conflicts=labels > 1)
            what, last = "leak" if is_leak else "first" if is_first else "repeat", image
            reason = "conflict" if rule == "drop-conflicting" and labels > 1 else what
            is_kept = rule == "report" or reason == "first"
            if not is_kept:
                dropped.append((number, reason))
                if len(dropped) == ADDED:
                    self._drop(dropped)
            report.write(row(image.hex(), labels, TEST_FIRST[place], name.decode(),
                             shown(os.fsdecode(path), root, is_file), what, "kept" if is_kept else "dropped"))
        self._drop(dropped)
        self._db.executescript("INSERT INTO left_out SELECT number, reason FROM dropped ORDER BY number; "
                               "DROP TABLE dropped; DROP TABLE contents")
        return found

    def _drop(self, rows):
        self._db.executemany("INSERT INTO dropped VALUES (?, ?)", rows)
        rows.clear()

    def _add(self, image, key):
        self._rows.append((image, *key))
        if len(self._rows) == ADDED:
            self._insert()

    def _insert(self):
        self._db.execute("BEGIN")
        self._db.executemany("INSERT INTO contents VALUES (?, ?, ?, ?)", self._rows)
        self._db.execute("COMMIT")
        self._rows = []

    def _submit(self):
        if self._chunk:
            future = self._pool.submit(content_hashes, [file for file, _ in self._chunk])
            self._pending.append((self._chunk, future))
            self._chunk = []
        if len(self._pending) >= self._window:
            self._take()

    def _take(self):
        chunk, future = self._pending.popleft()
        for (_, key), image in zip(chunk, result_of(future, chunk[0][0]), strict=True):
            if image is not None:  # an image that cannot be read is reported when it is packed
                self._add(image, key)
