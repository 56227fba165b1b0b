"""Shows, checks and rewrites checkpoints of train.py: python -m data_tools.checkpoint COMMAND CHECKPOINT

    info CHECKPOINT|RUN                           what is inside; of a run, all its checkpoints, newest last
    verify CHECKPOINT|RUN                         reads every byte and checks every checksum
    merge CHECKPOINT OUT.safetensors              one file for use elsewhere: backbone.* and weight, row c of class c
    reshard CHECKPOINT OUT --files N              the same checkpoint with its class rows and their graph in N files
    slice CHECKPOINT OUT.safetensors --classes L  the rows of some classes: classes (n,) and weight (n, D)

CHECKPOINT is a folder RUN/checkpoints/step-…, RUN is the --out of train.py. The pack has the names of the classes;
RUN/run.args says how features and rows make logits. Rewriting goes through memory in pieces, and OUT appears complete
or not at all. On an error the exit code is 2, with one line on stderr; `verify` prints one line for each damaged file.
"""

import json
import signal
import sys
from pathlib import Path

from data_tools.checkpoints import contents, rewrite
from data_tools.common.atomic import atomic_path
from data_tools.common.class_ids import intervals_of
from data_tools.common.command import Parser, between


def print_facts(facts):
    rows = "" if facts["rows_are"] == "classes" else f", {facts['num_rows']} rows which are {facts['rows_are']}"
    print(f"{facts['checkpoint']}: {_position(facts)}")
    print(f"  {facts['num_classes']} classes{rows}, features of {facts['feature_dim']} numbers")
    if not facts["damaged"]:
        print(f"  rows of {facts['row_width']} {facts['row_dtype']} numbers, "
              f"{'with' if facts['head_momentum'] else 'without'} momentum")
    if facts["residuals_of_ranks"]:
        print(f"  gradients not yet sent (residuals), of {facts['residuals_of_ranks']} ranks")
    print(f"  {len(facts['files'])} files, {_mb(facts)}")
    for name, num_bytes in facts["files"].items():
        print(f"    {name:<52} {num_bytes:>15,} bytes")
    for fault in facts["damaged"]:
        print(f"  {fault}")


def _position(facts):
    epoch = "" if facts["epoch"] is None else f", epoch {facts['epoch']:.2f}"
    score = "recall@1" if str(facts["evaluated_on"]).startswith("retrieval") else "top-1"
    top1 = "" if facts["top1"] is None else f", {score} {facts['top1']:.4f}"
    return f"step {facts['step']}, {facts['examples']} examples{epoch}{top1}"


def _mb(facts):
    return f"{facts['bytes'] / 1e6:.1f} MB"


def print_run(facts):
    for of_one in facts:
        text = f"{_position(of_one)}, {_mb(of_one)}" if "step" in of_one else ""
        notes = [text] * bool(text) + ["the best evaluated"] * of_one["best"] + of_one["damaged"]
        print(f"{of_one['checkpoint']}: {', '.join(notes)}")


def verify(folder, prog):
    """Prints the outcome of a check of every byte of a checkpoint; whether it is damaged."""
    found, summary = contents.verify(folder)
    for fault in found:
        print(f"{prog}: error: {' '.join(fault.split())}", file=sys.stderr)
    if not found:
        print(f"{folder}: valid, {summary}", flush=True)
    return bool(found)


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

    command("info", "what is inside").add_argument(
        "--json", action="store_true", help="print one JSON object (a list for a run) instead of text")
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
                of_run = bool(contents.checkpoints_of(path))
                facts = contents.describe_run(path) if of_run else contents.describe(path)
                if args.json:
                    print(json.dumps(facts))
                else:
                    (print_run if of_run else print_facts)(facts)
            case "verify":
                damaged = [verify(folder, parser.prog) for folder in contents.checkpoints_of(path) or [path]]
                parser.exit(2 if any(damaged) else 0)
            case _:
                rewrite.check_out(args.out, path, args.force, is_folder=args.command == "reshard")
                with atomic_path(args.out, replace=args.force) as partial:
                    match args.command:
                        case "merge":
                            text = rewrite.merge(path, Path(partial))
                        case "reshard":
                            text = rewrite.reshard(path, Path(partial), args.files)
                        case "slice":
                            text = rewrite.slice_rows(path, Path(partial), intervals_of(args.classes))
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
