"""Small pictures of records as data URIs, within a budget of bytes; which records show a class."""

import base64
import io

import numpy as np
from PIL import Image

from xc.data.images import open_image

SIDE = 96  # most pixels of a picture's width and height
_BLOCK = 2**20  # labels that are read at once
_QUALITY = 80  # of JPEG


def thumbnail(data):
    """(kind, bytes) of a small picture of the image in data (bytes): a JPEG, or a PNG where that is smaller.

    It has the same proportions and at most SIDE pixels on each side; small images stay as they are. ValueError as for
    xc.data.images.open_image.
    """
    image = open_image(data)
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.info.clear()  # profiles and comments of the file
    found = []
    for kind, options in ("png", {"optimize": True}), ("jpeg", {"quality": _QUALITY, "optimize": True}):
        file = io.BytesIO()
        image.save(file, kind, **options)
        found.append((kind, file.getvalue()))
    return min(found, key=lambda one: len(one[1]))


class Pictures:
    """Makes the pictures of a page and counts those that it lacks.

    left     bytes of data URIs that may still be made
    over     pictures that were left out because the budget was spent
    damaged  pictures whose record cannot be read or decoded
    """

    def __init__(self, budget):
        self.left, self.over, self.damaged = budget, 0, 0
        self._made = {}

    def of(self, pack, record):
        """The data URI of a record of a Pack; None where there is none, which is counted."""
        key = pack.path, record
        if key not in self._made:
            self._made[key] = self._uri(pack, record)
        uri = self._made[key]
        if uri is None:
            self.damaged += 1
            return None
        if len(uri) > self.left:
            self.over += 1
            return None
        self.left -= len(uri)
        return uri

    @staticmethod
    def _uri(pack, record):
        try:
            kind, data = thumbnail(pack.read([record])[0][0])
        except (ValueError, OSError):
            return None
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def records_of(pack, classes, each):
    """{class: [at most `each` record numbers, ascending]} of some classes of a Pack.

    Packs have no table of records by class, so the labels are read in order until all are found.
    """
    found = {one: [] for one in classes}
    missing = {one: min(each, int(pack.counts(one, one + 1)[0])) for one in found}
    missing = {one: count for one, count in missing.items() if count}
    for start in range(0, len(pack), _BLOCK):
        if not missing:
            break
        labels = pack.labels(start, min(start + _BLOCK, len(pack)))
        for place in np.flatnonzero(np.isin(labels, list(missing))).tolist():
            one = int(labels[place])
            if one in missing:
                found[one].append(start + place)
                missing[one] -= 1
                if not missing[one]:
                    del missing[one]
    return found
