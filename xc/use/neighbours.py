"""The neighbours of images in an index, as rows of a table or lines for people."""

import numpy as np

from xc.errors import one_line
from xc.use.index_types import search
from xc.use.tables import row_table, text

FIELDS = {"path": "string", "rank": "int32", "name": "string", "score": "double", "reason": "string"}
_NONE_FOUND = "the cells of the index that are searched for it are empty"


def found_for(features, index, top):
    """(scores (n, top), rows (n, top)) of the best vectors for features (n, D); row −1 where there are fewer."""
    if not len(features):
        return np.empty((0, top), np.float32), np.empty((0, top), np.int64)
    return search(index.faiss, features, top)


def neighbour_rows(images, scores, rows, index):
    """{column: list}: the neighbours of n Images, best first, and a row with a reason for each that has none.

    scores, rows  (good, top) of `found_for`, of the Images without a reason
    """
    named = index.named(rows[rows >= 0])
    columns, found = {name: [] for name in FIELDS}, iter(zip(scores.tolist(), rows.tolist(), strict=True))
    for image in images:
        hits, reason = [], image.reason
        if reason is None:
            hits = [(named[row][0], score) for score, row in zip(*next(found), strict=True) if row >= 0]
            reason = None if hits else _NONE_FOUND
        for cells in ((rank, *hit, None) for rank, hit in enumerate(hits, 1)) if hits else [(None, None, None, reason)]:
            for column, value in zip(columns.values(), (text(image.name), *cells), strict=True):
                column.append(value)
    return columns


def table_of(path, suffix):
    """A table for such rows in a file."""
    return row_table(path, suffix, FIELDS)


class Printed:
    """A table for such rows that prints them as lines for people. Images without a result wait for one with a result:
    where no image has any, nothing is printed."""

    def __init__(self):
        self._waiting = []

    def write(self, columns):
        for path, rank, name, score, reason in zip(*columns.values(), strict=True):
            if reason is not None:
                self._waiting.append(f"{one_line(path)}: {reason}")
                continue
            if rank == 1:
                self._waiting.append(one_line(path))
            self._waiting.append(f"{rank:4}  {score:7.4f}  {one_line(name)}")
        if any(reason is None for reason in columns["reason"]):
            self.close()

    def close(self):
        if self._waiting:
            print("\n".join(self._waiting), flush=True)
        self._waiting = []
