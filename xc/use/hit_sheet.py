"""A contact sheet of queries and their neighbours."""

import os

import numpy as np

from data_tools.common.progress import note
from data_tools.reports import plots
from xc.use.source import images_of
from xc.use.tables import text

MOST_QUERIES, MOST_HITS = 32, 10  # rows, and columns beside the query
_GREY = 96
_LABELS = 2**20  # of a pack that are read at once


class Sheet:
    """A contact sheet: a row for each query, with its picture and those of its neighbours."""

    def __init__(self, index, src, pack):
        """src: the source of the queries; pack: of the run, for pictures of classes; None: there is none"""
        self._index, self._src, self._pack = index, src, pack
        self._queries, self._hits, self._seen, self._left_out = [], [], 0, 0

    def add(self, images, scores, rows):
        """Images of the source in order; scores, rows (good, top) of the neighbours of those without a reason."""
        found = iter(zip(scores.tolist(), rows.tolist(), strict=True))
        for image in images:
            if image.reason is None:
                hits = zip(*next(found), strict=True)
                if len(self._queries) < MOST_QUERIES:
                    self._queries.append(self._seen)
                    self._hits.append([(score, row) for score, row in list(hits)[:MOST_HITS] if row >= 0])
                else:
                    self._left_out += 1
            self._seen += 1

    def png(self):
        """The sheet as bytes."""
        if self._left_out:
            note(f"the sheet shows the first {MOST_QUERIES} queries, and leaves out {self._left_out}")
        named = self._index.named(np.array([row for hits in self._hits for _, row in hits], np.int64))
        queries = pictures_at(self._src, dict.fromkeys(self._queries))
        hits = self._hit_pictures(named)
        columns = 1 + max(map(len, self._hits))
        cells, shape = [], (plots.IMAGE, plots.IMAGE, 3)
        for number, of_query in zip(self._queries, self._hits, strict=True):
            row = [(queries.get(number), "query")]
            row += [(hits.get(one), f"{score:.2f} {self._short(named[one][0])}") for score, one in of_query]
            cells += row + [(np.zeros(shape, np.uint8), "")] * (columns - len(row))
        pictures = [np.full(shape, _GREY, np.uint8) if picture is None else picture for picture, _ in cells]
        names = [name for _, name in cells]
        return plots.contact_sheet(pictures, names, columns)

    def _short(self, name):
        """Of a path the last two parts, which tell most in the little room below a picture."""
        return "/".join(name.split("/")[-2:]) if self._index.meta["of"] == "images" else name

    def _hit_pictures(self, named):
        """{row: picture} of those that can be had; a note says where there are fewer."""
        places = {place: name for name, place in named.values()}
        try:
            if self._index.meta["of"] == "images":
                meta = self._index.meta
                found = pictures_at(meta["source"], places, meta["working_folder"])
            else:
                found = pictures_of_classes(self._pack, places) if self._pack else {}
        except (OSError, ValueError) as error:
            note(f"pictures of neighbours cannot be read ({error})")
            found = {}
        if len(found) < len(places):
            note(f"{len(places) - len(found)} of {len(places)} neighbours have no picture, and are grey on the sheet")
        return {row: found[place] for row, (_, place) in named.items() if place in found}


def pictures_at(src, wanted, folder=""):
    """{place: picture} of the images of a source at {place: name}; those that are other images now are left out.

    folder  that the names are relative to

    A name of None may be any. The source is read up to the last place.
    """
    last = max(wanted, default=-1)
    images, found = images_of(src)[0], {}
    for place, image in enumerate(images()):
        if place in wanted and image.load is not None:
            names = {os.path.normpath(os.path.join(folder, name)) for name in (wanted[place], text(image.name)) if name}
            if len(names) == 1:
                _take(found, place, image.load)
        if place >= last:
            break
    return found


def pictures_of_classes(pack, classes):
    """{class: picture} of the first image of each class in a pack, in its order."""
    left, found = np.array(sorted(classes)), {}
    for start in range(0, len(pack), _LABELS):
        labels = pack.labels(start, min(start + _LABELS, len(pack)))
        here, first = np.unique(labels, return_index=True)
        for label in np.intersect1d(here, left).tolist():
            record = start + int(first[np.searchsorted(here, label)])
            _take(found, label, lambda record=record: pack.read([record])[0][0])
        left = np.setdiff1d(left, here)
        if not len(left):
            break
    return found


def _take(found, place, load):
    try:
        found[place] = plots.square(load())
    except (OSError, ValueError):
        return
