"""Lists the images of all sources and decides which are packed: the first stage of a pack."""

import os
from collections import Counter

import numpy as np

from data_tools.common.progress import Progress, note
from data_tools.packing.catalogue import CLASS_SPLITS, CatalogueWriter
from data_tools.packing.class_table import BLOCK
from data_tools.packing.duplicates import Duplicates
from data_tools.packing.path_splits import PathSplits
from data_tools.packing.select import choose
from data_tools.packing.skipped import LeftOut, Skipped
from data_tools.packing.spelling import Numbers, Spelling
from data_tools.packing.workers import worker_pool
from xc.data.pack import PackError

LEFT_OUT = {"split": "images of splits that --without names", "class": "images of classes that --classes does not name",
            "repeat": "images that repeat others", "leak": "images of train that are in val or test too",
            "conflict": "images with several labels", "few": "images of classes with fewer than --min-images",
            "many": "images beyond --max-images-per-class"}
REASONS = {"repeat": "repeats another image", "leak": "is in val or test too", "conflict": "has several labels",
           "few": "its class has fewer images than --min-images", "many": "beyond --max-images-per-class"}


def list_images(folder, sources, splits, wanted, table_of, options):
    """Writes a Catalogue of the records of all sources and of their classes into a folder.

    sources   [Source]
    splits    SplitNames, by which they are read
    wanted    array of the hashes of the class names to take; None: all
    table_of  Pack whose class table is used; None: the names of the images make it
    options   Options of the pack

    PackError where the images do not make a pack.
    """
    catalogue = CatalogueWriter(folder, options.memory_bytes, options.seed, wanted, options.split, options.split_by)
    skipped, listed_out, repeated = _take_all(catalogue, folder, sources, splits, options)
    _check_splits_of(catalogue, sources, skipped, listed_out, options)
    if unused := splits.unused():
        raise PackError(f"no split is called {', '.join(unused)}, which --without or --rename-split names; the images "
                        f"have the splits {', '.join(filter(None, catalogue.splits)) or 'none'}")
    catalogue.end_of_images()
    if repeats := catalogue.check_paths():
        note(f"{repeats} rows name a path that an earlier row named; these images are packed once for each row")
    has_weights = catalogue.has_weights

    def shown(path, root, is_file):
        return shown_path(path, sources[root].root, None if is_file else b"", sources)

    if options.duplicates != "keep":
        _resolve(repeated, options.duplicates, os.path.join(folder, "duplicates.tsv"), shown)
    choice = choose(catalogue, table_of, folder, options.min_images, options.max_images_per_class,
                    options.split_by == "class")
    choice = choice._replace(left_out=listed_out + choice.left_out)
    with LeftOut(os.path.join(folder, "left-out.tsv")) as left_out:
        for path, root, is_file, reason in catalogue.left_out():
            left_out.add(shown(path, root, is_file), REASONS[reason])
    _report(choice, wanted, options)
    catalogue.finish(choice, has_weights, skipped.tally)


def shown_path(path, root, data, sources):
    """The path of an image for messages: the whole path if there are several sources and the image is a file."""
    return os.path.join(os.path.abspath(root), path) if data is None and len(sources) > 1 else path


def _take_all(catalogue, folder, sources, splits, options):
    """(Skipped, {reason: images} left out, Duplicates) after all records of the sources are in the catalogue."""
    find_duplicates, spelling, numbers = options.duplicates != "keep", Spelling(options.normalize), Numbers()
    counts, in_paths = Counter(), PathSplits(splits)
    with (Skipped(os.path.join(folder, "skipped.tsv"), options.max_skipped) as skipped,
          LeftOut(os.path.join(folder, "left-out.tsv")) as left_out,
          worker_pool(options.workers if find_duplicates else 0) as pool, Progress("listing") as progress):
        repeated = Duplicates(catalogue.db, pool, 2 * options.workers + 1)
        roots = [os.path.realpath(source.root) for source in sources]
        for source, root in zip(sources, roots, strict=True):
            name = None
            number = roots.index(root)  # sources with the same root share its number: their files are the same
            for split, path, name, data, *weight in source.records(skipped):
                progress.add(1)
                if splits.without and splits.leaves_out(split):
                    left_out.add(shown_path(path, source.root, data, sources), f"its split is {split} (--without)")
                    counts["split"] += 1
                    continue
                if not split:
                    in_paths.take(path, data is None)
                if not name.isascii():
                    name = spelling.of(name)
                entry = catalogue.add(number, split, path, name, data, *weight, may_repeat=source.may_repeat)
                if entry is None:
                    left_out.add(shown_path(path, source.root, data, sources), "its class is none of --classes")
                    counts["class"] += 1
                elif find_duplicates:
                    repeated.add(entry, source.root, path, data)
            numbers.take(source, name)
            in_paths.end(source.path)
        repeated.end()
    spelling.note()
    return skipped, counts, repeated


def _check_splits_of(catalogue, sources, skipped, left_out, options):
    """PackError where the splits of the images do not make a pack."""
    splits, src = catalogue.splits, ", ".join(source.path for source in sources)
    if not CLASS_SPLITS & set(splits):
        raise PackError(f"{src}: no images{' of split train, which gives the classes' if splits else ''}"
                        f"{_reasons(skipped, left_out)}"
                        f"{'; --rename-split says which split is train' if splits else ''}")
    if "" in splits and len(splits) > 1:
        raise PackError(f"{src}: some images have a split and others none; give all one, or none")
    if options.split is not None and options.split[0] not in splits:
        name, share = options.split
        raise PackError(f"--split {name}={share} of {len(catalogue)} images draws no {options.split_by}; give more, "
                        "or leave it out")


def _reasons(skipped, left_out):
    what = [f"left out {count} {LEFT_OUT[reason]}" for reason, count in sorted(left_out.items())]
    if skipped.tally.count:
        what.append(f"{skipped.tally.count} skipped: {skipped.tally}")
    return f" ({'; '.join(what)})" if what else ""


def _resolve(repeated, rule, path, shown):
    """Writes the report of duplicates, and notes what was found."""
    with open(path, "w", encoding="utf-8", errors="surrogateescape") as file:
        found = repeated.resolve(rule, file, shown)
    note(f"{found['contents']} images come several times: {found['repeats']} repeats of the same label, "
         f"{found['leaks']} in train that are in val or test too, {found['conflicts']} with several labels")


def _report(choice, wanted, options):
    """Notes what was left out, and what may surprise about the labels."""
    for reason in LEFT_OUT:
        if count := choice.left_out[reason]:
            note(f"left out {count} {LEFT_OUT[reason]}")
    if choice.num_few:
        note(f"{choice.num_few} classes have fewer than --min-images {options.min_images} and get no label; the labels "
             f"of the others are 0, 1, 2, … {len(choice.table) - 1}")
    if choice.has_gaps:
        note("the class names are numbers with gaps: their labels are 0, 1, 2, … without gaps")
    if choice.num_spellings:
        pairs = ", ".join(f"{one!r} and {other!r}" for one, other in choice.spellings)
        more = ", …" * (choice.num_spellings > len(choice.spellings))
        note(f"{choice.num_spellings} class names come in two spellings of Unicode (NFC, NFD): "
             f"{pairs}{more}; --normalize nfc makes one class of each pair")
    absent = 0 if wanted is None else len(wanted) - len(choice.table) - choice.num_few
    if absent > 0:
        note(f"{absent} classes of {options.classes} have no images and get no label")
    for name in choice.counts:
        if "train" in choice.counts and options.split_by == "image" and (count := _unseen(choice.counts, name)):
            note(f"{count} classes have images in {name} and none in train")


def _unseen(counts, split):
    """Number of classes with images in a split and none in train, of {split: (C,) int64}."""
    pairs = ((counts[name][first : first + BLOCK] for name in (split, "train"))
             for first in range(0, len(counts["train"]), BLOCK))
    return sum(np.count_nonzero((of_split > 0) & (train == 0)) for of_split, train in pairs)
