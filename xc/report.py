"""One HTML file about runs, to look at: python -m xc.report RUN [RUN ...] --out report.html

    python -m xc.report runs/photos --out photos.html
    mpirun -np 4 python -m xc.report runs/a runs/b --data packs --out both.html

Settings and their difference, curves, time by phase, accuracy by class frequency; and of the checkpoint with the
highest top-1, else the newest: confused classes, surest mistakes, neighbours of class rows. Any browser opens it,
without a network. What a run lacks is said in the page.
"""

import json
import os
import time
from contextlib import ExitStack

from data_tools.common.atomic import atomic_path
from data_tools.common.command import between, check_paths, stop_on_signals
from data_tools.common.progress import Progress, note
from xc.comm.launch import run
from xc.comm.world import open_world
from xc.errors import UserError
from xc.reporting.answers import answers_of
from xc.reporting.look import Look, open_model
from xc.reporting.page import MOST_BYTES, Page
from xc.reporting.pictures import Pictures
from xc.reporting.runs import read_runs
from xc.use.job import Parser

_MOST_RUNS = 20


def parser():
    """The flags."""
    parser = Parser(prog="xc.report", description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="the --out of train.py")
    add("--out", required=True, metavar="FILE", help="the .html file to write; it must not exist")
    add("--data", default="", metavar="PACKS", help="packs of the runs, where they are no longer at their --data")
    add("--examples", type=between(1, 10**7), default=20000, help="most examples of val, else of test, that each run "
        "answers; more are thinned out evenly (%(default)s)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is one")
    add("--batch-size", type=between(1, 2**16), default=64, help="images that a rank computes at once (%(default)s)")
    add("--loader-threads", type=between(1, 1024), default=1, help="threads of each rank that read and decode "
        "(%(default)s)")
    return parser


def main(argv=None):
    """The command, top to bottom. Collective."""
    started, args = time.monotonic(), parser().parse_args(argv)
    world = open_world(args.device)
    with world.raise_on_all_ranks():
        if world.rank == 0:
            check_out(args.out)
        if len(args.runs) > _MOST_RUNS:
            raise UserError(f"{len(args.runs)} runs are given: give at most {_MOST_RUNS}")
        runs = read_runs(args.runs)
    models = [open_model(one, args.data, world) for one in runs]
    looks = [Look(model, answer(model, one.name, args, world), world) if model else reason
             for one, (model, reason) in zip(runs, models, strict=True)]
    with world.raise_on_all_ranks():
        if world.rank == 0:
            html = html_of(runs, looks)
            write(args.out, html)
    if world.rank == 0:
        say(args, runs, looks, len(html), time.monotonic() - started)


def check_out(out):
    """ValueError where the file cannot be written."""
    if os.path.splitext(out)[1].lower() not in (".html", ".htm"):
        raise UserError(f"--out {out}: name a file that ends in .html")
    check_paths([], os.path.abspath(out), None)


def answer(model, name, args, world):
    """The Answers of a Model to its examples, with a bar or lines of progress. Collective."""
    with ExitStack() as stack:
        total = min(args.examples, len(model.pack))
        bar = stack.enter_context(Progress(f"evaluating {name}", total)) if world.rank == 0 else None
        return answers_of(model.trained, model.pack, args.examples, world, batch=args.batch_size,
                          threads=args.loader_threads, progress=bar.add if bar else lambda count: None)


def html_of(runs, looks):
    """The page, as bytes. Pictures take what the rest leaves of MOST_BYTES."""
    page = Page(runs)
    return page.html(shown(looks, MOST_BYTES - len(page.html(shown(looks, 0)))))


def shown(looks, num_bytes):
    """What the template takes of every run: a dict, or the reason why it has none. They share the bytes of pictures."""
    sections, waiting = [], sum(not isinstance(look, str) for look in looks)
    for look in looks:
        if isinstance(look, str):
            sections.append(look)
            continue
        share = num_bytes // waiting
        pictures = Pictures(share)
        sections.append(look.shown(pictures))
        num_bytes -= share - pictures.left
        waiting -= 1
    return sections


def write(out, html):
    """Write the page. It appears complete or not at all. UserError where it cannot be written."""
    try:
        with atomic_path(out) as partial, open(partial, "xb") as file:
            file.write(html)
    except OSError as e:
        raise UserError(f"--out {out} cannot be written ({e}): make room there, or name another file") from e


def say(args, runs, looks, size, seconds):
    """Print what was done: notes on runs that lack a part, and a JSON object."""
    for one, look in zip(runs, looks, strict=True):
        if isinstance(look, str):
            note(f"note: {one.name}: {look}")
    examples = [None if isinstance(look, str) else look.answers.examples for look in looks]
    print(json.dumps({"out": args.out, "runs": len(runs), "examples": examples, "bytes": size,
                      "seconds": round(seconds, 3)}), flush=True)


if __name__ == "__main__":
    stop_on_signals()
    run(main)
