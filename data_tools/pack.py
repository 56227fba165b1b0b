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
OUT/skipped.tsv. OUT appears only when everything is done; before that there is a folder .OUT.partial-pack beside it,
which no reader accepts. Whatever ends a pack before, the same command goes on with that folder: behind the last shard
that is whole, or with the list of images if that was not. Several processes, on any nodes that share the folder, make
one pack by --part; the order of its records is that of one process.
The same SRC, seed and number of parts give the same bytes whatever the number of workers, the memory and interruptions.
While it runs, memory holds what --memory-mb allows, one shard, and some megabytes or images and one decoded image per
worker; the list is files in that folder, as large as the images that did not come in files of their own.
"""

import argparse
import codecs
import json
import os
import re
import shutil
import time
from array import array
from collections import Counter

import numpy as np
import PIL

from data_tools.checking import CHUNK_BYTES, CHUNK_RECORDS, KEPT, read_in_order, worker_pool
from data_tools.choosing import choose
from data_tools.claim import by_one
from data_tools.class_table import BLOCK, name_hash, names_of
from data_tools.command import Parser, between, check_paths, printing, stop_on_signals
from data_tools.duplicates import RULES, Duplicates
from data_tools.encoding import FORMATS, Encoding
from data_tools.image_check import CHECKS
from data_tools.journal import Journal
from data_tools.listing import CLASS_SPLITS, MAX_NAME_BYTES, Fate, FinishedListing, Listing, zeros_file
from data_tools.merge import merge
from data_tools.pack_writer import ShardWriter
from data_tools.partial_folder import discard, fingerprint, kept, left, open_folder, owned, path_for
from data_tools.progress import Progress, note
from data_tools.skipped import NAMED, Skipped
from data_tools.sources import KINDS, check_splits, is_pack, open_source
from xc import pack as layout
from xc.disk import sync_tree
from xc.pack import PackError, open_splits

LEFT_OUT = {"repeat": "images that repeat others", "leak": "images of train that are in val or test too",
            "conflict": "images with several labels", "few": "images of classes with fewer than --min-images",
            "many": "images beyond --max-images-per-class"}
# Of the parameters of `pack`, those that do not change its bytes, and those that `describe` has in another form.
BESIDE = {"memory_mb", "workers", "max_skipped", "out", "restart", "src", "classes", "root", "part"}


def pack(src, out, *, kind, classes, root, split, seed, shard_mb, memory_mb, workers, max_pixels, max_skipped,
         resize, format, quality, check, split_by, min_images, max_images_per_class, duplicates, part, restart):
    """Packs src, a list of paths, into the new folder out and says what became of it; the parameters are the flags.

    returns  dict of totals over the splits: records, classes, bytes, shards, skipped, left_out ({reason: images}),
             seconds, and "splits", {split or "": {records, classes with images, bytes, shards}}; of a part that was
             not the last, its own without classes, left_out and splits, and "part": "I/N"

    PackError or OSError, with nothing at out, for whatever the user can mend; `partial_folder.left` says what is kept.
    """
    of_bytes = {name: value for name, value in locals().items() if name not in BESIDE}
    started, (number, parts) = time.monotonic(), part
    out, memory_bytes = os.path.abspath(out), int(memory_mb * 1e6)
    if parts > 1 and is_pack(out):
        raise PackError(f"{out} is a pack: if it is that of these parts, all is done; else give another name")
    check_paths(src, out, root)
    if quality is not None and format in ("png", "raw"):
        raise PackError(f"--quality is of jpeg and webp, {format} loses nothing; leave it out")
    if split_by == "class" and split is None:
        raise PackError("--split-by class says how --split draws; give that too")
    if min_images is not None and classes is not None and not os.path.isfile(classes):
        raise PackError(f"--min-images {min_images} would change the class table of --classes {classes}; leave one out")
    encoding = Encoding(resize, format, quality)
    if check != "full" and encoding != KEPT:
        raise PackError(f"--check {check} is for images that keep their bytes, all others are decoded; leave it out")
    if restart and parts > 1:
        raise PackError(f"--restart with --part would remove what other parts do; remove {path_for(out)} yourself")
    sources = [open_source(path, kind, root) for path in src]
    named = None
    if classes is not None:
        named = names_in(classes) if os.path.isfile(classes) else open_splits(classes)["train"]

    folder = open_folder(out, describe(src, classes, root, parts, of_bytes), restart)
    owner, listing = f"part-{number}", os.path.join(folder, "listing")
    places, merged = [os.path.join(folder, f"part-{i}") for i in range(parts)], {}

    def make_listing():
        new = f"{listing}-{owner}"
        shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
        os.mkdir(new)
        list_sources(new, src, sources, classes, named, seed, parts, memory_bytes, workers, max_skipped, split,
                     split_by, min_images, max_images_per_class, duplicates)
        sync_tree(new)
        os.rename(new, listing)

    def make_pack():
        names = [os.path.basename(os.path.abspath(path)) for path in src]
        source = ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)
        merged.update(merge(folder, out, listed, journals, tally, source=source, seed=seed))

    with owned(folder, number, out), kept(folder, out, parts, lambda: os.path.isdir(listing),
                                          lambda: Journal(places[number]).shards):
        by_one(f"{listing}.claim", owner, lambda: os.path.isdir(listing), make_listing)
        listed, journal = FinishedListing(listing), Journal(places[number])
        if journal.taken:
            note(f"going on behind {journal.taken:,} of {listed.expected(number):,} images")
        if not journal.done:
            write_part(journal, listed, number, [source.root for source in sources], shard_mb * 1e6, memory_bytes,
                       workers, max_skipped, max_pixels, encoding, check)
        if os.path.lexists(out) and not (parts > 1 and is_pack(out)):
            raise PackError(f"{out} has appeared meanwhile, and is not the pack; take it away")
        journals = [Journal(place) for place in places]
        to_come = 0 if os.path.lexists(out) else sum(not one.done for one in journals)  # or all may be gone already
        if not to_come:
            tally = sum((one.tally for one in journals), listed.skipped)
            tally.check(max_skipped, listed.total)
            by_one(os.path.join(folder, "pack.claim"), owner, lambda: os.path.lexists(out), make_pack)
        if merged:
            lost = {split: lost_classes(listed, split, counts) for split, (_, counts) in merged.items()}
            discard(folder)

    if not merged:
        note(f"part {number} of {parts} is done{f', {to_come} are to come; the last makes the pack' * bool(to_come)}")
        return {"part": f"{number}/{parts}", **totals(journal.shards.values()), "skipped": journal.tally.count,
                "seconds": round(time.monotonic() - started, 3)}
    if tally.count:
        note(f"skipped {tally.count} images, listed in {os.path.join(out, 'skipped.tsv')}: {tally}")
    for split, (count, names) in lost.items():
        if count:
            note(f"warning: {count} classes{_of(split)} lost all their images; they keep their labels: "
                 + ", ".join(names) + (", …" if count > NAMED else ""))
    splits = {split: {**totals([shards]), "classes": np.count_nonzero(counts)}
              for split, (shards, counts) in merged.items()}
    return {**totals(shards for shards, _ in merged.values()), "classes": len(listed.table), "skipped": tally.count,
            "left_out": listed.left_out, "splits": splits, "seconds": round(time.monotonic() - started, 3)}


def describe(src, classes, root, parts, of_bytes):
    """dict for JSON of all that the bytes of a pack depend on, with the names of the flags."""
    flags = {"--from" if name == "kind" else f"--{name}".replace("_", "-"): value for name, value in of_bytes.items()}
    return {"SRC": [os.path.abspath(path) for path in src], "state of SRC": [fingerprint(path) for path in src],
            "--classes": classes and [os.path.abspath(classes), fingerprint(classes)],
            "--root": root and os.path.abspath(root), "parts": parts,
            "versions": {"pack": layout.VERSION, "parts": 2, "Pillow": PIL.__version__}, **flags}


def list_sources(folder, src, sources, classes, named, seed, parts, memory_bytes, workers, max_skipped, split, split_by,
                 min_images, max_images_per_class, duplicates):
    """Lists the records of all sources and their classes into a folder, for FinishedListing.

    named  of --classes: array of the hashes of the names that are wanted, or the Pack whose classes are taken
    """
    check_splits(src)
    wanted, given = (named, None) if isinstance(named, array) else (None, named)
    listing = Listing(folder, memory_bytes, seed, wanted, split, split_by, parts)
    with (Skipped(os.path.join(folder, "skipped.tsv"), max_skipped) as skipped,
          worker_pool(workers if duplicates != "keep" else 0) as pool, Progress("listing") as progress):
        repeated = Duplicates(os.path.join(folder, "duplicates"), memory_bytes // 8, pool, 2 * workers + 1)
        roots = [os.path.realpath(source.root) for source in sources]
        for source, root in zip(sources, roots, strict=True):
            number = roots.index(root)  # the first with the same root: its files are the same, too
            for record in source.records(skipped):
                listed = listing.add(number, *record, may_repeat=source.may_repeat)
                if listed is None:
                    skipped.ignored[f"images of classes that {classes} does not name"] += 1
                elif duplicates != "keep":
                    _, path, name, data = record[:4]
                    repeated.add(listed, source.root, _shown(path, source.root, data, sources), name, data)
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
        fates = zeros_file(os.path.join(folder, "fates"), len(listing), np.uint8)
    if duplicates != "keep":
        left_out += _resolve(repeated, duplicates, fates, os.path.join(folder, "duplicates.tsv"))
    owner = "train" if given is None else "the pack of --classes"
    choice = choose(listing, listing.class_names() if given is None else names_of(given), owner, fates, folder,
                    memory_bytes, min_images, max_images_per_class, split_by == "class")
    left_out += choice.left_out
    for reason, count in left_out.items():
        note(f"left out {count} {LEFT_OUT[reason]}")
    if choice.num_few:
        note(f"{choice.num_few} classes have fewer than --min-images {min_images} and get no label; the labels of "
             f"the others are 0, 1, 2, … {len(choice.table) - 1}")
    if listing.has_gaps:
        note("the class names are numbers with gaps: their labels are 0, 1, 2, … without gaps")
    absent = 0 if wanted is None else len(wanted) - len(choice.table) - choice.num_few
    if absent > 0:
        note(f"{absent} classes of {classes} have no images and get no label")
    for name in choice.counts:
        if "train" in choice.counts and split_by == "image" and (count := _unseen(choice.counts, name)):
            note(f"{count} classes have images in {name} and none in train")
    listing.finish(choice.table, has_weights, left_out, skipped.tally)


def write_part(journal, listed, number, roots, shard_bytes, memory_bytes, workers, max_skipped, *checking):
    """Writes the shards of a part of what is listed, from where its journal ends.

    checking  max_pixels, encoding, check of check_images
    """
    split, writer, taken = None, None, journal.taken
    os.makedirs(journal.folder, exist_ok=True)
    with Skipped(os.path.join(journal.folder, "skipped.tsv"), max_skipped, listed.total, listed.skipped,
                 journal.skipped) as skipped:

        def end_shard(start):
            journal.add(split, writer and writer.write(), start, skipped.state(), taken)

        chunks = listed.chunks(number, memory_bytes // 2, CHUNK_RECORDS, CHUNK_BYTES, journal.start)
        with worker_pool(workers) as pool, Progress("packing", listed.expected(number), done=taken) as progress:
            images = read_in_order(pool, 2 * workers + 1, roots, chunks, *checking)
            for record, data, crc_or_reason in images:
                if data is None:
                    path = _shown(record.path, roots[record.root], record.data, roots)
                    skipped.add(record.split, path, crc_or_reason)
                else:
                    if writer and not (split == record.split and writer.fits(data)):
                        end_shard(record.key)
                    if split != record.split:
                        split = record.split
                        writer = ShardWriter(os.path.join(journal.folder, split), shard_bytes, listed.has_weights,
                                             len(journal.shards.get(split, ())))
                    writer.add(data, crc_or_reason, record.label, record.weight)
                taken += 1
                progress.add(1)
        end_shard(None)


def _shown(path, root, data, sources):
    """What reports call an image: of one of several sources whose images are files, the whole path."""
    return os.path.join(os.path.abspath(root), path) if data is None and len(sources) > 1 else path


def _unseen(counts, split):
    """Number of classes with images in a split and none in train, of {split: (C,) int64}."""
    pairs = ((counts[name][first : first + BLOCK] for name in (split, "train"))
             for first in range(0, len(counts["train"]), BLOCK))
    return sum(np.count_nonzero((of_split > 0) & (train == 0)) for of_split, train in pairs)


def totals(shards_of_splits):
    shards = [shard for shards in shards_of_splits for shard in shards]
    return {"records": sum(shard.records for shard in shards), "bytes": sum(shard.num_bytes for shard in shards),
            "shards": len(shards)}


def lost_classes(listed, split, counts):
    """(number, first names) of the classes that were to be packed in a split, and have no image in it."""
    labels = np.flatnonzero((listed.counts[split] > 0) & (counts == 0))
    return len(labels), [listed.table.name(label) for label in labels[:NAMED]]


def _resolve(repeated, rule, fates, path):
    """Writes the report of duplicates, says what was found, and returns what was left out {reason: images}."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        found, left_out = repeated.resolve(rule, fates, file)
    note(f"{found['contents']} images come several times: {found['repeats']} repeats of the same label, "
         f"{found['leaks']} in train that are in val or test too, {found['conflicts']} with several labels")
    return left_out


def names_in(path):
    """Sorted array of the hashes of the class names in a text file, one a line."""
    hashes = array("Q")
    with open(path, "rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while line := file.readline(MAX_NAME_BYTES + 3):
            if name := line.rstrip(b"\r\n"):
                hashes.append(name_hash(name))
    return array("Q", np.unique(np.frombuffer(hashes, np.uint64)).tobytes())


def _why(skipped):
    what = [f"{count} {what} ignored" for what, count in sorted(skipped.ignored.items())]
    if skipped.tally.count:
        what.append(f"{skipped.tally.count} skipped: {skipped.tally}")
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


def part_of(text):
    match = re.fullmatch(r"(\d{1,4})/(\d{1,4})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"{text} is not like 0/16: a part from 0 up, and how many there are")
    return int(match[1]), int(match[2])


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
    add("--part", type=part_of, default=(0, 1), metavar="I/N", help="do part I of N, from 0/N up, each in a process of "
        "its own with the same flags; the last makes the pack of all")
    add("--restart", action="store_true", help="begin anew, and remove what an interrupted pack has left")
    add("--json", action="store_true", help="print the JSON object alone, without the lines before it")
    args = parser.parse_args(argv)
    as_json = vars(args).pop("json")
    try:
        facts = pack(**vars(args))
    except PackError as error:
        parser.error(str(error))
    except (OSError, RuntimeError) as error:  # h5py has either for a disk that refuses
        parser.error(f"{args.out}: {error}; {left(args.out)}")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted; {left(args.out)}\n")
    with printing(parser):
        for split, of_split in {} if as_json else facts.get("splits", {}).items():
            print(f"{os.path.join(args.out, split).rstrip('/')}: {of_split['records']} images of {of_split['classes']} "
                  f"classes, {of_split['bytes'] / 1e6:.1f} MB in {of_split['shards']} shards")
        print(json.dumps(facts))


if __name__ == "__main__":
    stop_on_signals()
    main()
