"""Prints what is inside a pack, or a folder of packs, and checks it: python -m data_tools.show PACK

It prints counts, how the images spread over the classes, and sizes and formats of a random sample of the images, which
are decoded for it. --plot draws the number of images by class, the most frequent class first, on log axes. --sheet
shows some random images with the names of their classes. Opening a pack checks the index and the sizes of the shard
files; --verify reads every byte and checks every checksum. Memory holds some numbers for each class.

python -m data_tools.show RUN/trace.json sums up one step of a trace of train.py: how long each phase took on each rank,
and how long transfers were in flight during computation. To look at the steps, open the file in ui.perfetto.dev.

Progress goes to stderr, the result alone to stdout. On an error the exit code is 2, with one line on stderr; it is 1
where --verify finds a pack damaged.
"""

import json
import os
import signal

from data_tools.common.atomic import atomic_path
from data_tools.common.command import Parser, between, printing
from data_tools.common.progress import Progress
from data_tools.reports import facts, plots, trace
from xc.data.pack import INDEX_FILE, PackError, open_splits

BAR = 40  # most characters of a bar


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


def write_picture(path, data):
    """Writes a new file with these bytes."""
    with atomic_path(path) as partial, open(partial, "xb") as file:
        file.write(data)


def check_pictures(args):
    """PackError for names of pictures that cannot be written, before anything is read."""
    for flag, path in ("--sheet", args.sheet), ("--plot", args.plot):
        if path and not path.endswith(".png"):
            raise PackError(f"{flag} {path} is not allowed: give a name that ends in .png")
        if path and os.path.lexists(path):
            raise PackError(f"{flag} {path} exists; remove it or give another name")
        if path and not os.path.isdir(os.path.dirname(path) or "."):
            raise PackError(f"{flag} {path}: there is no folder {os.path.dirname(path)}; make it first")


def show_trace(parser, args):
    try:
        for flag, value in ("--sheet", args.sheet), ("--plot", args.plot), ("--verify", args.verify):
            if value:
                raise trace.TraceError(f"{flag} is for packs, but {args.pack} is a trace: leave it out. To look at the "
                                       "steps, open the trace in ui.perfetto.dev")
        name, spans = trace.middle_step(trace.read(args.pack))
        ranks = trace.describe(spans)
    except (trace.TraceError, OSError) as error:
        parser.error(str(error))
    with printing(parser):
        if args.json:
            print(json.dumps({"step": name} | ranks))
            return
        print(name)
        for rank, of_rank in ranks.items():
            phases = "  ".join(f"{phase} {ms:.1f}" for phase, ms in of_rank["phases_ms"].items())
            print(f"  {rank}: {phases} ms; transfers in flight {of_rank['network_ms']:.1f} ms, "
                  f"{of_rank['behind_ms']:.1f} of them during computation")


def main(argv=None):
    parser = Parser(prog="data_tools.show", description=__doc__.partition("\n")[0])
    parser.add_argument("pack", metavar="PACK", help="a pack, a folder with packs train, val, test, or RUN/trace.json")
    parser.add_argument("--verify", action="store_true", help="read everything and check every checksum; exit code 1 "
                        "if a pack is damaged")
    parser.add_argument("--sample", type=between(1, 10**7), default=256,
                        help="number of images for sizes and formats (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--sheet", metavar="PNG", help="write a contact sheet of random images (of train)")
    parser.add_argument("--plot", metavar="PNG", help="draw the number of images of each class, most frequent first")
    args = parser.parse_args(argv)
    if args.pack.endswith(".json"):
        show_trace(parser, args)
        return
    is_pack = any(os.path.exists(os.path.join(args.pack, folder, INDEX_FILE)) for folder in ("", "train"))
    try:
        check_pictures(args)
    except PackError as error:
        parser.error(str(error))
    try:
        packs = open_splits(args.pack)
        found = {split: facts.describe(pack, args.sample) for split, pack in packs.items()}
        for split, pack in packs.items() if args.verify else ():
            with Progress(f"verifying {split}", len(pack)) as progress:
                found[split]["verified"] = pack.verify(progress.add)
        if args.sheet:
            write_picture(args.sheet, facts.sheet(packs["train"]))
        if args.plot:
            counts = {split: pack.class_counts for split, pack in packs.items()}
            write_picture(args.plot, plots.rank_frequency(counts))
    except PackError as error:
        parser.error(str(error), code=1 if args.verify and is_pack else 2)
    except OSError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted\n")
    with printing(parser):
        if args.json:
            print(json.dumps(found))
            return
        for split, of_split in found.items():
            print_facts(split, of_split)
            if args.verify:
                print(f"  verified: all {of_split['verified']} checksums match")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as after Ctrl-C
    main()
