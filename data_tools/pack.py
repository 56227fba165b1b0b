"""Packs a data set of images into a few large files: python -m data_tools.pack SRC OUT

SRC  a tree of images; an image's class is the path of its folder below SRC (letters/a/1.png is of class letters/a).
     Or a manifest (CSV, TSV or Parquet with the columns path, label and, if wanted, split and weight), WebDataset tar
     shards, MXNet RecordIO, or a pack: data_tools/sources.py. Several become one pack.
OUT  the pack, a new folder; its layout is documented in xc/pack.py.

With folders train, val, test (train at least) at the top of the tree and nothing else there, with a column split, or
with shards named after splits, OUT is a folder of packs with one class table, that of train. Labels are the places of
the class names in sorted order; where all names are numbers they are sorted as numbers, so labels 0 … C − 1 of a CSV
keep their values.

What is packed can be chosen. --duplicates compares the bytes of the images as they come (data_tools/duplicates.py says
what it finds; images in files of their own are read once more for it), and of the rest --min-images counts what was
listed; --max-images-per-class then takes the first of each class in the order of the shuffle, which the seed fixes.
Images that do not decode are found after that and not replaced.

Every image is decoded once as a check, or looked at as --check says (data_tools/image_check.py); its bytes are kept
unless --resize, --format or --quality asks for others. Those that fail are left out, counted and listed in
OUT/skipped.tsv. OUT appears only when everything is done; before that there is a folder .OUT.partial-… beside it, which
no reader accepts.
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
from collections import Counter

import numpy as np

from data_tools.checking import CHUNK_BYTES, CHUNK_RECORDS, KEPT, read_in_order, worker_pool
from data_tools.choosing import choose
from data_tools.class_table import name_hash, names_of
from data_tools.command import Parser, between, check_paths, new_folder
from data_tools.duplicates import RULES, Duplicates
from data_tools.encoding import FORMATS, Encoding
from data_tools.image_check import CHECKS
from data_tools.listing import CLASS_SPLITS, MAX_NAME_BYTES, Fate, Listing, zeros_file
from data_tools.pack_writer import PackWriter
from data_tools.progress import Progress, note
from data_tools.skipped import NAMED, Skipped
from data_tools.sources import KINDS, open_source
from xc import pack as layout
from xc.pack import PackError, open_splits

LEFT_OUT = {"repeat": "images that repeat others", "leak": "images of train that are in val or test too",
            "conflict": "images with several labels", "few": "images of classes with fewer than --min-images",
            "many": "images beyond --max-images-per-class"}


def pack(src, out, *, kind, classes, root, split, seed, shard_mb, memory_mb, workers, max_pixels, max_skipped,
         resize, format, quality, check, split_by, min_images, max_images_per_class, duplicates):
    """Packs src, a list of paths, into the new folder out and says what became of it; the parameters are the flags.

    returns  dict of totals over the splits: records, classes, bytes, shards, skipped, left_out ({reason: images}),
             seconds

    PackError or OSError, with nothing left at out, for whatever the user can mend.
    """
    started = time.monotonic()
    out = os.path.abspath(out)
    check_paths(src, out, root)
    sources = [open_source(path, kind, root) for path in src]
    if quality is not None and format in ("png", "raw"):
        raise PackError(f"--quality is of jpeg and webp, {format} loses nothing; leave it out")
    if split_by == "class" and split is None:
        raise PackError("--split-by class says how --split draws; give that too")
    if min_images is not None and classes is not None and not os.path.isfile(classes):
        raise PackError(f"--min-images {min_images} would change the class table of --classes {classes}; leave one out")
    encoding = Encoding(resize, format, quality)
    if check != "full" and encoding != KEPT:
        raise PackError(f"--check {check} is for images that keep their bytes, all others are decoded; leave it out")
    given, wanted = None, None
    if classes is not None and os.path.isfile(classes):
        wanted = names_in(classes)
    elif classes is not None:
        given = open_splits(classes)["train"]

    with new_folder(out) as partial, open(os.path.join(partial, "skipped.tsv"), "w", encoding="utf-8",
                                          errors="surrogateescape") as skipped_file:
        work, memory_bytes = os.path.join(partial, "work"), int(memory_mb * 1e6)
        os.mkdir(work)  # for files that go when the pack is whole
        skipped = Skipped(skipped_file, max_skipped)
        listing = Listing(work, memory_bytes, seed, wanted, split, split_by)
        with worker_pool(workers if duplicates != "keep" else 0) as pool, Progress("listing") as progress:
            repeated = Duplicates(os.path.join(work, "duplicates"), memory_bytes // 8, pool, 2 * workers + 1)
            for number, source in enumerate(sources):
                for record in source.records(skipped):
                    listed = listing.add(number, *record, may_repeat=source.may_repeat)
                    if listed is None:
                        skipped.ignored[f"images of classes that {classes} does not name"] += 1
                    elif duplicates != "keep":
                        repeated.add(listed, source.root, *record[1:4])
                    progress.add(1)
            repeated.end()
        splits = listing.splits
        if not CLASS_SPLITS & set(splits):
            raise PackError(f"{', '.join(src)}: no images"
                            f"{' of split train, which gives the classes' if splits else ''}{_why(skipped)}")
        if "" in splits and len(splits) > 1:
            raise PackError(f"{', '.join(src)}: some images have a split and others none; give all one, or none")
        if split is not None and split[0] not in splits:
            raise PackError(f"--split {split[0]}={split[1]} of {len(listing)} images draws no {split_by}; give more, "
                            "or leave it out")
        for what, count in sorted(skipped.ignored.items()):
            note(f"ignored {count} {what}")
        if repeats := listing.check_paths():
            note(f"{repeats} rows name a path again; their images are packed as often as they are named")
        has_weights, left_out = listing.has_weights, Counter()
        if duplicates == "keep" and max_images_per_class is None:
            fates = np.broadcast_to(np.uint8(Fate.KEPT), len(listing))  # takes no memory
        else:
            fates = zeros_file(os.path.join(work, "fates"), len(listing), np.uint8)
        if duplicates != "keep":
            left_out += _resolve(repeated, duplicates, fates, os.path.join(partial, "duplicates.tsv"))
        owner = "train" if given is None else "the pack of --classes"
        choice = choose(listing, listing.class_names() if given is None else names_of(given), owner, fates, work,
                        memory_bytes, min_images, max_images_per_class, split_by == "class")
        table, listed = choice.table, choice.counts
        left_out += choice.left_out
        for reason, count in left_out.items():
            note(f"left out {count} {LEFT_OUT[reason]}")
        if choice.num_few:
            note(f"{choice.num_few} classes have fewer than --min-images {min_images} and get no label; the labels of "
                 f"the others are 0, 1, 2, … {len(table) - 1}")
        if listing.has_gaps:
            note("the class names are numbers with gaps: their labels are 0, 1, 2, … without gaps")
        if wanted is not None and len(wanted) > len(table) + choice.num_few:
            note(f"{len(wanted) - len(table) - choice.num_few} classes of {classes} have no images and get no label")
        total = sum(int(counts.sum()) for counts in listed.values()) + skipped.count
        skipped.set_total(total)

        writers = {split: PackWriter(os.path.join(partial, split), shard_mb * 1e6,
                                     zeros_file(os.path.join(work, f"written-{split}"), len(table)), has_weights)
                   for split in splits}
        with worker_pool(workers) as pool, Progress("packing", total - skipped.count) as progress:
            roots = [source.root for source in sources]
            chunks = listing.chunks(table, fates, CHUNK_RECORDS, CHUNK_BYTES)
            images = read_in_order(pool, 2 * workers + 1, roots, chunks, max_pixels, encoding, check)
            for record, data, crc_or_reason in images:
                if data is None:
                    skipped.add(record.split, record.path, crc_or_reason)
                else:
                    writers[record.split].add(data, crc_or_reason, record.label, record.weight)
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
            "skipped": skipped.count, "left_out": left_out, "seconds": round(time.monotonic() - started, 3)}


def _resolve(repeated, rule, fates, path):
    """Writes the report of duplicates, says what was found, and returns what was left out {reason: images}."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        found, left_out = repeated.resolve(rule, fates, file)
    note(f"{found['contents']} images come several times: {found['repeats']} repeats of the same label, "
         f"{found['leaks']} in train that are in val or test too, {found['conflicts']} with several labels")
    return left_out


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
    add("--split-by", choices=("image", "class"), default="image", help="class: draw whole classes, which keep their "
        "labels, but train has no image of them: for features, as those of retrieval (%(default)s)")
    add("--min-images", type=between(1, 2**62), metavar="K", help="give no label to classes with fewer images in train "
        "(of --split-by class: anywhere), and leave out their images; 1: to those that lose all by --duplicates")
    add("--max-images-per-class", type=between(1, 2**62), metavar="M", help="of each class take M images for train, "
        "drawn at random, where it has more")
    add("--duplicates", choices=RULES, default="keep", help="images of the same bytes: report lists them in "
        "OUT/duplicates.tsv; drop also keeps only one of those with the same label, and none in train of those that "
        "are in val or test; drop-conflicting also keeps none of those with several labels (%(default)s)")
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
    add("--check", choices=CHECKS, default="full", help="what is looked at of images whose bytes are kept: full, that "
        "each decodes; header, its type, size and end, as data_tools/image_check.py says; none (%(default)s)")
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
