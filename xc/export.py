"""A trained run as files that are used without this library: python -m xc.export RUN --out FOLDER

    python -m xc.export runs/photos --out exported
    python -m xc.export runs/photos --out extractor --features-only --formats onnx

The new folder has model.json, which says how an image becomes pixels and what the files hold, and by --formats

    onnx         model.onnx            pixels to features and probabilities, for onnxruntime
    pt2          model.pt2             the same graph for torch.export.load
    safetensors  backbone.safetensors  the weights by the names that published ones have
                 classes.safetensors   the class rows

and classes.jsonl, the names of the classes. Every graph is read back and compared with PyTorch. A single process works:
the class rows are written in blocks, and nothing would gain from more.
"""

import json
import os
import time

from data_tools.common.atomic import atomic_folder
from data_tools.common.command import between, check_paths, stop_on_signals
from data_tools.common.progress import note
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.errors import UserError
from xc.files import sync_tree
from xc.use.agreement import largest_differences, samples_of
from xc.use.bundle import CLASS_NAMES, ROWS, WEIGHTS, description, write_model, write_names, write_rows, write_weights
from xc.use.graph import Graph, captured, check_size, rows_of
from xc.use.graph_files import GRAPH_FILES
from xc.use.job import Parser
from xc.use.trained import open_run

FORMATS = (*GRAPH_FILES, "safetensors")


def parser():
    """The flags."""
    parser = Parser(prog="xc.export", description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="the --out of train.py")
    add("--out", required=True, metavar="FOLDER", help="the folder to write; it must not exist")
    add("--formats", nargs="+", choices=FORMATS, default=FORMATS, help="files to write (all)")
    add("--features-only", action="store_true", help="graphs end at the features, as for search: they hold no class "
        "rows")
    add("--classes", default="", metavar="PACK", help="pack with the names of the classes (the --data of the run); "
        "some of its images are compared, too")
    add("--checkpoint", default="", metavar="NAME", help="as step-00000100; without it the one with the highest top-1, "
        "else the newest")
    add("--tolerance", type=between(0, 1, float), default=1e-3, help="largest difference of a graph from PyTorch that "
        "is allowed, as a share of the largest value (%(default)s)")
    return parser


def main(argv=None):
    """The command, top to bottom."""
    started, args = time.monotonic(), parser().parse_args(argv)
    world = open_world("cpu")
    if world.size > 1:
        raise UserError(f"xc.export works in one process, and {world.size} were started: leave the launcher out")
    with world.raise_on_all_ranks():  # one line of whatever goes wrong
        out = os.path.abspath(args.out)
        check_paths([], out, None)
        graphs = {name: GRAPH_FILES[name] for name in dict.fromkeys(args.formats) if name in GRAPH_FILES}
        if args.features_only and not graphs:
            raise UserError("--features-only is about graphs, of which --formats safetensors has none: leave it out")
        for kind in graphs.values():
            kind.require_packages()
        with_rows = not args.features_only or "safetensors" in args.formats
        trained = open_run(args.run, args.checkpoint, world, with_rows)
        if graphs:
            check_size(trained, not args.features_only)
        names, pack = class_table(trained, args), pack_of(trained, args)
        try:
            with atomic_folder(out) as folder:
                written = write(folder, trained, names, pack, graphs, args)
                sync_tree(folder)
        except OSError as e:
            raise UserError(f"--out {args.out} cannot be written ({e}): make room there, or name another folder") from e
    print(json.dumps({"out": args.out, **written, "seconds": round(time.monotonic() - started, 3)}), flush=True)


def class_table(trained, args):
    """The ClassNames; None where they cannot be read and no file needs them."""
    try:
        return trained.class_table(args.classes)
    except UserError:
        if args.classes or not args.features_only or "safetensors" in args.formats:
            raise
        return None


def pack_of(trained, args):
    """The Pack whose images are compared; None where it is not there."""
    try:
        return trained.training_pack(args.classes)
    except UserError as e:
        note(f"note: no image of the run is compared, but random ones ({e})")
        return None


def write(folder, trained, names, pack, graphs, args):
    """Write all files of an export into a folder; returns what the command prints of it.

    names   ClassNames, or None
    pack    Pack of images to compare, or None
    graphs  {format: GraphFile} of --formats
    """
    with_rows = "safetensors" in args.formats
    outputs = (["features"] if args.features_only else ["features", "probabilities"]) if graphs else []
    classes = ({"names": CLASS_NAMES} if names else {}) | ({"rows": ROWS} if with_rows else {})
    about = description(trained, outputs, classes)
    verified = write_graphs(folder, trained, pack, graphs.values(), about, args.tolerance) if graphs else {}
    if with_rows:
        write_weights(os.path.join(folder, WEIGHTS), trained.backbone)
        write_rows(os.path.join(folder, ROWS), trained)
    if names:
        write_names(os.path.join(folder, CLASS_NAMES), names)
    packages = ["torch", *(package for kind in graphs.values() for package in kind.packages)]
    write_model(folder, about, verified, packages)
    return {"checkpoint": trained.folder.name, "classes": trained.num_classes,
            "bytes": sum(os.path.getsize(entry) for entry in os.scandir(folder))}


def write_graphs(folder, trained, pack, kinds, about, tolerance):
    """Write the graph as each of these GraphFiles and compare them with PyTorch; returns `verified` of model.json."""
    if trained.cfg.amp != "off":
        note(f"note: the run computed its backbone in {trained.cfg.amp}, the graphs compute it in float32")
    note("capturing the graph")
    outputs = list(about["outputs"])
    graph = Graph(trained, rows_of(trained) if "probabilities" in outputs else None)
    program, samples = captured(graph, trained.cfg), samples_of(graph, trained, pack)
    verified = {"tolerance": tolerance, "images": {one.what: len(one.pixels) for one in samples}}
    for kind in kinds:
        note(f"writing {kind.name} and comparing it with PyTorch")
        path = os.path.join(folder, kind.name)
        kind.write(program, outputs, json.dumps(about), path)
        found = largest_differences(kind.name, kind.open(path), samples, tolerance)
        differences = ", ".join(f"{output} by at most {values['difference']:.1e} of {values['of']:.2g}"
                                for output, values in found.items())
        print(f"{kind.name} differs from PyTorch in {differences}", flush=True)
        verified[kind.name] = found
    return verified


if __name__ == "__main__":
    stop_on_signals()
    run(main)
