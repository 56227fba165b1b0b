"""Makes a pack: lists the images, writes the shards of one part, and merges the parts when all are written."""

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
from data_tools.packing.encode import Encoding
from data_tools.packing.journal import Journal
from data_tools.packing.lease import run_once
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


@dataclass(frozen=True)
class Options:
    """The flags of data_tools.pack, which says what they mean; kind is --from, part is (I, N)."""

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
    part: tuple
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
    def memory_bytes(self):
        return int(self.memory_mb * 1e6)

    @property
    def encoding(self):
        return Encoding(self.resize, self.format, self.quality)


def pack(src, out, options):
    """Packs src, a list of paths or SPLIT=PATH, into the new folder out and returns a summary.

    returns  dict of totals over the splits: records, classes, bytes, shards, skipped, left_out ({reason: images}),
             seconds, and "splits", {split or "": {records, classes with images, bytes, shards}}. Of a part that was
             not the last: its own totals without classes, left_out and splits, and "part": "I/N".

    PackError or OSError for whatever the user can fix. There is nothing at out then; `workdir.what_is_kept` says what
    is kept.
    """
    started, out, how = time.monotonic(), os.path.abspath(out), options.reading
    given = given_sources(src, how.splits)
    check([path for _, path in given], out, options)
    job = Job(given, out, how, options)
    with owned(job.folder, job.number, out), cleaned_up(job.folder, out, job.parts, job.is_listed, job.has_shards):
        run_once(f"{job.listing}.claim", job.owner, job.is_listed, job.list_images)
        catalogue, journal = job.write_part()
        if not (missing := job.missing_parts()):
            job.merge_once(catalogue)
        if job.merged:
            lost = {split: lost_classes(catalogue, split, counts) for split, (_, counts) in job.merged.items()}
            discard(job.folder)
    if job.merged:
        facts = job.summary(catalogue, lost)
    else:
        note(f"part {job.number} of {job.parts} is done"
             f"{f', {missing} are to come; the last makes the pack' * bool(missing)}")
        facts = {"part": f"{job.number}/{job.parts}", **totals(journal.shards.values()), "skipped": journal.tally.count}
    return facts | {"seconds": round(time.monotonic() - started, 3)}


def check(src, out, options):
    """PackError for flags that contradict each other and paths that cannot be used."""
    if options.part[1] > 1 and is_pack(out):
        raise PackError(f"{out} is a pack: if these parts made it, all is done; else give another name")
    check_paths(src, out, options.root)
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
    if options.restart and options.part[1] > 1:
        raise PackError(f"--restart with --part would remove the work of other parts; remove {path_for(out)} yourself")


def describe(given, options):
    """dict for JSON of all that the bytes of a pack depend on, by the names of the flags."""
    flags = {"--from" if name == "kind" else f"--{name}".replace("_", "-"): value
             for name, value in dataclasses.asdict(options).items() if name not in NOT_DESCRIBED}
    classes, root = options.classes, options.root
    return {"SRC": [[split, os.path.abspath(path)] for split, path in given],
            "state of SRC": [fingerprint(path) for _, path in given],
            "--classes": classes and [os.path.abspath(classes), fingerprint(classes)],
            "--root": root and os.path.abspath(root), "parts": options.part[1],
            "versions": {"pack": layout.VERSION, "parts": 2, "Pillow": PIL.__version__}, **flags}


class Job:
    """One part of a pack that is being made.

    folder   the work folder, shared by all parts
    listing  folder of the Catalogue, shared too
    merged   {split: ([Shard], (C,) int64 images of each class)} once this process has merged the parts
    """

    def __init__(self, given, out, how, options):
        self.src, self.out, self.how, self.options = [path for _, path in given], out, how, options
        self.sources = [open_source(path, options.kind, how, split) for split, path in given]
        self.classes = None  # of --classes: hashes of the names to take, or the Pack whose class table to use
        if (path := options.classes) is not None:
            self.classes = names_in(path) if os.path.isfile(path) else open_splits(path)["train"]
        self.number, self.parts = options.part
        self.folder = open_folder(out, describe(given, options), options.restart)
        self.owner, self.listing = f"part-{self.number}", os.path.join(self.folder, "listing")
        self.part_folders = [os.path.join(self.folder, f"part-{i}") for i in range(self.parts)]
        self.merged, self.tally = {}, None

    def is_listed(self):
        return os.path.isdir(self.listing)

    def has_shards(self):
        """Whether this part has a shard that is complete."""
        return Journal(self.part_folders[self.number]).shards

    def list_images(self):
        new = f"{self.listing}-{self.owner}"
        shutil.rmtree(new, ignore_errors=True)  # a killed process may have left it
        os.mkdir(new)
        wanted, table_of = self.classes, None
        if not isinstance(wanted, array):
            wanted, table_of = None, wanted
        list_images(new, self.sources, self.how.splits, wanted, table_of, self.options)
        sync_tree(new)
        os.rename(new, self.listing)

    def write_part(self):
        """(Catalogue, Journal) of this part, all of whose shards are written."""
        catalogue, journal = Catalogue(self.listing), Journal(self.part_folders[self.number])
        if journal.taken:
            note(f"resuming after {journal.taken:,} of {catalogue.expected(self.number):,} images")
        if not journal.done:
            write_part(journal, catalogue, self.number, [source.root for source in self.sources], self.options)
        return catalogue, journal

    def missing_parts(self):
        """Number of parts that are not written yet. PackError where something else is at out."""
        if os.path.lexists(self.out):
            if self.parts == 1 or not is_pack(self.out):
                raise PackError(f"{self.out} has appeared meanwhile, and is not the pack; take it away")
            return 0  # then even the journals may be gone
        return sum(not Journal(place).done for place in self.part_folders)

    def merge_once(self, catalogue):
        """Merges the parts, unless another process does."""
        journals = [Journal(place) for place in self.part_folders]
        self.tally = sum((one.tally for one in journals), catalogue.skipped)
        self.tally.check(self.options.max_skipped, catalogue.total)
        names = [os.path.basename(os.path.abspath(path)) for path in self.src]
        source = ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)

        def make_pack():
            self.merged = merge(self.folder, self.out, catalogue, journals, self.tally, source=source,
                                seed=self.options.seed)

        run_once(os.path.join(self.folder, "pack.claim"), self.owner, lambda: os.path.lexists(self.out), make_pack)

    def summary(self, catalogue, lost):
        """Totals of the pack as `pack` returns them; notes on stderr what was left out.

        lost  {split: (number, first names)} of classes without images
        """
        if self.tally.count:
            note(f"skipped {self.tally.count} images, listed in {os.path.join(self.out, 'skipped.tsv')}: {self.tally}")
        for split, (count, names) in lost.items():
            if count:
                note(f"warning: {count} classes{split and f' of {split}'} lost all their images; they keep their "
                     f"labels: {', '.join(names)}{', …' if count > NAMED else ''}")
        splits = {split: {**totals([shards]), "classes": np.count_nonzero(counts)}
                  for split, (shards, counts) in self.merged.items()}
        return {**totals(shards for shards, _ in self.merged.values()), "classes": len(catalogue.table),
                "skipped": self.tally.count, "left_out": catalogue.left_out, "splits": splits}


def totals(shards_of_splits):
    """Records, bytes and shards over several lists of Shard."""
    shards = [shard for shards in shards_of_splits for shard in shards]
    return {"records": sum(shard.records for shard in shards), "bytes": sum(shard.num_bytes for shard in shards),
            "shards": len(shards)}


def lost_classes(catalogue, split, counts):
    """(number, first names) of the classes that were to be packed in a split and have no image in it."""
    labels = np.flatnonzero((catalogue.counts[split] > 0) & (counts == 0))
    return len(labels), [catalogue.table.name(label) for label in labels[:NAMED]]
