"""Facts of a pack: counts, how images spread over classes, and sizes and formats of a random sample."""

from collections import Counter
from contextlib import suppress

import numpy as np

from data_tools.common.progress import Progress
from data_tools.reports import plots
from xc.pack import PackError, open_image


def describe(pack, num_sampled):
    """Facts of one pack as a dict for JSON; sizes and formats are those of num_sampled random records."""
    counts = pack.class_counts
    records = sample(pack, num_sampled)
    with Progress("sampling", len(records)) as progress:
        images, faults = [], []
        for record in records:
            try:
                images.append(open_record(pack, record, look))
            except UndecodableError as error:
                faults.append(str(error))
            progress.add(1)
    if not images:
        raise PackError(faults[0])
    sizes, widths, heights, formats, modes = zip(*images, strict=True)
    return {
        "records": pack.num_records, "classes": pack.num_classes, "bytes": pack.num_bytes, "shards": pack.num_shards,
        "source": pack.source, "seed": pack.seed, "skipped": pack.skipped,
        "classes_without_images": int((counts == 0).sum()), "images_per_class": spread(counts),
        "long_tail": long_tail(counts),
        "sample": {"images": len(images), "undecodable": faults,
                   "bytes": spread(sizes), "width": spread(widths), "height": spread(heights),
                   "longer_side": doubling(np.maximum(widths, heights)),
                   "formats": dict(Counter(formats).most_common()), "modes": dict(Counter(modes).most_common())},
        "first_classes": pack.class_names(0, min(5, pack.num_classes)),
    }


def sample(pack, count):
    """(n,) int64: up to `count` random record numbers in order, always the same for a pack."""
    return np.sort(np.random.default_rng(0).choice(len(pack), min(count, len(pack)), replace=False))


def look(data):
    image = open_image(data)
    return len(data), image.width, image.height, image.format, image.mode


class UndecodableError(PackError):
    """The bytes of a record are as they were packed, but they do not decode; --check none does not check that."""


def open_record(pack, record, opener):
    """opener(image bytes) of one record; UndecodableError with its number where the image does not decode."""
    [data], _ = pack.read([record])
    try:
        return opener(data)
    except ValueError as error:
        raise UndecodableError(f"{pack.path}: record {record}: {error}") from error


def spread(values):
    return {"min": int(np.min(values)), "median": float(np.median(values)), "max": int(np.max(values))}


def doubling(values):
    """Histogram of the values (n,), integers from 0 up, in bins 0, 1, 2 to 3, 4 to 7, …, with the sum of each bin."""
    bins = np.frexp(values)[1]  # number of bits of each value
    counts, sums = np.bincount(bins), np.bincount(bins, weights=values)
    first = int(np.flatnonzero(counts)[0])
    return [{"from": 2 ** (bits - 1) if bits else 0, "to": 2**bits - 1, "count": int(counts[bits]),
             "sum": int(sums[bits])} for bits in range(first, len(counts))]


def long_tail(counts):
    """How many classes have how many images, and the share of the frequent ones, of the images of each class (C,)."""
    ordered = np.sort(counts[counts > 0])[::-1]
    held = np.cumsum(ordered)
    top = -(-len(ordered) // 100)
    return {"classes_by_images": doubling(counts), "top_percent_classes": top,
            "top_percent_share": float(held[top - 1] / held[-1]),
            "classes_with_half": int(np.searchsorted(held, held[-1] / 2)) + 1}


def sheet(pack):
    """A PNG, as bytes, of random records with the names of their classes."""
    records = sample(pack, plots.SIDE**2)
    pictures, names = [], []
    for record in records:
        with suppress(UndecodableError):
            pictures.append(open_record(pack, record, plots.square))
            names.append(pack.class_name(*pack.labels(record, record + 1)))
    if not pictures:
        raise PackError(f"{pack.path}: none of {len(records)} random images decodes, so there is no contact sheet")
    return plots.contact_sheet(pictures, names)
