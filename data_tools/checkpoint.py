"""Shows, checks and rewrites checkpoints of train.py: python -m data_tools.checkpoint COMMAND CHECKPOINT

    info CHECKPOINT|RUN                           what is inside; of a run, all its checkpoints, newest last
    verify CHECKPOINT|RUN                         reads every byte and checks every checksum
    merge CHECKPOINT OUT.safetensors              one file for use elsewhere: backbone.* and weight, row c of class c
    reshard CHECKPOINT OUT --files N              the same checkpoint with its class rows and their graph in N files
    slice CHECKPOINT OUT.safetensors --classes L  the rows of some classes: classes (n,) and weight (n, D)

CHECKPOINT is a folder RUN/checkpoints/step-…, RUN the --out of train.py. Names of classes are in the pack, not here;
how logits are made of features and rows is in RUN/run.args. What is rewritten goes through memory in pieces, and
appears when it is whole, or not at all. Exit code 2 and one line on stderr where something is wrong, of `verify` one
line for every damaged file.
"""

import contextlib
import itertools
import json
import os
import secrets
import shutil
import signal
import sys
from bisect import bisect_left
from pathlib import Path

import numpy as np

from data_tools.checkpoints import ranges as ranged
from data_tools.common.class_ids import intervals_of
from data_tools.common.command import Parser, between
from data_tools.common.progress import Progress
from xc import checkpoint, tensor_file
from xc.disk import sync
from xc.shard import Shard

_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def checkpoints_of(run):
    """Folders of the checkpoints of a run, or of its folder checkpoints, oldest first; none of what is no run."""
    return checkpoint.folders(run / "checkpoints") or checkpoint.folders(run)


def read(folder):
    """meta.json of one checkpoint, with all that is used here looked at; ValueError where it cannot be used."""
    if found := checkpoints_of(folder):
        raise ValueError(f"{folder} is a run with {len(found)} checkpoints: name one of them, as {found[-1]}")
    meta = checkpoint.read_meta(folder)
    numbers = {"step": 0, "examples": 0, "num_classes": 1, "num_rows": 1, "feature_dim": 1}
    if not (all(type(meta.get(name)) is int and least <= meta[name] < 2**63 for name, least in numbers.items())
            and all(0 <= facts["bytes"] < 2**63 for facts in meta["files"].values())
            and meta.get("row_dtype") in tuple(_DTYPES)
            and isinstance(meta.get("rows_are"), str) and meta["rows_are"].isprintable()):
        raise ValueError(f"checkpoint {folder} does not say what it holds: take another checkpoint")
    checkpoint.ranges_of(folder, meta)
    return meta


def faults(folder, files, checksums=False, progress=None):
    """What is wrong with files of a checkpoint, a line each."""
    found = (checkpoint.fault_of(folder / name, facts, checksums, progress) for name, facts in sorted(files.items()))
    return [fault for fault in found if fault]


def class_rows(folder, meta):
    """The files of class rows, as Ranged; ValueError where they are not as meta.json says."""
    rows = ranged.Ranged(folder, "rows", checkpoint.ranges_of(folder, meta), meta["num_rows"])
    dtype, row = rows.table("weight")
    if dtype != _DTYPES[meta["row_dtype"]] or len(row) != 1:
        raise ValueError(f"checkpoint {folder}: its class rows are {dtype} {row}, not {meta['row_dtype']}")
    return rows


# info and verify.


def describe(folder):
    """Facts of a checkpoint as a dict for JSON."""
    meta = read(folder)
    damaged = faults(folder, meta["files"])
    of_epoch = meta.get("num_records")  # what train.py says beside the state
    facts = {"checkpoint": str(folder), "step": meta["step"], "examples": meta["examples"],
             "epoch": meta["examples"] / of_epoch if type(of_epoch) is int and 0 < of_epoch < 2**63 else None,
             "top1": checkpoint.top1_of(folder), "num_classes": meta["num_classes"], "num_rows": meta["num_rows"],
             "rows_are": meta["rows_are"], "feature_dim": meta["feature_dim"], "row_dtype": meta["row_dtype"],
             "residuals_of_ranks": sum(name.startswith("residuals-") for name in meta["files"]),
             "bytes": sum(facts["bytes"] for facts in meta["files"].values()),
             "files": {name: facts["bytes"] for name, facts in sorted(meta["files"].items())}, "damaged": damaged}
    if not damaged:
        rows = class_rows(folder, meta)
        facts |= {"row_width": rows.table("weight")[1][0], "head_momentum": "momentum" in rows.first_file}
    return facts


def print_facts(facts):
    rows = "" if facts["rows_are"] == "classes" else f", {facts['num_rows']} rows which are {facts['rows_are']}"
    print(f"{facts['checkpoint']}: {_position(facts)}")
    print(f"  {facts['num_classes']} classes{rows}, features of {facts['feature_dim']} numbers")
    if not facts["damaged"]:
        print(f"  rows of {facts['row_width']} {facts['row_dtype']} numbers, "
              f"{'with' if facts['head_momentum'] else 'without'} momentum")
    if facts["residuals_of_ranks"]:
        print(f"  what the exchange had yet to send, of {facts['residuals_of_ranks']} ranks")
    print(f"  {len(facts['files'])} files, {_mb(facts)}")
    for name, num_bytes in facts["files"].items():
        print(f"    {name:<52} {num_bytes:>15,} bytes")
    for fault in facts["damaged"]:
        print(f"  {fault}")


def _position(facts):
    epoch = "" if facts["epoch"] is None else f", epoch {facts['epoch']:.2f}"
    top1 = "" if facts["top1"] is None else f", top-1 {facts['top1']:.4f}"
    return f"step {facts['step']}, {facts['examples']} examples{epoch}{top1}"


def _mb(facts):
    return f"{facts['bytes'] / 1e6:.1f} MB"


def describe_run(run):
    """Facts of all checkpoints of a run: what they hold, or why they cannot be read."""
    folders, facts = checkpoints_of(run), []
    best = checkpoint.best_of(folders)
    for folder in folders:
        try:
            facts.append(describe(folder) | {"best": folder == best})
        except ValueError as error:
            facts.append({"checkpoint": str(folder), "best": folder == best, "damaged": [str(error)]})
    return facts


def print_run(facts):
    for of_one in facts:
        text = f"{_position(of_one)}, {_mb(of_one)}" if "step" in of_one else ""
        notes = [text] * bool(text) + ["the best evaluated"] * of_one["best"] + of_one["damaged"]
        print(f"{of_one['checkpoint']}: {', '.join(notes)}")


def verify(folder):
    """What is wrong with a checkpoint, a line for each file."""
    try:
        files = read(folder)["files"]
    except ValueError as error:
        return [str(error)]
    total = sum(facts["bytes"] for facts in files.values()) / 1e6
    with Progress(f"verifying {folder.name}", total, "MB") as progress:
        found = faults(folder, files, checksums=True, progress=lambda count: progress.add(count / 1e6))
    if not found:
        print(f"{folder}: whole, {len(files)} files, {total:.1f} MB", flush=True)
    return found


# merge, reshard, slice.


def merge(folder, out):
    meta = whole(folder)
    backbone = tensor_file.TensorFile(folder / "backbone.safetensors")
    tensors = {f"backbone.{name}": backbone.tensor(name) for name in backbone}
    tensors["weight"] = class_rows(folder, meta).tensor("weight", 0, meta["num_rows"])
    tensor_file.write(out, tensors, _origin(meta))
    dtype, shape, _ = tensors["weight"]
    return f"{len(tensors) - 1} tensors of the backbone, weight {dtype} {shape}, whose rows are {meta['rows_are']}"


def reshard(folder, out, num_files):
    meta = whole(folder)
    class_rows(folder, meta)
    num_rows, kinds = meta["num_rows"], ranged.kinds_among(meta["files"])
    if num_files > num_rows:
        raise ValueError(f"--files {num_files} is more than the {num_rows} class rows: take at most so many")
    out.mkdir()
    files = {}
    for kind, ranges in kinds.items():
        cls = ranged.Graph if kind == "neighbors" else ranged.Ranged
        source = cls(folder, kind, ranges, num_rows)
        for part in range(num_files):
            shard = Shard.of(num_rows, num_files, part)
            path = out / ranged.name_of(kind, shard.first, shard.last)
            files[path.name] = tensor_file.write(path, source.tensors(shard.first, shard.last))
    ranged_files = {ranged.name_of(kind, *of_file) for kind, ranges in kinds.items() for of_file in ranges}
    for name in meta["files"].keys() - ranged_files:
        shutil.copyfile(folder / name, out / name)
        sync(out / name)
        files[name] = meta["files"][name]
    checkpoint.write_meta(out, meta | {"rows": checkpoint.rows_among(files), "files": files})
    sync(out / "meta.json")
    return f"{len(files)} files; train.py goes on from it by --resume"


def slice_rows(folder, out, intervals):
    """The rows of classes in intervals (first, last), last included, in their order."""
    meta = read(folder)
    if meta["rows_are"] != "classes":
        raise ValueError(f"the rows of {folder} are {meta['rows_are']}, none is that of one class: only checkpoints of "
                         "other heads can be sliced")
    in_order = sorted(intervals)
    highest = max(last for _, last in intervals)
    if highest >= meta["num_rows"]:
        raise ValueError(f"--classes names {highest}, but {folder} has the classes 0 to {meta['num_rows'] - 1}")
    for (_, before), (first, _) in itertools.pairwise(in_order):
        if first <= before:
            raise ValueError(f"--classes names class {first} twice: name every class once")
    _refuse(faults(folder, meta["files"]))
    lasts, touched = [last for _, last in in_order], {}
    for first, last in checkpoint.ranges_of(folder, meta):
        found = bisect_left(lasts, first)
        if found < len(lasts) and in_order[found][0] < last:
            name = checkpoint.rows_name(first, last)
            touched[name] = meta["files"][name]
    _refuse(faults(folder, touched, checksums=True))  # what is damaged gets no new checksum
    rows = class_rows(folder, meta)
    dtype, row = rows.table("weight")
    count = sum(last - first + 1 for first, last in intervals)
    block = tensor_file.PIECE // 8
    ids = (np.arange(start, min(start + block, last + 1), dtype="<i8").tobytes()
           for first, last in intervals for start in range(first, last + 1, block))
    pieces = (piece for first, last in intervals for piece in rows.rows("weight", first, last + 1))
    tensor_file.write(out, {"classes": ("I64", (count,), ids), "weight": (dtype, (count, *row), pieces)}, _origin(meta))
    return f"the rows of {count} classes, weight {dtype} {(count, *row)}"


def whole(folder):
    """meta.json of a checkpoint every byte of which is as it was written: what is damaged gets no new checksum."""
    meta = read(folder)
    total = sum(facts["bytes"] for facts in meta["files"].values()) / 1e6
    with Progress(f"verifying {folder.name}", total, "MB") as progress:
        _refuse(faults(folder, meta["files"], checksums=True, progress=lambda count: progress.add(count / 1e6)))
    return meta


def _refuse(found):
    if found:
        raise ValueError(found[0])


def _origin(meta):
    return {"step": str(meta["step"]), "rows_are": meta["rows_are"]}


# Outputs that appear whole or not at all.


@contextlib.contextmanager
def appearing(out):
    """A hidden name beside out, for a file or folder that takes its place at the end, or is removed."""
    partial = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
    replaced = out.with_name(f".{out.name}.replaced-{secrets.token_hex(4)}")
    try:
        yield partial
        sync(partial)
        if out.is_dir():  # a folder cannot be renamed to one that is there
            out.rename(replaced)
        partial.replace(out)
        sync(out.parent)
    except BaseException:  # Ctrl-C too
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        _remove(partial)
        raise
    _remove(replaced)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_out(out, folder, force, is_folder):
    """ValueError for what can be known to fail before anything is read."""
    if not is_folder and out.suffix != ".safetensors":
        raise ValueError(f"{out} is not allowed: give a name that ends in .safetensors")
    if not (out.parent.is_dir() and os.access(out.parent, os.W_OK)):
        raise ValueError(f"{out.parent}: no such folder, or not writable; make it first, {out.name} goes there")
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise ValueError(f"{out} lies inside of the checkpoint {folder}; give a place outside")
    if os.path.lexists(out) and not force:
        raise ValueError(f"{out} exists; remove it, give another name, or --force")
    if os.path.lexists(out) and not ((out / "meta.json").is_file() if is_folder else out.is_file()):
        raise ValueError(f"{out} is not a {'checkpoint' if is_folder else 'file'}, which --force could replace; give "
                         "another name")


# The command.


def main(argv=None):
    parser = Parser(prog="data_tools.checkpoint", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, help, out=None):
        one = commands.add_parser(name, help=help, description=help)
        one.add_argument("path", metavar="CHECKPOINT", type=Path, help="a folder RUN/checkpoints/step-..."
                         + ("" if out else ", or a run folder"))
        if out:
            one.add_argument("out", metavar=out, type=Path, help="what to write")
            one.add_argument("--force", action="store_true", help="replace OUT if it exists")
        return one

    command("info", "what is inside").add_argument("--json", action="store_true", help="print one JSON object (of a "
                                                                                        "run, a list) instead of text")
    command("verify", "read every byte and check every checksum")
    command("merge", "backbone and class rows in one file, for use elsewhere", "OUT.safetensors")
    command("reshard", "the same checkpoint with its class rows in another number of files", "OUT").add_argument(
        "--files", type=between(1, 10**6), required=True, help="files of class rows, and of their graph if any")
    command("slice", "the rows of some classes", "OUT.safetensors").add_argument(
        "--classes", required=True, metavar="LIST", help="class ids, as 5-9,17,@file; a file has ids on any lines")
    args = parser.parse_args(argv)
    path = args.path
    try:
        match args.command:
            case "info":
                of_run = bool(checkpoints_of(path))
                facts = describe_run(path) if of_run else describe(path)
                if args.json:
                    print(json.dumps(facts))
                else:
                    (print_run if of_run else print_facts)(facts)
            case "verify":
                found = [fault for folder in checkpoints_of(path) or [path] for fault in verify(folder)]
                for fault in found:
                    print(f"{parser.prog}: error: {' '.join(fault.split())}", file=sys.stderr)
                parser.exit(2 if found else 0)
            case _:
                check_out(args.out, path, args.force, is_folder=args.command == "reshard")
                with appearing(args.out) as partial:
                    match args.command:
                        case "merge":
                            text = merge(path, partial)
                        case "reshard":
                            text = reshard(path, partial, args.files)
                        case "slice":
                            text = slice_rows(path, partial, intervals_of(args.classes))
                print(f"{args.out}: {text}")
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        where = f"{args.out}: " if "out" in args else ""
        parser.error(f"{where}{error}; nothing was kept" if where else str(error))
    except KeyboardInterrupt:
        parser.exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up as after Ctrl-C
    main()
