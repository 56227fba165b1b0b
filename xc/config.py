"""One flat frozen dataclass: its fields are the flags of train.py, its values are written into every run folder."""

import argparse
import dataclasses
import difflib
import math
import shlex
import sys
from dataclasses import dataclass, field

from xc.data.sampler import SAMPLERS
from xc.errors import UserError, is_one_line
from xc.model.margin import MARGINS
from xc.optim.schedule import SCHEDULES, interval


def _flag(default, help, choices=None):
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Config:
    data: str = _flag("", "a pack, or a folder with the packs train and test (python -m data_tools.pack makes them), "
                          "or classes made up: synth:classes=1000000,dim=128,... (keys: xc/synth.py)")
    out: str = _flag("", "run folder: settings, metrics, checkpoints; must not hold another run")
    resume: str = _flag("", "auto: go on from the newest checkpoint in --out if there is one; or a checkpoint's folder")

    backbone: str = _flag("auto", "for vectors mlp; for images small, resnet18, resnet34, resnet50, or timm:NAME where "
                                  "timm is installed; auto: mlp or small")
    feature_dim: int = _flag(128, "width of the features and of the class rows")
    image_size: int = _flag(32, "side of the square images that the backbone sees, in pixels")
    channels: int = _flag(1, "1 grey, 3 colour", (1, 3))

    head: str = _flag("full", "which classes take part in a step: full, knn, sampled, selective")
    active_classes: float = _flag(0.1, "classes that take part in a step: a share of all up to 1, or a number")
    near_share: float = _flag(0.5, "knn, selective: share of the active classes, beyond the right ones, for the near "
                                   "ones; the rest is random")
    padding: str = _flag("corrected", "random active classes stand for all that are left out, or (plain) for "
                                      "themselves", ("corrected", "plain"))
    neighbors: int = _flag(0, "knn: K of the graph; 0: by --active-classes, --near-share and --global-batch")
    graph: str = _flag("auto", "knn: how the graph is built; auto: exact where that is quick",
                       ("auto", "exact", "approx"))
    graph_every: str = _flag("1epochs", "knn, selective: time between two builds of the graph or index; before "
                                        "the first one the classes are random")
    graph_angle: float = _flag(0.0, "knn: degrees; above 0, a graph is only refreshed for rows that turned further")
    row_dtype: str = _flag("float32", "of the class rows and their momentum; bfloat16: half the memory, rounded at "
                                      "random", ("float32", "bfloat16"))
    logits: str = _flag("cosine", "cosine of feature and class row, times --scale; or their plain inner product",
                        ("cosine", "inner"))
    scale: float = _flag(20.0, "factor on cosine logits")
    margin: str = _flag("none", "margin on the cosine of the right class", tuple(MARGINS))
    margin_size: float = _flag(0.0, "cosface: taken from the cosine; arcface: added to the angle, in radians")

    sampler: str = _flag("natural", "natural: every image once an epoch; balanced: every class equally often; "
                                    "sqrt: a class by the square root of its number of images; weighted: an image "
                                    "by its weight in the pack", SAMPLERS)
    epochs: float = _flag(10.0, "passes over the training set, or as many examples with another --sampler")
    steps: int = _flag(0, "optimizer steps; 0: from --epochs")
    global_batch: int = _flag(128, "examples per step over all ranks; any number of ranks gives the same recipe")
    lr: float = _flag(0.1, "highest learning rate of the backbone")
    head_lr_scale: float = _flag(40.0, "learning rate of the class rows, as a multiple of --lr")
    momentum: float = _flag(0.9, "momentum of the backbone")
    head_momentum: float = _flag(0.0, "momentum of the class rows, a tenth of --head-lr-scale goes with 0.9; 0: none, "
                                      "and no memory for it")
    optimizer: str = _flag("sgd", "of the backbone; lars: every layer's step in proportion to its weights",
                           ("sgd", "lars"))
    weight_decay: float = _flag(5e-4, "of backbone tensors with two or more dimensions")
    schedule: str = _flag("cosine", "course of the learning rate after the warm-up; fccs: the batch grows, and at the "
                                    "end the rate falls", SCHEDULES)
    warmup: str = _flag("0.5epochs", "linear warm-up of the learning rate: a time, as 0.5epochs, 500steps, "
                                     "64000examples or 5%% of the run; a bare number is epochs, and steps "
                                     "of a course have --global-batch examples")
    max_batch: int = _flag(0, "fccs: examples per step that the batch grows to, a multiple of --global-batch; 0: stays")
    hold: str = _flag("0", "fccs: time at the first batch, after the warm-up")
    growth: str = _flag("0", "fccs: time over which the batch grows; 0: until the tail")
    tail: str = _flag("25%", "fccs: time at the end, in which the rate falls to zero")
    fccs: str = _flag("cosine", "how the batch grows: by a cosine of time, or with the noise of the gradients",
                      ("cosine", "auto"))
    schedule_plot: str = _flag("", "a picture's name: draw learning rate and batch into it, and do nothing else")
    check: int = _flag(0, "1, or no number: look at launch, network, run folder, data and memory of a run with these "
                          "flags, and do nothing else; --data and --out may be left out", (0, 1))
    augment: float = _flag(1.0, "strength of shift, scale, rotation, blur and contrast; 0 switches them off")

    micro_batches: int = _flag(1, "parts of a step's batch: one is computed while another's features travel; 2 pay "
                                  "where features are many beside the backbone's weights")
    exchange: str = _flag("dense", "of the backbone's gradients: dense; dgc, the largest alone; dgc-hier, dense inside "
                                   "a host and the largest between hosts", ("dense", "dgc", "dgc-hier"))
    density: float = _flag(0.01, "dgc: share of the gradients that is sent")
    density_warmup: str = _flag("4epochs", "dgc: time over which the density falls from a quarter")
    dgc_clip: float = _flag(0.0, "dgc: highest norm of a layer's gradient (small layers together, vectors not), over "
                                 "the root of the number of ranks; 0: none")
    gradient_bits: int = _flag(32, "of the backbone's gradients on the way; 16: dense as float16, what dgc chooses as "
                                   "bfloat16", (32, 16))
    feature_bits: int = _flag(32, "on the way; 16: features as float16, their gradients as bfloat16", (32, 16))

    amp: str = _flag("off", "the backbone computes in 16 bits: bf16, or fp16, whose loss is scaled",
                     ("off", "bf16", "fp16"))

    model_parallel_size: int = _flag(0, "ranks that together hold one copy of the classifier; 0: all")
    device: str = _flag("auto", "auto: cuda where there is one", ("auto", "cpu", "cuda"))
    bucket_mb: float = _flag(4.0, "backbone gradients are exchanged in buckets of this size")
    loader_threads: int = _flag(1, "threads per rank that read and decode images")

    seed: int = _flag(0, "of everything random")
    timeline_steps: int = _flag(0, "steps to draw into timeline.json in the run folder, after the first 10")
    log_steps: int = _flag(50, "steps between two lines of metrics")
    eval_every: str = _flag("1epochs", "time between two evaluations; 0: only at the end")
    save_every: str = _flag("1epochs", "time between two checkpoints; 0: only at the end")
    max_bad_records: int = _flag(0, "records of train, and of test, that cannot be read, on all ranks, in whose place "
                                    "the next one is taken; one more ends the launch")
    max_rollbacks: int = _flag(0, "times that the run goes back to its last checkpoint where a loss is not finite, and "
                                  "leaves out the batch; 0: it ends")
    stall_seconds: float = _flag(600.0, "the run ends where no rank moves on for so long, and names the one that the "
                                        "others wait for; 0: waits for ever")
    keep: int = _flag(2, "last checkpoints that stay in the run folder, beside the one of the highest top-1")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if isinstance(value := getattr(self, f.name), float) and not math.isfinite(value):
                raise UserError(f"{_option(f.name)} {value} is not allowed: give a finite number")
            if isinstance(value, str) and not is_one_line(value):
                raise UserError(f"{_option(f.name)} {value!r} is not allowed: give one line of UTF-8 without control "
                                "characters")
        for name, ok, allowed in [
            ("data", self.data or self.check, "give the folder of a pack, or synth:classes=..."),
            ("out", self.out or self.schedule_plot or self.check, "give the run folder"),
            ("feature_dim", 1 <= self.feature_dim <= 65536, "1 to 65536"),
            ("image_size", 8 <= self.image_size <= 4096, "8 to 4096 pixels"),
            ("scale", self.scale > 0, "above 0"),
            ("margin_size", 0 <= self.margin_size < math.pi / 2, "0 to pi/2"),
            ("active_classes", self.active_classes > 0, "a share above 0 and up to 1, or a number of classes"),
            ("near_share", 0 <= self.near_share <= 1, "0 to 1"),
            ("neighbors", self.neighbors >= 0, "0 (chosen for you) or more"),
            ("graph_angle", 0 <= self.graph_angle < 180, "0 (always build anew) to below 180 degrees"),
            ("epochs", self.epochs > 0, "above 0"),
            ("steps", self.steps >= 0, "0 or more"),
            ("global_batch", self.global_batch >= 1, "at least 1"),
            ("lr", 0 < self.lr <= 1e30, "above 0 and at most 1e30"),
            ("head_lr_scale", self.head_lr_scale >= 0, "0 or more"),
            ("momentum", 0 <= self.momentum < 1, "0 to below 1"),
            ("head_momentum", 0 <= self.head_momentum < 1, "0 to below 1"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("max_batch", self.max_batch >= 0, "0, or a multiple of --global-batch"),
            ("augment", 0 <= self.augment <= 2, "0 to 2"),
            ("micro_batches", self.micro_batches >= 1, "at least 1"),
            ("density", 0 < self.density <= 1, "a share above 0 and up to 1"),
            ("dgc_clip", self.dgc_clip >= 0, "0 (none) or more"),
            ("model_parallel_size", self.model_parallel_size >= 0, "0 (all ranks) or a divisor of their number"),
            ("timeline_steps", self.timeline_steps >= 0, "0 (none) or a number of steps"),
            ("bucket_mb", self.bucket_mb > 0, "above 0"),
            ("loader_threads", self.loader_threads >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1"),
            ("log_steps", self.log_steps >= 1, "at least 1"),
            ("max_bad_records", self.max_bad_records >= 0, "0 or more"),
            ("max_rollbacks", self.max_rollbacks >= 0, "0 or more"),
            ("stall_seconds", 0 <= self.stall_seconds <= 1e6, "0 (no watch) or seconds up to 1000000"),
            ("keep", self.keep >= 1, "at least 1"),
        ]:
            if not ok:
                raise UserError(f"{_option(name)} {getattr(self, name)!r} is not allowed: {allowed}")
        for name in _TIMES:
            if not interval(getattr(self, name)):
                raise UserError(f"{_option(name)} {getattr(self, name)!r} is not allowed: a number and its unit, as "
                                "0.5epochs, 500steps, 64000examples or 5%")
        if not interval(self.graph_every)[0]:
            raise UserError(f"--graph-every {self.graph_every} is not allowed: a time above 0")
        for (name, value), parts in _PARTS.items():
            for part in parts if getattr(self, name) != value else ():
                if getattr(self, part) != getattr(Config, part):
                    raise UserError(f"{_option(part)} {getattr(self, part)} is a part of {_option(name)} {value}, not "
                                    f"of {getattr(self, name)}: give that or leave it out")
        if self.growth != Config.growth and self.max_batch <= self.global_batch:
            raise UserError(f"--growth {self.growth} needs a --max-batch above --global-batch {self.global_batch} to "
                            "grow to")
        if self.fccs == "auto" and self.growth != Config.growth:
            raise UserError(f"--growth {self.growth} has no meaning with --fccs auto, where the noise decides: leave "
                            "it out")
        if self.fccs == "auto" and self.max_batch <= self.global_batch:
            raise UserError(f"--fccs auto with --max-batch {self.max_batch} leaves the batch no room to grow: give one "
                            f"above --global-batch {self.global_batch}")
        if self.fccs == "auto" and self.micro_batches == 1:
            raise UserError("--fccs auto needs gradients of batches of two sizes, whose norms tell the noise: give "
                            "--micro-batches 2 or more")
        if self.logits == "inner" and self.margin != "none":
            raise UserError(f"--margin {self.margin} needs cosine logits: drop --logits inner or --margin")
        if self.margin == "none" and self.margin_size:
            raise UserError(f"--margin-size {self.margin_size} has no margin to size: give --margin cosface or arcface")


# Flags that mean something with one value of another flag.
_PARTS = {("schedule", "fccs"): ("max_batch", "hold", "growth", "tail", "fccs")}
_TIMES = ("graph_every", "warmup", "hold", "growth", "tail", "density_warmup", "eval_every", "save_every")


def _option(name):
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python train.py --help")

    def convert_arg_line_to_args(self, line):
        """@file.args: flags on any number of lines, # starts a comment."""
        try:
            words = shlex.split(line, comments=True)
        except ValueError as e:
            self.error(f"{line} cannot be read as flags ({e})")
        if any(word.startswith("@") for word in words):  # it could name itself, or grow without bound
            self.error(f"{line} names an argument file inside of one: give all of them on the command line")
        return words


def _parser():
    parser = _Parser(
        prog="train.py", fromfile_prefix_chars="@", allow_abbrev=False,
        description="Train an image classifier over very many classes. @FILE reads flags from a file.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(Config):
        options = {"default": f.default, "help": f.metadata["help"], "choices": f.metadata["choices"]}
        if isinstance(f.default, tuple):
            parser.add_argument(_option(f.name), type=float, nargs="+", **options)
        elif f.metadata["choices"] == (0, 1):
            parser.add_argument(_option(f.name), type=int, nargs="?", const=1, **options)
        else:
            parser.add_argument(_option(f.name), type=type(f.default), **options)
    return parser


def parse(arguments=None):
    """The command line as a Config; raises UserError with one line for anything wrong with it."""
    parser = _parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        values, unknown = parser.parse_known_args(arguments)
    except UnicodeDecodeError as e:
        raise UserError(f"an argument file is not a text in UTF-8 ({e})") from e
    if unknown:
        flags = [_option(f.name) for f in dataclasses.fields(Config)]
        near = difflib.get_close_matches(unknown[0], flags, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown argument {unknown[0]}{meant}; see python train.py --help")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in vars(values).items()}
    return Config(**values)


def as_arguments(cfg):
    """The text of an argument file that gives this Config back: one flag a line."""
    lines = []
    for f in dataclasses.fields(Config):
        value = getattr(cfg, f.name)
        if value != f.default:
            words = value if isinstance(value, tuple) else (value,)
            lines.append(f"{_option(f.name)} {shlex.join(map(str, words))}\n")
    return "".join(lines)
