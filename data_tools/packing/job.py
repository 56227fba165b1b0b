"""Makes a pack: lists the images, writes the shards of each part, and merges them. --part asks for one of these."""

import dataclasses
import os
import shutil
import time
from array import array
from dataclasses import dataclass

import numpy as np
import PIL

from data_tools.common.command import check_paths
from data_tools.common.progress import note
from data_tools.packing.catalogue import Catalogue
from data_tools.packing.database import errors
from data_tools.packing.encode import Encoding
from data_tools.packing.journal import Journal
from data_tools.packing.list_images import list_images
from data_tools.packing.merge import merge
from data_tools.packing.select import names_in
from data_tools.packing.skipped import NAMED
from data_tools.packing.workdir import cleaned_up, discard, fingerprint, open_folder, owned, path_for
from data_tools.packing.workers import KEPT
from data_tools.packing.write_part import write_part
from data_tools.sources.base import Reading
from data_tools.sources.detect import given_sources, open_source
from data_tools.sources.packs import is_pack
from data_tools.sources.splits import SplitNames
from xc.data import pack as layout
from xc.data.pack import PackError, open_splits
from xc.files import sync_tree

# Options that do not change the bytes of a pack, and those that `describe` has in another form.
NOT_DESCRIBED = {"memory_mb", "workers", "max_skipped", "restart", "classes", "root", "part"}

LISTING = "listing"  # in the work folder


@dataclass(frozen=True)
class Options:
    """The flags of data_tools.pack, which says what they mean; kind is --from, part is (I, "list" or "merge", N)."""

    kind: str | None
    path_column: str | None
    label_column: str | None
    split_column: str | None
    weight_column: str | None
    header: bool
    text_encoding: str
    rename_split: tuple  # of (name, split)
    without: tuple
    normalize: str
    classes: str | None
    root: str | None
    split: tuple | None
    split_by: str
    min_images: int | None
    max_images_per_class: int | None
    duplicates: str
    seed: int
    shard_mb: float
    memory_mb: float
    workers: int
    max_pixels: int
    max_skipped: str
    resize: int | None
    format: str | None
    quality: int | None
    check: str
    part: tuple | None
    restart: bool

    @property
    def reading(self):
        """How the sources are read."""
        columns = {"path": self.path_column, "label": self.label_column, "split": self.split_column,
                   "weight": self.weight_column}
        columns = {what: name for what, name in columns.items() if name is not None}
        splits = SplitNames({name.lower(): split for name, split in self.rename_split}, map(str.lower, self.without))
        return Reading(columns, self.header, self.text_encoding, self.root, splits=splits)

    @property
    def stage(self):
        """What this process does: "list", "part", "merge", or "all"."""
        if self.part is None:
            return "all"
        return self.part[0] if isinstance(self.part[0], str) else "part"

    @property
    def number(self):
        return self.part[0] if self.stage == "part" else 0

    @property
    def parts(self):
        return 1 if self.part is None else self.part[1]

    @property
    def memory_bytes(self):
        return int(self.memory_mb * 1e6)

    @property
    def encoding(self):
        return Encoding(self.resize, self.format, self.quality)


def pack(src, out, options):
    """Packs src, a list of paths or SPLIT=PATH, into the new folder out and returns a summary.

    returns  dict of totals over the splits: records, classes, bytes, shards, skipped, left_out ({reason: images}),
             seconds, and "splits", {split or "": {records, classes with images, bytes, shards}}. With --part list/N and
             I/N it has "part", the text of that flag, and what is known then.

    PackError or OSError for whatever the user can fix. There is nothing at out then; `workdir.what_is_kept` says what
    is kept.
    """
    started, out, how = time.monotonic(), os.path.abspath(out), options.reading
    given = given_sources(src, how.splits)
    check([path for _, path in given], out, options)
    job = Job(given, out, how, options)
    with owned(job.folder, job.owner, out):
        with cleaned_up(job.folder, out, options.stage == "all", job.is_listed, job.has_shards), errors():
            facts = job.run()
        if options.stage in ("all", "merge"):
            discard(job.folder)
    return facts | {"seconds": round(time.monotonic() - started, 3)}


def check(src, out, options):
    """PackError for flags that contradict each other and paths that cannot be used."""
    if options.stage != "all" and is_pack(out):
        raise PackError(f"{out} is a pack: if these parts made it, all is done; else give another name")
    check_paths(src, out, options.root)
    renamed = [name.lower() for name, _ in options.rename_split]
    for name in renamed:
        if renamed.count(name) > 1:
            raise PackError(f"--rename-split says twice what {name} is; say it once")
        if name in map(str.lower, options.without):
            raise PackError(f"--without {name} leaves out what --rename-split {name}=… takes; leave one out")
    if options.quality is not None and options.format in ("png", "raw"):
        raise PackError(f"--quality is for jpeg and webp, but {options.format} loses nothing; leave it out")
    if options.split_by == "class" and options.split is None:
        raise PackError("--split-by class says how --split draws; give that too")
    classes = options.classes
    if options.min_images is not None and classes is not None and not os.path.isfile(classes):
        raise PackError(f"--min-images {options.min_images} would change the class table of --classes {classes}; leave "
                        "one out")
    if options.check != "full" and options.encoding != KEPT:
        raise PackError(f"--check {options.check} is for images that keep their bytes, all others are decoded; leave "
                        "it out")
    if options.stage in ("part", "merge"):
        if options.restart:
            raise PackError("--restart would remove the work of other parts; give it with --part list/N, which begins "
                            "anew, or leave it out")
        if not os.path.isdir(os.path.join(path_for(out), LISTING)):
            raise PackError(f"{out}: its images are not listed yet; run this command with --part list/{options.parts} "
                            "first")


def describe(given, options):
    """dict for JSON of all that the bytes of a pack depend on, by the names of the flags."""
    flags = {"--from" if name == "kind" else f"--{name}".replace("_", "-"): value
             for name, value in dataclasses.asdict(options).items() if name not in NOT_DESCRIBED}
    classes, root = options.classes, options.root
    return {"SRC": [[split, os.path.abspath(path)] for split, path in given],
            "state of SRC": [fingerprint(path) for _, path in given],
            "--classes": classes and [os.path.abspath(classes), fingerprint(classes)],
            "--root": root and os.path.abspath(root), "parts": options.part and options.parts,
            "versions": {"pack": layout.VERSION, "parts": 3, "Pillow": PIL.__version__}, **flags}


class Job:
    """What this process does of a pack that is being made.

    folder   the work folder, which all processes of the pack share
    listing  folder of the Catalogue, shared too
    """

    def __init__(self, given, out, how, options):
        self.src, self.out, self.how, self.options = [path for _, path in given], out, how, options
        self.sources = [open_source(path, options.kind, how, split) for split, path in given]
        self.classes = None  # of --classes: hashes of the names to take, or the Pack whose class table to use
        if (path := options.classes) is not None:
            self.classes = names_in(path) if os.path.isfile(path) else open_splits(path)["train"]
        self.folder = open_folder(out, describe(given, options), options.restart)
        self.owner = 0 if options.stage == "all" else options.part[0]  # of a lock
        self.listing = os.path.join(self.folder, LISTING)
        self.part_folders = [os.path.join(self.folder, f"part-{i}") for i in range(options.parts)]

    def is_listed(self):
        return os.path.isdir(self.listing)

    def has_shards(self):
        """Whether this part has a shard that is complete."""
        return Journal(self.part_folders[self.options.number]).shards

    def run(self):
        """Does what --part asks for, and returns facts of it."""
        stage, parts = self.options.stage, self.options.parts
        if stage in ("all", "list") and not self.is_listed():
            self.list_images()
        catalogue = Catalogue(self.listing)
        if stage == "list":
            note(f"the images are listed; now run --part 0/{parts}" + f" to --part {parts - 1}/{parts}" * (parts > 1) +
                 f", then --part merge/{parts}")
            return {"part": f"list/{parts}", "images": catalogue.num_images, "classes": len(catalogue.table),
                    "skipped": catalogue.skipped.count, "left_out": catalogue.left_out}
        if stage in ("all", "part"):
            journal = self.write_part(catalogue)
        if stage == "part":
            note(f"part {self.options.number} of {parts} is written; when all are, run --part merge/{parts}")
            return {"part": f"{self.options.number}/{parts}", **totals(journal.shards.values()),
                    "skipped": journal.tally.count}
        return self.merge(catalogue)

    def list_images(self):
        new = f"{self.listing}-new"
        shutil.rmtree(new, ignore_errors=True)  # a killed process may have left it
        os.mkdir(new)
        wanted, table_of = self.classes, None
        if not isinstance(wanted, array):
            wanted, table_of = None, wanted
        list_images(new, self.sources, self.how.splits, wanted, table_of, self.options)
        sync_tree(new)
        os.rename(new, self.listing)

    def write_part(self, catalogue):
        """The Journal of this part, all of whose shards are written."""
        journal = Journal(self.part_folders[self.options.number])
        if journal.taken:
            expected = catalogue.expected(self.options.number, self.options.parts)
            note(f"resuming after {journal.taken:,} of {expected:,} images")
        if not journal.done:
            write_part(journal, catalogue, [source.root for source in self.sources], self.options)
        return journal

    def merge(self, catalogue):
        """Makes the pack of all parts, and returns facts of it. PackError where a part is not written yet."""
        if os.path.lexists(self.out):
            raise PackError(f"{self.out} has appeared meanwhile, and is not the pack; take it away")
        journals, parts = [Journal(place) for place in self.part_folders], self.options.parts
        if missing := [number for number, journal in enumerate(journals) if not journal.done]:
            named = ", ".join(map(str, missing[:NAMED])) + ", …" * (len(missing) > NAMED)
            raise PackError(f"{len(missing)} of {parts} parts are not written yet: {named}; run them, as --part "
                            f"{missing[0]}/{parts}, then --part merge/{parts} again")
        tally = sum((one.tally for one in journals), catalogue.skipped)
        tally.check(self.options.max_skipped, catalogue.total)
        names = [os.path.basename(os.path.abspath(path)) for path in self.src]
        source = ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)
        merged = merge(self.folder, self.out, catalogue, journals, tally, source=source, seed=self.options.seed)
        return self.summary(catalogue, merged, tally)

    def summary(self, catalogue, merged, tally):
        """Totals of the pack as `pack` returns them; notes on stderr what was left out.

        merged  {split: ([Shard], (C,) int64 images of each class)}
        tally   Tally of all images that could not be packed
        """
        if tally.count:
            note(f"skipped {tally.count} images, listed in {os.path.join(self.out, 'skipped.tsv')}: {tally}")
        for split, (_, counts) in merged.items():
            count, names = lost_classes(catalogue, split, counts)
            if count:
                note(f"warning: {count} classes{split and f' of {split}'} lost all their images; they keep their "
                     f"labels: {', '.join(names)}{', …' if count > NAMED else ''}")
        splits = {split: {**totals([shards]), "classes": np.count_nonzero(counts)}
                  for split, (shards, counts) in merged.items()}
        return {**totals(shards for shards, _ in merged.values()), "classes": len(catalogue.table),
                "skipped": tally.count, "left_out": catalogue.left_out, "splits": splits}


def totals(shards_of_splits):
    """Records, bytes and shards over several lists of Shard."""
    shards = [shard for shards in shards_of_splits for shard in shards]
    return {"records": sum(shard.records for shard in shards), "bytes": sum(shard.num_bytes for shard in shards),
            "shards": len(shards)}


def lost_classes(catalogue, split, counts):
    """(number, first names) of the classes that were to be packed in a split and have no image in it."""
    labels = np.flatnonzero((catalogue.counts[split] > 0) & (counts == 0))
    return len(labels), [catalogue.table.name(label) for label in labels[:NAMED]]
