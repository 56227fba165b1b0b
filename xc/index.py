"""Search by picture: python -m xc.index build | query | evaluate

    python -m xc.index build runs/photos --out rows.index                    class rows: which class is an image of?
    python -m xc.index build runs/photos photos/train --out photos.index     features of images: which image is like it?
    python -m xc.index query photos.index photos/test --top 5 --sheet hits.png
    python -m xc.index evaluate runs/photos packs/test                       recall@1, @10, @100 and mAP, exact

An index is a folder: index.faiss, which any faiss reads, names.parquet and index.json. The commands run on one process
or on many ranks.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

from data_tools.common.atomic import atomic_path
from data_tools.common.command import between, check_paths, stop_on_signals
from data_tools.common.progress import note
from xc.checkpoint.saved_run import chosen
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.data.evaluated import has_pairs
from xc.data.loader import Loader
from xc.data.pack import INDEX_FILE, Pack, open_splits
from xc.data.pack_split import PackSplit
from xc.errors import UserError
from xc.train.evaluate import note_on_unmatched
from xc.train.retrieval import features_and_labels, retrieval_scores
from xc.use.features import passes
from xc.use.hit_sheet import Sheet
from xc.use.index_build import build_index, hidden_folder
from xc.use.index_folder import check_same, open_index, read_meta, what_made, write_index
from xc.use.index_input import class_rows, feature_rows
from xc.use.index_recall import measured
from xc.use.index_types import TYPES, check_type, factory_of, new_index
from xc.use.job import ImageJob, Job, Parser, add_reading_flags, progress_of
from xc.use.neighbours import Printed, found_for, neighbour_rows, table_of
from xc.use.trained import open_run

_PASS = 4096  # images that are searched for at once


def parser():
    """The commands and their flags."""
    parser = Parser(prog="xc.index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def command(main, name, help):
        one = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        one.set_defaults(main=main)
        return one, one.add_argument

    one, add = command(build, "build", "index class rows, or the features of images")
    add("run", metavar="RUN", help="the --out of train.py")
    add("src", metavar="SRC", nargs="?", help="images to index: a folder, one image, or anything that data_tools.pack "
        "reads; without it the class rows are indexed")
    add("--out", required=True, metavar="DIR", help="the folder to write; it must not exist")
    add("--type", default="flat", help=f"{', '.join(TYPES)}, or a factory string of faiss as IVF4096,SQ8 (%(default)s)")
    add("--target-recall", type=between(0, 1, float), default=0.95, help="recall@10 that the number of cells (ivf) or "
        "candidates (hnsw) of a search is chosen for (%(default)s)")
    add("--classes", default="", metavar="PACK", help="of class rows: pack with their names (the --data of the run)")
    add("--seed", type=between(0, 2**32 - 1), default=0, help="of the samples that train and measure (%(default)s)")
    add_reading_flags(one)

    one, add = command(query, "query", "print the neighbours of images in an index")
    add("index", metavar="DIR", help="the --out of build")
    add("src", metavar="SRC", help="query images: a folder, one image, or anything that data_tools.pack reads")
    add("--top", type=between(1, 1000), default=10, help="neighbours of each image (%(default)s)")
    add("--out", metavar="FILE", help="write them as .csv, .jsonl or .parquet, and print none")
    add("--sheet", metavar="PNG", help="draw the first queries with their neighbours")
    add("--run", default="", help="the run, where it is no longer where build found it")
    add("--classes", default="", metavar="PACK", help="of class rows: pack with pictures for --sheet (the --data "
        "of the run)")
    add_reading_flags(one, "that of the index")

    one, add = command(evaluate, "evaluate", "recall@1, @10, @100 and mAP of the images of a pack among each other")
    add("run", metavar="RUN", help="the --out of train.py")
    add("pack", metavar="PACK", help="a pack, as packs/test; its classes need not be those of the run")
    add("--max-bad-records", type=between(0, 2**62), default=0, help="records that may be left out as they cannot be "
        "read (%(default)s)")
    add_reading_flags(one)
    return parser


def main(argv=None):
    """Collective."""
    args = parser().parse_args(argv)
    if getattr(args, "src", None):
        args.src = args.src.rstrip("/") or "/"  # a name of an image begins with that of its source
    args.main(args, open_world(args.device))


def build(args, world):
    """Build an index, measure its recall, and write its folder."""
    started = time.monotonic()
    checkpoint = chosen(args.run, args.checkpoint, world)
    with world.raise_on_all_ranks():
        if world.rank == 0:
            check_paths([args.src] if args.src else [], os.path.abspath(args.out), None)
        if args.src and args.classes:
            raise UserError(f"--classes {args.classes} names class rows, and {args.src} is indexed: leave out one of "
                            "them")
        trained = open_run(args.run, checkpoint, world, rows=not args.src)
        check_type(args.type, trained.feature_dim)
        table = None if args.src else trained.class_table(args.classes)
        if table:
            new_index(args.type, trained.num_classes, trained.feature_dim)
    job = ImageJob(args, trained, world)
    with hidden_folder(args.out, world) as folder:
        vectors = feature_rows(job, folder, world) if args.src else class_rows(trained, table, folder, world)
        index = build_index(vectors, args.type, args.seed, folder, world)
        facts = {"type": args.type, "factory": factory_of(args.type, vectors.count, vectors.width),
                 "count": vectors.count, **measured(index, vectors, args.target_recall, args.seed, world)}
        facts["seconds"] = round(time.monotonic() - started, 3)
        of = {"of": "images" if args.src else "classes", "source": os.path.abspath(args.src) if args.src else "",
              "working_folder": os.getcwd(), "run": os.path.abspath(args.run), **what_made(trained)}
        with world.raise_on_all_ranks():
            if world.rank == 0:
                vectors.remove()
                write_index(folder, index, of | facts)
    say_recall(facts, args, world)
    if args.src:
        job.report(out=args.out, **facts)
    elif world.rank == 0:
        print(json.dumps({"out": args.out, **facts, "checkpoint": trained.folder.name}), flush=True)


def say_recall(facts, args, world):
    """One line on what was built, and a note where it finds less than was asked for."""
    if world.rank:
        return
    if facts["recall_at_10"] is None:
        print("1 vector, which has no neighbour to measure recall by", flush=True)
        return
    search = "".join(f", {name} {value}" for name, value in facts["search"].items())
    print(f"{facts['count']} vectors in {facts['factory']}{search}: recall@1 {facts['recall_at_1']:.4f}, recall@10 "
          f"{facts['recall_at_10']:.4f} of exact search, by {facts['recall_queries']} queries", flush=True)
    if facts["recall_at_10"] < args.target_recall:
        note(f"recall@10 is below --target-recall {args.target_recall}: a type with more bits of a vector finds more")


def query(args, world):
    """Search the neighbours of images, and print, write or draw them."""
    with world.raise_on_all_ranks():
        meta = read_meta(args.index)
        if not os.path.exists(args.src):
            raise UserError(f"{args.src}: no such file or folder: name images")
        if args.sheet and world.rank == 0:
            check_sheet(args.src, args.sheet)
        if args.classes and (not args.sheet or meta["of"] == "images"):
            raise UserError(f"--classes {args.classes} has pictures of classes for --sheet: leave it out")
    job = Job(args, (".parquet", ".csv", ".jsonl"), world, open_trained=lambda: trained_of(meta, args, world))
    with world.raise_on_all_ranks():
        index = open_index(args.index, meta, searches=world.rank == 0)
        sheet = None
        if args.sheet and world.rank == 0:
            sheet = Sheet(index, args.src, pack_for_pictures(meta, job.trained, args))
    top = min(args.top, meta["count"])

    def rows(images, features):
        scores, found = found_for(features.cpu().numpy(), index, top)
        if sheet:
            sheet.add(images, scores, found)
        return (neighbour_rows(images, scores, found, index),)

    with job.writing(lambda *paths: table_of(*paths, job.suffix) if paths else Printed()) as write:
        for images, features in passes(job.batches("searching"), _PASS):
            write(rows, images, job.trained.directions(features))
        job.check_any_result()
        with world.raise_on_all_ranks():
            if sheet:
                with atomic_path(args.sheet) as partial:
                    Path(partial).write_bytes(sheet.png())
    job.report(index=args.index)


def trained_of(meta, args, world):
    """The Trained that an index was built with. UserError where it is gone, or another one."""
    folder, checkpoint = Path(args.run or meta["run"]), args.checkpoint or meta["checkpoint"]
    if not args.run and not (folder / "config.json").is_file():
        raise UserError(f"{args.index} was built from the run {folder}, which is not there: name it by --run")
    if not args.checkpoint and folder.is_dir() and not (folder / "checkpoints" / checkpoint).is_dir():
        raise UserError(f"{args.index} was built with {checkpoint}, which {folder} does not have: build the index "
                        "again, or name a run that has it by --run")
    trained = open_run(folder, checkpoint, world, rows=False)
    check_same(args.index, meta, trained)
    return trained


def pack_for_pictures(meta, trained, args):
    """The Pack that has images of the classes; None where the index is one of images, or the pack is gone."""
    if meta["of"] == "images":
        return None
    try:
        return trained.training_pack(args.classes)
    except UserError as error:
        if args.classes:
            raise
        note(f"classes have no pictures: {error}")
        return None


def check_sheet(src, path):
    """UserError for a name of a picture that cannot be written, before anything is read."""
    if not path.endswith(".png"):
        raise UserError(f"--sheet {path}: name a file that ends in .png")
    check_paths([src], os.path.abspath(path), None)


def evaluate(args, world):
    """Retrieval metrics of the images of a pack: the last line is one JSON object."""
    started, checkpoint = time.monotonic(), chosen(args.run, args.checkpoint, world)
    with world.raise_on_all_ranks():
        pack = one_pack(args.pack)
        if not has_pairs(PackSplit(pack, 1, 8)):
            raise UserError(f"no class of {args.pack} has two images, of which one could find the other: name another "
                            "pack")
        trained = open_run(args.run, checkpoint, world, rows=False)
        cfg = dataclasses.replace(trained.cfg, max_bad_records=args.max_bad_records,
                                  loader_threads=args.loader_threads)
        loader = Loader(PackSplit(pack, cfg.channels, cfg.image_size, cfg.max_bad_records), cfg, world)
    with progress_of("computing features", len(pack), world) as add:
        batches = counted(loader.test(args.batch_size * world.size), args.batch_size * world.size, len(pack), add)
        features, labels = features_and_labels(trained.backbone, trained, batches, world)
    bad = loader.bad_records()
    with progress_of("searching", len(pack) - (bad or 0), world) as add:
        scores, unmatched = retrieval_scores(features, labels, world.all_ranks, progress=add)
    with world.raise_on_all_ranks():
        if world.rank == 0:
            if unmatched:
                note(note_on_unmatched(args.pack, scores, [pack.class_name(label) for label in unmatched]))
            shown = {name: value for name, value in scores.items() if isinstance(value, float)}
            print("  ".join(f"{name} {value:.4f}" for name, value in shown.items()))
            print(json.dumps({"pack": args.pack, **scores, "bad_records": bad or 0, "checkpoint": trained.folder.name,
                              "seconds": round(time.monotonic() - started, 3)}), flush=True)


def one_pack(path):
    """The Pack at a path; UserError where it is a folder of packs."""
    if not (Path(path) / INDEX_FILE).exists():
        splits = open_splits(path)
        raise UserError(f"{path} has the splits {', '.join(splits)}: name one of them, as "
                        f"{Path(path) / list(splits)[-1]}")
    return Pack(path)


def counted(batches, size, total, add):
    """The batches; `add` is called with the number of images of all ranks in each."""
    done = 0
    for batch in batches:
        yield batch
        add(min(size, total - done))
        done += size


if __name__ == "__main__":
    stop_on_signals()
    run(main)
