"""Prints what is inside a pack, or a folder of packs, and checks it: python -m data_tools.show PACK

Counts, how the images spread over the classes, and sizes and formats of a random sample of the images, which are
decoded for it. --plot draws images by class, the most frequent first, on log axes; --sheet some random images with the
names of their classes. Opening checks the index and the sizes of the shard files; --verify reads every byte and checks
every checksum. Memory: some numbers for each class.

Of a timeline.json, which train.py --timeline-steps writes, it prints and draws one step instead.

Progress goes to stderr, the result alone to stdout. Exit code 2 and one line on stderr where something is wrong, 1
where --verify finds a pack damaged.
"""

import json
import os
import signal
from collections import Counter
from contextlib import suppress

import numpy as np

from data_tools.common.command import Parser, between, printing
from data_tools.common.progress import Progress
from data_tools.reports import plots as pack_pictures
from data_tools.reports import trace as timeline
from xc.pack import INDEX_FILE, PackError, open_image, open_splits

BAR = 40  # most characters of a bar


def describe(pack, num_sampled):
    """Facts of one pack as a dict for JSON, sizes and formats by a sample of so many records."""
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
    """(n,) int64: up to so many record numbers, in order, always the same of a pack."""
    return np.sort(np.random.default_rng(0).choice(len(pack), min(count, len(pack)), replace=False))


def look(data):
    image = open_image(data)
    return len(data), image.width, image.height, image.format, image.mode


class UndecodableError(PackError):
    """The bytes of a record are those that were packed, but no image; --check none looks at none."""


def open_record(pack, record, opener):
    """opener(image bytes) of one record; UndecodableError with its number where the image is broken."""
    [data], _ = pack.read([record])
    try:
        return opener(data)
    except ValueError as error:
        raise UndecodableError(f"{pack.path}: record {record}: {error}") from error


def spread(values):
    return {"min": int(np.min(values)), "median": float(np.median(values)), "max": int(np.max(values))}


def doubling(values):
    """How many of the values (n,), integers from 0 up, are 0, 1, 2 to 3, 4 to 7, …; and what these add up to."""
    bins = np.frexp(values)[1]  # of v: how many bits it has
    counts, sums = np.bincount(bins), np.bincount(bins, weights=values)
    first = int(np.flatnonzero(counts)[0])
    return [{"from": 2 ** (bits - 1) if bits else 0, "to": 2**bits - 1, "count": int(counts[bits]),
             "sum": int(sums[bits])} for bits in range(first, len(counts))]


def long_tail(counts):
    """Of the images of each class (C,): how many classes have how many, and what the frequent ones hold."""
    ordered = np.sort(counts[counts > 0])[::-1]
    held = np.cumsum(ordered)
    top = -(-len(ordered) // 100)
    return {"classes_by_images": doubling(counts), "top_percent_classes": top,
            "top_percent_share": float(held[top - 1] / held[-1]),
            "classes_with_half": int(np.searchsorted(held, held[-1] / 2)) + 1}


def print_facts(split, facts):
    def of(spread):
        return f"{spread['min']} / {spread['median']:g} / {spread['max']}"

    sample, tail = facts["sample"], facts["long_tail"]
    print(f"{split}: {facts['records']} images of {facts['classes']} classes, {facts['bytes'] / 1e6:.1f} MB in "
          f"{facts['shards']} shards")
    print(f"  source {facts['source']!r}, seed {facts['seed']}, {facts['skipped']} images skipped")
    print(f"  classes {', '.join(map(repr, facts['first_classes']))}{', …' if facts['classes'] > 5 else ''}")
    print(f"  images per class {of(facts['images_per_class'])} (min / median / max), "
          f"{facts['classes_without_images']} classes without images")
    print_bins("images", "classes", tail["classes_by_images"])
    print(f"  the most frequent 1 % of the classes with images, {tail['top_percent_classes']}, "
          f"{'has' if tail['top_percent_classes'] == 1 else 'have'} {tail['top_percent_share']:.1%} of the images; "
          f"half of them are in {tail['classes_with_half']}")
    print(f"  of {sample['images']} images: width {of(sample['width'])}, height {of(sample['height'])}, "
          f"bytes {of(sample['bytes'])}")
    if faults := sample["undecodable"]:
        print(f"  another {len(faults)} {'does' if len(faults) == 1 else 'do'} not decode: {faults[0]}"
              + ", …" * (len(faults) > 1))
    print(f"  {shares(sample['formats'], sample['images'])}; modes {shares(sample['modes'], sample['images'])}")
    print_bins("pixels", "images by their longer side", sample["longer_side"])


def shares(counts, total):
    return ", ".join(f"{name} {count / total:.1%}" for name, count in counts.items())


def print_bins(what, of, bins):
    most = max(one["count"] for one in bins)
    print(f"    {what:>21} {of}")
    for one in bins:
        between = f"{one['from']}" if one["from"] == one["to"] else f"{one['from']} to {one['to']}"
        print(f"    {between:>21} {one['count']:>12,} {'#' * -(-one['count'] * BAR // most)}".rstrip())


def sheet(pack):
    """A PNG, as bytes, of random records and their classes' names."""
    records = sample(pack, pack_pictures.SIDE**2)
    pictures, names = [], []
    for record in records:
        with suppress(UndecodableError):
            pictures.append(open_record(pack, record, pack_pictures.square))
            names.append(pack.class_name(*pack.labels(record, record + 1)))
    if not pictures:
        raise PackError(f"{pack.path}: none of {len(records)} random images decodes, so there is no contact sheet")
    return pack_pictures.contact_sheet(pictures, names)


def write_new(path, data):
    """A new file with these bytes; nothing is left of one that could not be written."""
    with open(path, "xb") as file:
        try:
            file.write(data)
            file.flush()
        except BaseException:
            os.unlink(path)
            raise


def check_pictures(args):
    """PackError for pictures that can be known not to be written, before anything is read."""
    for flag, path in ("--sheet", args.sheet), ("--plot", args.plot):
        if path and not path.endswith(".png"):
            raise PackError(f"{flag} {path} is not allowed: give a name that ends in .png")
        if path and os.path.lexists(path):
            raise PackError(f"{flag} {path} exists; remove it or give another name")
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise PackError(f"{flag} {path}: no such folder as {os.path.dirname(path)}; make it first")


def show_timeline(parser, args):
    try:
        if args.sheet or args.verify:
            raise timeline.TimelineError("--sheet and --verify are for packs, not for a timeline")
        if args.plot and not args.plot.endswith(".png"):
            raise timeline.TimelineError(f"--plot {args.plot} is not allowed: give a name that ends in .png")
        if args.plot and os.path.lexists(args.plot):
            raise timeline.TimelineError(f"--plot {args.plot} exists; remove it or give another name")
        name, spans = timeline.one_step(timeline.read(args.pack))
        facts = timeline.describe(spans)
        if args.plot:
            timeline.draw(spans, name, args.plot)
    except (timeline.TimelineError, OSError) as error:
        parser.error(str(error))
    with printing(parser):
        if args.json:
            print(json.dumps({"step": name} | facts))
            return
        print(name)
        for rank, of_rank in facts.items():
            phases = "  ".join(f"{phase} {ms:.1f}" for phase, ms in of_rank["phases_ms"].items())
            print(f"  {rank}: {phases} ms; network busy {of_rank['network_ms']:.1f} ms, {of_rank['behind_ms']:.1f} of "
                  "it behind a computation")


def main(argv=None):
    parser = Parser(prog="data_tools.show", description=__doc__.partition("\n")[0])
    parser.add_argument("pack", metavar="PACK", help="a pack, a folder with packs train, val, test, or a timeline.json")
    parser.add_argument("--verify", action="store_true", help="read everything and check every checksum; exit code 1 "
                        "where a pack is damaged")
    parser.add_argument("--sample", type=between(1, 10**7), default=256,
                        help="images that sizes and formats are found of (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--sheet", metavar="PNG", help="write a contact sheet of random images (of train)")
    parser.add_argument("--plot", metavar="PNG", help="draw images by class; of a timeline.json, one step")
    args = parser.parse_args(argv)
    if args.pack.endswith(".json"):
        show_timeline(parser, args)
        return
    is_pack = any(os.path.exists(os.path.join(args.pack, folder, INDEX_FILE)) for folder in ("", "train"))
    try:
        check_pictures(args)
    except PackError as error:
        parser.error(str(error))
    try:
        packs = open_splits(args.pack)
        facts = {split: describe(pack, args.sample) for split, pack in packs.items()}
        for split, pack in packs.items() if args.verify else ():
            with Progress(f"verifying {split}", len(pack)) as progress:
                facts[split]["verified"] = pack.verify(progress.add)
        if args.sheet:
            write_new(args.sheet, sheet(packs["train"]))
        if args.plot:
            counts = {split: pack.class_counts for split, pack in packs.items()}
            write_new(args.plot, pack_pictures.rank_frequency(counts))
    except PackError as error:
        parser.error(str(error), code=1 if args.verify and is_pack else 2)
    except OSError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    with printing(parser):
        if args.json:
            print(json.dumps(facts))
            return
        for split, of_split in facts.items():
            print_facts(split, of_split)
            if args.verify:
                print(f"  verified: all {of_split['verified']} checksums are right")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as after Ctrl-C
    main()
