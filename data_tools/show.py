"""Prints what is inside a pack, or a folder of packs, and checks it: python -m data_tools.show PACK

Of a timeline.json, which train.py --timeline-steps writes, it prints and draws one step instead.

Opening checks the index and the sizes of the shard files, the statistics decode a sample of the images; --verify
reads every byte and checks every checksum. Exit code 2 and one line on stderr where something is wrong.
"""

import json
import os

import numpy as np
from PIL import Image

from data_tools import timeline
from data_tools.pack import Parser, Progress
from xc.pack import PackError, decode, open_image, open_splits

SAMPLE = 256  # images
SHEET_SIDE, SHEET_IMAGE = 8, 64  # images per row and column of the contact sheet; pixels of each


def describe(pack):
    """Facts of one pack as a dict for JSON. Records are in random order, so the first ones are a fair sample."""
    counts = pack.class_counts
    images = [open_record(pack, record, look) for record in range(min(SAMPLE, len(pack)))]
    widths, heights, formats, modes = zip(*images, strict=True)
    return {
        "records": pack.num_records, "classes": pack.num_classes, "bytes": pack.num_bytes, "shards": pack.num_shards,
        "source": pack.source, "seed": pack.seed, "skipped": pack.skipped,
        "classes_without_images": int((counts == 0).sum()), "images_per_class": spread(counts),
        "sample": {"images": len(images), "width": spread(widths), "height": spread(heights),
                   "formats": sorted(set(formats)), "modes": sorted(set(modes))},
        "first_classes": pack.class_names(0, min(5, pack.num_classes)),
    }


def look(data):
    image = open_image(data)
    return image.width, image.height, image.format, image.mode


def open_record(pack, record, opener, *arguments):
    """opener(image bytes, …) of one record; PackError with its number where the image is broken."""
    [data], _ = pack.read([record])
    try:
        return opener(data, *arguments)
    except ValueError as error:
        raise PackError(f"{pack.path}: record {record}: {error}") from error


def spread(values):
    return {"min": int(np.min(values)), "median": float(np.median(values)), "max": int(np.max(values))}


def print_facts(split, facts):
    def of(spread):
        return f"{spread['min']} / {spread['median']:g} / {spread['max']}"

    sample = facts["sample"]
    print(f"{split}: {facts['records']} images of {facts['classes']} classes, {facts['bytes'] / 1e6:.1f} MB in "
          f"{facts['shards']} shards")
    print(f"  source {facts['source']!r}, seed {facts['seed']}, {facts['skipped']} images skipped")
    print(f"  images per class {of(facts['images_per_class'])} (min / median / max), "
          f"{facts['classes_without_images']} classes without images")
    print(f"  of {sample['images']} images: width {of(sample['width'])}, height {of(sample['height'])}, "
          f"{' '.join(sample['formats'])}, modes {' '.join(sample['modes'])}")
    print(f"  classes {', '.join(map(repr, facts['first_classes']))}{', …' if facts['classes'] > 5 else ''}")


def contact_sheet(pack):
    """A Pillow image of the first records, each SHEET_IMAGE pixels wide and high."""
    sheet = Image.new("RGB", (SHEET_SIDE * SHEET_IMAGE,) * 2)
    for record in range(min(SHEET_SIDE**2, len(pack))):
        row, column = divmod(record, SHEET_SIDE)
        pixels = open_record(pack, record, decode, SHEET_IMAGE, 3)
        sheet.paste(Image.fromarray(pixels.transpose(1, 2, 0)), (column * SHEET_IMAGE, row * SHEET_IMAGE))
    return sheet


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
    if args.json:
        print(json.dumps({"step": name} | facts))
        return
    print(name)
    for rank, of_rank in facts.items():
        phases = "  ".join(f"{phase} {ms:.1f}" for phase, ms in of_rank["phases_ms"].items())
        print(f"  {rank}: {phases} ms; network busy {of_rank['network_ms']:.1f} ms, {of_rank['behind_ms']:.1f} of it "
              "behind a computation")


def main(argv=None):
    parser = Parser(prog="data_tools.show", description=__doc__.partition("\n")[0])
    parser.add_argument("pack", metavar="PACK", help="a pack, a folder with packs train, val, test, or a timeline.json")
    parser.add_argument("--verify", action="store_true", help="read everything and check every checksum")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--sheet", metavar="PNG", help="write a contact sheet of some images (of train)")
    parser.add_argument("--plot", metavar="PNG", help="of a timeline.json: draw one step")
    args = parser.parse_args(argv)
    if args.pack.endswith(".json"):
        show_timeline(parser, args)
        return
    try:
        if args.plot:
            raise PackError(f"--plot is for a timeline.json, {args.pack} is none")
        if args.sheet and os.path.lexists(args.sheet):
            raise PackError(f"--sheet {args.sheet} exists; remove it or give another name")
        packs = open_splits(args.pack)
        facts = {split: describe(pack) for split, pack in packs.items()}
        for split, pack in packs.items() if args.verify else ():
            with Progress(f"verifying {split}", len(pack)) as progress:
                facts[split]["verified"] = pack.verify(progress.add)
        if args.sheet:
            contact_sheet(packs["train"]).save(args.sheet, "PNG")
    except (PackError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130)
    if args.json:
        print(json.dumps(facts))
        return
    for split, of_split in facts.items():
        print_facts(split, of_split)
        if args.verify:
            print(f"  verified: all {of_split['verified']} checksums are right")


if __name__ == "__main__":
    main()
