"""The settings of a run: one flat frozen dataclass, whose fields are the flags of train.py.

Its values are written into every run folder. The choices of a flag stand here as plain texts, so that this file imports
nothing of the trainer; a test compares them with the tables they name.
"""

import argparse
import dataclasses
import difflib
import math
import shlex
import sys
from dataclasses import dataclass, field

from xc.errors import UserError, is_one_line
from xc.intervals import interval

SAMPLERS = ("natural", "balanced", "sqrt", "weighted")
HEADS = ("full", "knn", "sampled", "selective")
SELECTS = ("scores", "labels")
MARGINS = ("none", "cosface", "arcface")
EVALUATIONS = ("classify", "retrieval")
SCHEDULES = ("constant", "cosine", "step", "fccs")
FLAGS_OF_EXCHANGES = {"dense": (), "dgc": ("density", "density_warmup"), "dgc-hier": ("density", "density_warmup"),
                      "powersgd": ("powersgd_rank",), "auto": ()}


def _flag(group, default, help, *, choices=None, least=None, above=None, most=None, below=None, time=False, alias=None):
    """A field. The bounds hold for numbers; time: a text that `interval` reads; alias: an old name of the flag."""
    return field(default=default, metadata={
        "group": group, "help": help, "choices": choices, "time": time, "alias": alias,
        "bounds": {"least": least, "above": above, "most": most, "below": below}})


@dataclass(frozen=True)
class Config:
    data: str = _flag("data", "", "a pack, or a folder with the packs train and perhaps val and test (python -m "
                                  "data_tools.pack makes them), or synthetic classes: "
                                  "synth:classes=1000000,dim=128,… (xc/data/synthetic.py)")
    sampler: str = _flag("data", "natural", "natural: every image once an epoch; balanced: every class equally often; "
                         "sqrt: a class by the square root of its number of images; weighted: an image by its weight "
                         "in the pack", choices=SAMPLERS)
    image_size: int = _flag("data", 32, "side of the square images that the backbone gets, in pixels", least=8,
                            most=4096)
    channels: int = _flag("data", 1, "1: grey; 3: colour", choices=(1, 3))
    input_norm: str = _flag("data", "half", "what pixels from 0 to 1 become, (x - MEAN) / STD: half is 0.5/0.5; "
                            "imagenet is what most published weights need; or numbers, one or one a channel, as "
                            "0.48,0.46,0.41/0.23,0.22,0.23")
    augment: float = _flag("data", 1.0, "strength of shift, scale, rotation, blur and contrast; 0: none", least=0,
                           most=2)
    loader_threads: int = _flag("data", 1, "threads of each rank that read and decode images", least=1)

    backbone: str = _flag("model", "auto", "mlp for vectors; small, resnet18, resnet34, resnet50 for images, or "
                          "timm:NAME where timm is installed; auto: mlp or small")
    init: str = _flag("model", "", "start the backbone from the weights in this file, of safetensors or of torch; or "
                      "start from a trained run: class rows are kept by class name. --resume goes before it")
    init_rows: str = _flag("model", "features", "--init: class rows that are not kept: from the features of their "
                           "images, in one pass over these; or random", choices=("features", "random"))
    freeze: int = _flag("model", 0, "stages of a ResNet that are not trained, from the input on: 1 is the stem, 2 also "
                        "layer1, … 5 all but the projection to the features", least=0)
    feature_dim: int = _flag("model", 128, "width of the features and of the class rows", least=1, most=65536)
    amp: str = _flag("model", "off", "16-bit arithmetic in the backbone: bf16, or fp16 with loss scaling",
                     choices=("off", "bf16", "fp16"))
    device: str = _flag("model", "auto", "auto: cuda where there is one", choices=("auto", "cpu", "cuda"))
    model_parallel_size: int = _flag("model", 0, "ranks that together hold one copy of the classifier, a divisor of "
                                     "their number; 0: all", least=0)

    head: str = _flag("head", "full", "classes that take part in a step: all of them (full); neighbours of the target "
                      "classes in a graph (knn); classes near the features (selective); random ones (sampled)",
                      choices=HEADS)
    active_classes: float = _flag("head", 0.1, "knn, selective, sampled: classes that take part in a step, as a share "
                                  "of all classes up to 1, or a number", above=0)
    select: str = _flag("head", "scores", "knn: near classes are the neighbours to which the features give most "
                        "probability (scores), or the nearest neighbours of the target classes, the paper's rule "
                        "(labels)", choices=SELECTS)
    near_parts: int = _flag("head", 0, "knn by scores: parts of similar examples into which a batch is cut, each with "
                            "active classes of its own, a power of two; 0: as many as a small budget needs",
                            least=0, most=1024)
    near_share: float = _flag("head", 0.5, "knn, selective: share of the active classes, beside the target classes, "
                              "that are near; the rest is random", least=0, most=1)
    sampling_correction: bool = _flag("head", True, "add the log-count correction of sampled softmax to the logits of "
                                      "random classes, which then stand for all classes left out")
    neighbors: int = _flag("head", 0, "knn: K of the graph; 0: from --active-classes, --near-share and "
                           "--global-batch", least=0)
    graph: str = _flag("head", "auto", "knn: how the graph is built; auto: exact where that is quick",
                       choices=("auto", "exact", "approx"))
    graph_from: str = _flag("head", "25%", "knn, selective: time of the first build of the graph or index; until then "
                            "rows are too young for it, and classes are random; 0: after --graph-every, as with --init",
                            time=True)
    graph_every: str = _flag("head", "1epochs", "knn, selective: time between two builds of the graph or index",
                             time=True)
    row_dtype: str = _flag("head", "float32", "type of the class rows and of their momentum; bfloat16 halves the "
                           "memory and rounds stochastically", choices=("float32", "bfloat16"))
    logits: str = _flag("head", "cosine", "cosine of feature and class row times --scale, or their inner product",
                        choices=("cosine", "inner"))
    scale: float = _flag("head", 0.0, "factor of cosine logits; 0: the log of the number of classes plus 4.6, at which "
                         "a perfect example has the probability 0.99", least=0)
    margin: str = _flag("head", "none", "margin of the target class", choices=MARGINS)
    margin_size: float = _flag("head", 0.0, "cosface: subtracted from the cosine; arcface: added to the angle, in "
                               "radians", least=0, below=math.pi / 2)

    epochs: float = _flag("optimization", 10.0, "passes over the training set, or as many examples with another "
                          "--sampler", above=0)
    steps: int = _flag("optimization", 0, "optimizer steps; 0: from --epochs", least=0)
    global_batch: int = _flag("optimization", 128, "examples per step over all ranks: the recipe does not depend on "
                              "the number of ranks", least=1)
    optimizer: str = _flag("optimization", "adamw", "of the backbone; lars: each layer's step in proportion to its "
                           "weights. @recipes/sgd.args and @recipes/fccs.args have the rates of the others",
                           choices=("adamw", "sgd", "lars"))
    lr: float = _flag("optimization", 0.008, "peak learning rate, fit for adamw", above=0, most=1e30)
    momentum: float = _flag("optimization", 0.9, "momentum of the backbone; adamw: its first beta", least=0, below=1)
    weight_decay: float = _flag("optimization", 0.01, "weight decay of backbone tensors with two or more dimensions",
                                least=0)
    backbone_lr_scale: float = _flag("optimization", 1.0, "learning rate of the backbone, as a multiple of --lr; that "
                                     "of the class rows stays", above=0, most=1e30)
    head_lr_scale: float = _flag("optimization", 2000.0, "learning rate of the class rows, as a multiple of --lr",
                                 least=0)
    head_momentum: float = _flag("optimization", 0.0, "momentum of the class rows, for which --head-lr-scale should "
                                 "be a tenth; 0: none, and no memory for it", least=0, below=1)
    seed: int = _flag("optimization", 0, "seed of every random number", least=0, most=2**32 - 1)

    schedule: str = _flag("schedule", "cosine", "learning rate after the warm-up; step: a tenth after 50 and 75 % of "
                          "the run; fccs: the batch grows, and the rate falls at the end", choices=SCHEDULES)
    warmup: str = _flag("schedule", "30%", "linear warm-up of the learning rate, as 0.5epochs, 500steps, "
                        "64000examples or 5% of the run; a bare number is epochs, and a step is one of "
                        "--global-batch examples", time=True)
    max_batch: int = _flag("schedule", 0, "fccs: examples per step to which the batch grows, a multiple of "
                           "--global-batch; 0: it stays", least=0)
    batch_growth: str = _flag("schedule", "cosine", "fccs: growth by a cosine of time, or with the gradients' noise "
                              "(auto)", choices=("cosine", "auto"), alias="fccs")
    fccs_hold: str = _flag("schedule", "0", "fccs: time at the first batch, after the warm-up", time=True, alias="hold")
    fccs_growth: str = _flag("schedule", "0", "fccs: time in which the batch grows; 0: until the tail", time=True,
                             alias="growth")
    fccs_tail: str = _flag("schedule", "25%", "fccs: time at the end in which the rate falls to zero", time=True,
                           alias="tail")
    schedule_plot: str = _flag("schedule", "", "draw learning rate and batch into this picture, and do nothing else")

    micro_batches: int = _flag("communication", 1, "parts of a step's batch: one is computed while another's features "
                               "travel; 2 pay where features are many beside the backbone's weights", least=1)
    exchange: str = _flag("communication", "dense", "of the backbone's gradients: dense; dgc: the largest only; "
                          "dgc-hier: dense inside a host, the largest between hosts; powersgd: low-rank matrices; "
                          "auto: the quickest of dense, powersgd and, without AdamW, dgc, by a few steps at the start",
                          choices=tuple(FLAGS_OF_EXCHANGES))
    density: float = _flag("communication", 0.01, "dgc: share of the gradients that is sent", above=0, most=1)
    density_warmup: str = _flag("communication", "4epochs", "dgc: time in which the density falls from a quarter",
                                time=True)
    powersgd_rank: int = _flag("communication", 4, "powersgd: rank of the matrices", least=1)
    gradient_bits: int = _flag("communication", 32, "of the backbone's gradients when sent; 16: dense as float16, dgc "
                               "as bfloat16", choices=(32, 16))
    feature_bits: int = _flag("communication", 0, "when sent; 16: features as float16, their gradients as bfloat16; 8: "
                              "with a scale for each example; 0: 16 with --amp, else 32", choices=(0, 32, 16, 8))

    out: str = _flag("checkpoints and faults", "", "run folder for settings, metrics and checkpoints; must not hold "
                     "another run")
    resume: str = _flag("checkpoints and faults", "", "auto: resume from the newest checkpoint in --out, if there is "
                        "one; or the folder of a checkpoint")
    save_every: str = _flag("checkpoints and faults", "1epochs", "time between two checkpoints; 0: only at the end",
                            time=True)
    keep_checkpoints: int = _flag("checkpoints and faults", 2, "last checkpoints that are kept, beside the one with "
                                  "the highest top-1", least=1, alias="keep")
    max_bad_records: int = _flag("checkpoints and faults", 0, "unreadable records of train that are replaced by "
                                 "the next record, and of val, and of test, that are left out; one more ends the "
                                 "launch", least=0)
    max_rollbacks: int = _flag("checkpoints and faults", 0, "times that a run with a non-finite loss goes back to a "
                               "checkpoint and leaves the batch out; 0: it ends", least=0)
    stall_seconds: float = _flag("checkpoints and faults", 600.0, "end the run where no rank makes progress for so "
                                 "long, and name the rank at fault; 0: never", least=0, most=1e6)
    plan: str = _flag("checkpoints and faults", "", "print what a run with these flags takes on a cluster, of GPUs "
                      "unless --device cpu, and do nothing else: ranks=256,ranks-per-host=8,memory=80GB,"
                      "network=100gbit,flops=300e12,bandwidth=2e12; --out is optional, and --data with "
                      "classes=…,examples=…")
    check: bool = _flag("checkpoints and faults", False, "preflight check: look at launch, network, run folder, data "
                        "and memory of a run with these flags, and do nothing else; --data and --out are optional")

    log_steps: int = _flag("logging", 50, "steps between two lines of metrics", least=1)
    eval_every: str = _flag("logging", "1epochs", "time between two evaluations on val, or on test where there is no "
                            "val; 0: only at the end", time=True)
    eval: str = _flag("logging", "classify", "what an evaluation measures, and the best checkpoint goes by: top-1 over "
                      "all classes (classify); recall@1 of images among the images of the split (retrieval), also of "
                      "classes that train has no image of", choices=EVALUATIONS)
    test: str = _flag("logging", "best", "weights that test is evaluated with at the end: those of the checkpoint with "
                      "the highest top-1 (--eval retrieval: recall@1) on val, or the last ones; without val always the "
                      "last ones",
                      choices=("best", "last"))
    trace_steps: int = _flag("logging", 0, "steps to record in RUN/trace.json, after the first 10", least=0,
                             alias="timeline_steps")

    def __post_init__(self):
        for f in dataclasses.fields(self):
            if fault := _fault(f, getattr(self, f.name)):
                raise UserError(f"{option(f.name)} {getattr(self, f.name)!r} is not allowed: {fault}")
        if not (self.data or self.check or self.plan):
            raise UserError("--data is missing: give the folder of a pack, or synth:classes=…")
        if not (self.out or self.schedule_plot or self.check or self.plan):
            raise UserError("--out is missing: give the run folder")
        if not interval(self.graph_every)[0]:
            raise UserError(f"--graph-every {self.graph_every} is not allowed: give a time above 0")
        self._check_schedule()
        if self.optimizer != "adamw" and (self.lr, self.head_lr_scale) == (Config.lr, Config.head_lr_scale):
            raise UserError(f"--optimizer {self.optimizer} needs rates of its own: give --lr and --head-lr-scale, or "
                            "@recipes/sgd.args or @recipes/fccs.args")
        if self.optimizer == "adamw" and "density" in FLAGS_OF_EXCHANGES[self.exchange]:
            raise UserError(f"--exchange {self.exchange} has a momentum of its own and cannot go with AdamW: give "
                            "--exchange dense, or @recipes/sgd.args")
        if self.logits == "inner" and self.margin != "none":
            raise UserError(f"--margin {self.margin} needs cosine logits: leave out --logits inner or --margin")
        if self.margin == "none" and self.margin_size:
            raise UserError(f"--margin-size {self.margin_size} needs a margin: give --margin cosface or arcface")

    def _check_schedule(self):
        for name in unused_flags(self, "schedule", _FLAGS_OF_SCHEDULES):
            raise UserError(f"{option(name)} {getattr(self, name)} is a part of --schedule fccs, not of "
                            f"{self.schedule}: give that or leave it out")
        grows = self.max_batch > self.global_batch
        if self.fccs_growth != Config.fccs_growth and not grows:
            raise UserError(f"--fccs-growth {self.fccs_growth} needs a --max-batch above --global-batch "
                            f"{self.global_batch}")
        if self.batch_growth != "auto":
            return
        if self.fccs_growth != Config.fccs_growth:
            raise UserError(f"--fccs-growth {self.fccs_growth} has no meaning with --batch-growth auto, where the "
                            "noise decides: leave it out")
        if not grows:
            raise UserError(f"--batch-growth auto needs a --max-batch above --global-batch {self.global_batch}, not "
                            f"{self.max_batch}")
        if self.micro_batches == 1:
            raise UserError("--batch-growth auto compares the gradients of batches of two sizes: give --micro-batches "
                            "2 or more")


_FLAGS_OF_SCHEDULES = {name: () for name in SCHEDULES} | {
    "fccs": ("max_batch", "batch_growth", "fccs_hold", "fccs_growth", "fccs_tail")}

_RECIPE = ("scale", "global_batch", "optimizer", "lr", "momentum", "weight_decay", "backbone_lr_scale", "head_lr_scale",
           "head_momentum", "schedule", "warmup")  # what a recipe sets


def unused_flags(cfg, choice, flags_of):
    """Names of the fields that were set, that other values of the field `choice` read, but not the given one.

    flags_of  {value of `choice`: names of the fields that this value reads}
    """
    unused = {flag for flags in flags_of.values() for flag in flags} - set(flags_of[getattr(cfg, choice)])
    return sorted(flag for flag in unused if getattr(cfg, flag) != getattr(Config, flag))


def _fault(f, value):
    """What values of a field are allowed, where this one is not; None where it is."""
    if isinstance(value, float) and not math.isfinite(value):
        return "give a finite number"
    if isinstance(value, str) and not is_one_line(value):
        return "give one line of UTF-8 without control characters"
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        return "choose from " + ", ".join(map(str, f.metadata["choices"]))
    if f.metadata["time"] and not interval(value):
        return "give a number and its unit, as 0.5epochs, 500steps, 64000examples or 5%"
    least, above, most, below = (f.metadata["bounds"][name] for name in ("least", "above", "most", "below"))
    if ((least is not None and value < least) or (above is not None and value <= above)
            or (most is not None and value > most) or (below is not None and value >= below)):
        limits = {"at least": least, "above": above, "at most": most, "below": below}
        return "give a number " + ", ".join(f"{word} {limit:g}" for word, limit in limits.items() if limit is not None)
    return None


def option(name):
    """The flag of a field."""
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


class _HelpFormatter(argparse.HelpFormatter):
    """Shows a default where there is one to show."""

    def _get_help_string(self, action):
        text = action.help.removesuffix(" (default: %(default)s)").replace("%", "%%")  # Python 3.12 adds it to booleans
        shown = action.default not in ("", argparse.SUPPRESS) and not isinstance(action.default, bool)
        return f"{text} (default: %(default)s)" if shown else text


def _parser():
    parser = _Parser(
        prog="train.py", usage="train.py --data DATA --out RUN [flags]", fromfile_prefix_chars="@", allow_abbrev=False,
        description="Train an image classifier over very many classes. @FILE reads flags from a file.",
        formatter_class=_HelpFormatter)
    groups = {}
    for f in dataclasses.fields(Config):
        title = f.metadata["group"]
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        kind = {"type": f.type, "choices": f.metadata["choices"]}
        if f.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        group.add_argument(option(f.name), default=f.default, help=f.metadata["help"], **kind)
        if f.metadata["alias"]:
            hidden = {"dest": f.name, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(option(f.metadata["alias"]), **kind | hidden)
    parser.add_argument("--padding", dest="sampling_correction", default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                        type=_sampling_correction)
    return parser


def _sampling_correction(text):
    """The value of --padding, which was the name of this flag."""
    if text not in ("plain", "corrected"):
        raise argparse.ArgumentTypeError(f"{text!r} is not known: give --sampling-correction or "
                                         "--no-sampling-correction")
    return text == "corrected"


def parse(arguments=None):
    """The command line as a Config. UserError with one line for anything wrong with it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        values, unknown = _parser().parse_known_args(arguments)
    except UnicodeDecodeError as e:
        raise UserError(f"an argument file is not a text in UTF-8 ({e})") from e
    if unknown:
        if unknown[0].partition("=")[0] in ("--graph-refresh-angle", "--graph-angle"):
            raise UserError(f"{unknown[0]} is gone, since a build takes less time than a refresh did: leave it out")
        flags = [option(f.name) for f in dataclasses.fields(Config)]
        near = difflib.get_close_matches(unknown[0], flags, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown argument {unknown[0]}{meant}; see python train.py --help")
    return Config(**vars(values))


def as_arguments(cfg):
    """The text of an argument file that gives this Config back: one flag a line. The recipe is written in full, so that
    a run keeps it when defaults change."""
    lines = []
    for f in dataclasses.fields(Config):
        value = getattr(cfg, f.name)
        if f.type is bool and value != f.default:
            lines.append(option(f.name if value else f"no_{f.name}") + "\n")
        elif value != f.default or f.name in _RECIPE:
            lines.append(f"{option(f.name)} {shlex.join([str(value)])}\n")
    return "".join(lines)
