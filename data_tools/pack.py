"""Packs a data set of images into a few large files: python -m data_tools.pack SRC OUT

SRC  a tree of images; an image's class is the path of its folder below SRC (letters/a/1.png is of class letters/a).
     Or a manifest (CSV, TSV or Parquet with the columns path, label and, if wanted, split), WebDataset tar shards,
     MXNet RecordIO, or a pack: data_tools/sources.py. Several become one pack.
OUT  the pack, a new folder; its layout is documented in xc/pack.py.

With folders train, val, test (train at least) at the top of the tree and nothing else there, with a column split, or
with shards named after splits, OUT is a folder of packs with one class table, that of train. Labels are the places of
the class names in sorted order; where all names are numbers they are sorted as numbers, so labels 0 … C − 1 of a CSV
keep their values.

Every image is decoded once as a check; its bytes are kept unless --resize, --format or --quality asks for others. Those
that fail are left out, counted and listed in OUT/skipped.tsv. OUT appears only when everything is done; before that
there is a folder .OUT.partial-… beside it, which no reader accepts.
The same SRC and seed give the same bytes whatever the number of workers and the memory. While it runs, memory holds
what --memory-mb allows, one shard of every split, and some megabytes and one decoded image per worker; what sorting
needs beyond that are files in that folder, once as large as the images that did not come in files of their own.
"""

import argparse
import json
import os
import re
import shutil
import signal
import time
from array import array

import numpy as np

from data_tools.checking import CHUNK_BYTES, CHUNK_RECORDS, read_in_order, worker_pool
from data_tools.class_table import ClassTable, name_hash, names_of
from data_tools.command import Parser, between, check_paths, new_folder
from data_tools.encoding import FORMATS, Encoding
from data_tools.listing import CLASS_SPLITS, MAX_NAME_BYTES, Listing, counts_file
from data_tools.pack_writer import PackWriter
from data_tools.progress import Progress, note
from data_tools.skipped import NAMED, Skipped
from data_tools.sources import KINDS, open_source
from xc import pack as layout
from xc.pack import PackError, open_splits


def pack(src, out, *, kind, classes, root, split, seed, shard_mb, memory_mb, workers, max_pixels, max_skipped,
         resize, format, quality):
    """Packs src, a list of paths, into the new folder out and says what became of it; the parameters are the flags.

    returns  dict of totals over the splits: records, classes, bytes, shards, skipped, seconds

    PackError or OSError, with nothing left at out, for whatever the user can mend.
    """
    started = time.monotonic()
    out = os.path.abspath(out)
    check_paths(src, out, root)
    sources = [open_source(path, kind, root) for path in src]
    if quality is not None and format in ("png", "raw"):
        raise PackError(f"--quality is of jpeg and webp, {format} loses nothing; leave it out")
    encoding = Encoding(resize, format, quality)
    given, wanted = None, None
    if classes is not None and os.path.isfile(classes):
        wanted = names_in(classes)
    elif classes is not None:
        given = open_splits(classes)["train"]

    with new_folder(out) as partial, open(os.path.join(partial, "skipped.tsv"), "w", encoding="utf-8",
                                          errors="surrogateescape") as skipped_file:
        work = os.path.join(partial, "work")  # files that go when the pack is whole
        os.mkdir(work)
        skipped, listing = Skipped(skipped_file, max_skipped), Listing(work, int(memory_mb * 1e6), seed, wanted, split)
        with Progress("listing") as progress:
            for number, source in enumerate(sources):
                for record in source.records(skipped):
                    if not listing.add(number, *record, source.may_repeat):
                        skipped.ignored[f"images of classes that {classes} does not name"] += 1
                    progress.add(1)
        splits = listing.splits
        if not CLASS_SPLITS & set(splits):
            raise PackError(f"{', '.join(src)}: no images"
                            f"{' of split train, which gives the classes' if splits else ''}{_why(skipped)}")
        if "" in splits and len(splits) > 1:
            raise PackError(f"{', '.join(src)}: some images have a split and others none; give all one, or none")
        for what, count in sorted(skipped.ignored.items()):
            note(f"ignored {count} {what}")
        if repeats := listing.check_paths():
            note(f"{repeats} rows name a path again; their images are packed as often as they are named")
        table = ClassTable(os.path.join(work, "classes"), listing.class_names() if given is None else names_of(given),
                           int(memory_mb * 1e6) // 4)
        if listing.has_gaps:
            note("the class names are numbers with gaps: their labels are 0, 1, 2, … without gaps")
        if wanted is not None and len(wanted) > len(table):
            note(f"{len(wanted) - len(table)} classes of {classes} have no images and get no label")
        owner = "train" if given is None else "the pack of --classes"
        listed = {split: listing.class_counts(split, table, owner) for split in splits}
        total = sum(int(counts.sum()) for counts in listed.values()) + skipped.count
        skipped.set_total(total)

        writers = {split: PackWriter(os.path.join(partial, split), shard_mb * 1e6,
                                     counts_file(os.path.join(work, f"written-{split}"), len(table)))
                   for split in splits}
        with worker_pool(workers) as pool, Progress("packing", total - skipped.count) as progress:
            roots, chunks = [source.root for source in sources], listing.chunks(table, CHUNK_RECORDS, CHUNK_BYTES)
            images = read_in_order(pool, 2 * workers + 1, roots, chunks, max_pixels, encoding)
            for record, data, crc_or_reason in images:
                if data is None:
                    skipped.add(record.split, record.path, crc_or_reason)
                else:
                    writers[record.split].add(data, crc_or_reason, record.label)
                progress.add(1)
        for split, writer in writers.items():
            if not writer.num_added:
                raise PackError(f"no image{_of(split)} can be used: {skipped}")
            writer.end_shard()
        for split, writer in writers.items():  # last: a folder without an index is not a pack
            writer.write_index(table, source=", ".join(os.path.basename(os.path.abspath(path)) for path in src),
                               seed=seed, skipped=skipped.of_split[split])
        lost = {split: np.flatnonzero((listed[split] > 0) & (writers[split].class_counts == 0)) for split in splits}
        lost = {split: (len(labels), [table.name(label) for label in labels[:NAMED]]) for split, labels in lost.items()}
        with_images = {split: np.count_nonzero(writers[split].class_counts) for split in splits}
        shutil.rmtree(work)

    if skipped.count:
        note(f"skipped {skipped.count} images, listed in {os.path.join(out, 'skipped.tsv')}: {skipped}")
    for split, writer in writers.items():
        count, names = lost[split]
        if count:
            note(f"warning: {count} classes{_of(split)} lost all their images; they keep their labels: "
                 + ", ".join(names) + (", …" if count > NAMED else ""))
        place = os.path.join(out, split).rstrip("/")
        print(f"{place}: {writer.num_records} images of {with_images[split]} classes, {writer.num_bytes / 1e6:.1f} MB "
              f"in {len(writer.shard_records)} shards")
    return {"records": sum(writer.num_records for writer in writers.values()), "classes": len(table),
            "bytes": sum(writer.num_bytes for writer in writers.values()),
            "shards": sum(len(writer.shard_records) for writer in writers.values()),
            "skipped": skipped.count, "seconds": round(time.monotonic() - started, 3)}


def names_in(path):
    """Sorted array of the hashes of the class names in a text file, one a line."""
    hashes = set()
    with open(path, "rb") as file:
        while line := file.readline(MAX_NAME_BYTES + 3):
            if name := line.rstrip(b"\r\n"):
                hashes.add(name_hash(name))
    return array("Q", sorted(hashes))


def _why(skipped):
    what = [f"{count} {what} ignored" for what, count in sorted(skipped.ignored.items())]
    if skipped.count:
        what.append(f"{skipped.count} skipped: {skipped}")
    return f" ({'; '.join(what)})" if what else ""


def _of(split):
    return split and f" of {split}"


def share_or_count(text):
    if not re.fullmatch(r"\d+|\d+(\.\d+)?%", text):
        raise argparse.ArgumentTypeError(f"{text} is neither a number like 100 nor a share like 1%")
    return text


def held_out(text):
    name, _, share = text.partition("=")
    if name not in layout.SPLITS[1:] or not re.fullmatch(r"0?\.\d*[1-9]\d*", share):
        raise argparse.ArgumentTypeError(f"{text} is not like test=0.01: val or test, and a share between 0 and 1")
    return name, float(share)


def main(argv=None):
    parser = Parser(prog="data_tools.pack", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("src", metavar="SRC", nargs="+", help="one or several of what is listed in the README; several become one pack")
    add("out", metavar="OUT", help="the folder to make")
    add("--classes", metavar="PACK", help="use the class table of this pack; an unknown class is an error. Or a text "
        "file with a class name on each line: take images of these classes only")
    add("--from", dest="kind", choices=KINDS, help="what SRC is, where its content does not tell")
    add("--root", metavar="DIR", help="where the paths in a manifest start (the folder of that file)")
    add("--split", type=held_out, metavar="NAME=SHARE", help="draw this share of the images for the split val or test, "
        "as in test=0.01, where the source has no splits")
    add("--seed", type=between(0, 2**63 - 1), default=0, help="of the shuffle (%(default)s)")
    add("--shard-mb", type=between(1e-6, 2**20, float), default=256, help="most image data in one file (%(default)s)")
    add("--memory-mb", type=between(1e-3, 2**20, float), default=1024,
        help="what shuffling and sorting may hold in memory; more goes through files beside OUT (%(default)s)")
    add("--workers", type=between(0, 4096), default=os.cpu_count(), help="processes, 0: only this one (%(default)s)")
    add("--max-pixels", type=between(1, layout.MAX_PIXELS), default=50_000_000,
        help=f"skip images with more (%(default)s); at most {layout.MAX_PIXELS}, which readers take")
    add("--max-skipped", type=share_or_count, default="1%", metavar="LIMIT",
        help="fail where more images cannot be used, a number or a share (%(default)s)")
    add("--resize", type=between(1, 2**14), metavar="PIXELS", help="make larger images so small that the shorter side "
        "has this length; of PNG, JPEG and WebP the format stays, others become PNG")
    add("--format", choices=FORMATS, help="encode images that have another format anew (the bytes are kept); raw: "
        "uncompressed, for fast reading")
    add("--quality", type=between(1, 100), help="encode all images anew, JPEG and WebP with this quality; without it, "
        "images that must be encoded anew get 90")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(pack(**vars(args))))
    except PackError as error:
        parser.error(str(error))
    except (OSError, RuntimeError) as error:  # h5py has either for a disk that refuses
        parser.error(f"{args.out}: {error}; nothing was kept")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; nothing was kept\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up as after Ctrl-C
    main()
