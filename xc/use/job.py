"""What the commands that read images share: flags, checks before anything is read, the file that appears at the end."""

import argparse
import json
import os
import sys
import time
from contextlib import ExitStack, contextmanager, suppress

from data_tools.common.atomic import atomic_path
from data_tools.common.command import between, check_paths
from data_tools.common.progress import Progress, note
from xc.checkpoint.saved_run import chosen
from xc.errors import UserError
from xc.use.features import features_of
from xc.use.source import images_of
from xc.use.trained import open_run

_NAMED = 3  # images without a result that a note names


class Parser(argparse.ArgumentParser):
    """Reports an error as all errors of a launch: one line of rank 0, and exit code 2 on all ranks."""

    def parse_args(self, args=None, namespace=None):
        with suppress(AttributeError):  # the output of a notebook, which takes any text
            sys.stdout.reconfigure(errors="backslashreplace")  # a name may be no text, or none of this terminal
        return super().parse_args(args, namespace)

    def error(self, message):
        raise UserError(f"{message}; see python -m {self.prog} --help")


def make_parser(name, description):
    """The flags that both commands have."""
    parser = Parser(prog=name, description=description, allow_abbrev=False)
    add = parser.add_argument
    add("run", metavar="RUN", help="the --out of train.py")
    add("src", metavar="SRC", help="a folder of images, one image, or anything that data_tools.pack reads")
    add("--out", required=True, metavar="FILE", help="the file to write; it must not exist")
    add_reading_flags(parser)
    return parser


def add_reading_flags(parser, default="the one with the highest top-1, else the newest"):
    """The flags of every command that takes a checkpoint and reads images; default: the checkpoint without a flag."""
    add = parser.add_argument
    add("--checkpoint", default="", metavar="NAME", help=f"as step-00000100; without it {default}")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: cuda where there is one")
    add("--batch-size", type=between(1, 2**16), default=64, help="images that a rank computes at once (%(default)s)")
    add("--loader-threads", type=between(1, 1024), default=1, help="threads of each rank that read and decode "
        "(%(default)s)")


@contextmanager
def progress_of(what, total, world, unit="images"):
    """Yields add(count) for a bar or lines of progress of rank 0."""
    if world.rank:
        yield lambda count: None
        return
    with Progress(what, total, unit) as progress:
        yield progress.add


class ImageJob:
    """The images of one launch, through the backbone of a run.

    args     the flags
    trained  Trained of the run
    """

    def __init__(self, args, trained, world):
        self.args, self.trained, self._world, self._started = args, trained, world, time.monotonic()
        self._bad, self._first_bad, self._count = 0, [], 0

    def batches(self, what):
        """What `features_of` yields, with a bar or lines of progress. Collective."""
        args, world = self.args, self._world
        with world.raise_on_all_ranks():
            images, total = images_of(args.src)
        with progress_of(what, total, world) as progress:
            for chunk, features in features_of(images(), self.trained, world, batch=args.batch_size,
                                               threads=args.loader_threads, progress=progress):
                bad = [image for image in chunk if image.reason is not None]
                self._first_bad += bad[: _NAMED - len(self._first_bad)]
                self._bad += len(bad)
                self._count += len(chunk)
                yield chunk, features
        if not self._count:
            raise UserError(f"{args.src} holds no images: name a folder of images, or what data_tools.pack reads")

    def check_any_result(self):
        """UserError where no image has a result; called after all batches."""
        if self._bad == self._count:
            image = self._first_bad[0]
            raise UserError(f"none of the {self._count} images of {self.args.src} can be used, the first is "
                            f"{image.name} ({image.reason}): name images")

    def report(self, **facts):
        """Prints what was done: a note on what has no result, and a JSON object that begins with these facts."""
        if self._world.rank:
            return
        if self._bad:
            first = ", ".join(f"{image.name} ({image.reason})" for image in self._first_bad)
            note(f"{self._bad} of {self._count} images have a reason instead of a result: {first}"
                 + ", …" * (self._bad > len(self._first_bad)))
        seconds = time.monotonic() - self._started
        print(json.dumps({**facts, "images": self._count, "without_result": self._bad,
                          "checkpoint": self.trained.folder.name, "seconds": round(seconds, 3),
                          "images_per_second": round(self._count / seconds, 1)}), flush=True)


class Job(ImageJob):
    """One launch of a command that writes a file; a mistake of the user is found in the constructor, before anything is
    written."""

    def __init__(self, args, suffixes, world, beside=None, open_trained=None):
        """
        suffixes      that the file may have
        beside        suffix of a second file, by that of the first
        open_trained  () -> Trained; None: that of the flags

        Without an --out there is no file. Collective.
        """
        super().__init__(args, None, world)
        self.outs, self.suffix = [], ""
        with world.raise_on_all_ranks():
            if args.out:
                self._check_out(suffixes, beside or {})
        checkpoint = None if open_trained else chosen(args.run, args.checkpoint, world)
        with world.raise_on_all_ranks():
            self.trained = open_trained() if open_trained else open_run(args.run, checkpoint, world)

    def _check_out(self, suffixes, beside):
        out = os.path.abspath(self.args.out)
        self.suffix = os.path.splitext(out)[1].lower()
        if self.suffix not in suffixes:
            raise UserError(f"--out {self.args.out}: name a file that ends in {' or '.join(suffixes)}")
        second = beside.get(self.suffix)
        self.outs = [out] + ([os.path.splitext(out)[0] + second] if second else [])
        if self._world.rank == 0:
            for path in self.outs:
                check_paths([self.args.src], path, None)

    def report(self, **facts):
        """As `ImageJob.report`, with the name of the file."""
        super().report(out=self.args.out, **facts)

    @contextmanager
    def writing(self, open_table):
        """Yields write(rows, *arguments), which writes rows(*arguments) into the table that open_table(*hidden paths)
        gives; rank 0 alone has one. The files get their names at the end. Collective, as is every write."""
        world = self._world
        with ExitStack() as stack:
            table = None
            with world.raise_on_all_ranks():
                if world.rank == 0:
                    table = open_table(*[stack.enter_context(atomic_path(out)) for out in self.outs])

            def write(rows, *arguments):
                with world.raise_on_all_ranks():
                    if table:
                        table.write(*rows(*arguments))

            yield write
            with world.raise_on_all_ranks():
                if table:
                    table.close()
                stack.close()
