"""Which split a run evaluates while it trains and by which score, and which of its classes train has no image of."""

import os
import shlex

import numpy as np

from xc.data import synthetic
from xc.errors import UserError

_BLOCK = 2**20  # classes whose counts are read at once
BEST_BY = {"classify": "top1", "retrieval": "recall_at_1"}  # by --eval: the score that the best checkpoint goes by


def split_while_training(splits):
    """Name of the split that is evaluated while training: val, or test where there is no val; None without either."""
    return next((name for name in ("val", "test") if name in splits), None)


def data_of(splits, evaluation="classify"):
    """What is evaluated while training, as checkpoints name it: scores on other data, or another measure, say nothing
    about a checkpoint.

    None where nothing is.
    """
    name, measure = split_while_training(splits), "" if evaluation == "classify" else f"{evaluation} on "
    return name and f"{measure}{name}: {len(splits[name])} examples, seed {splits[name].data_seed}"


def has_pairs(split):
    """Whether any class of a split has two images: otherwise retrieval has nothing to find. PackError."""
    return any((split.class_counts(first, last) > 1).any() for first, last in blocks_of(0, split.num_classes))


def check_pairs(splits):
    """UserError where a split that is evaluated has no pairs."""
    for name, split in splits.items():
        if name != "train" and not has_pairs(split):
            raise UserError(f"--eval retrieval needs two images of a class, and no class of {name} has two: give a "
                            "split that does, or --eval classify")


def tested_at_the_end(splits):
    """Whether test is kept for the end: val is evaluated while training."""
    return split_while_training(splits) == "val" and "test" in splits


def how_to_split(data):
    """What to do where --data has neither val nor test."""
    if data.startswith(synthetic.PREFIX):
        return "give it test= or val= above 0"
    folder = os.path.normpath(data)
    train = os.path.join(folder, "train")
    pack, out = shlex.quote(train if os.path.isdir(train) else folder), shlex.quote(f"{folder}-split")
    return f"make them with python -m data_tools.split {pack} {out} --test 0.01 --val 0.01"


def blocks_of(first, last):
    """Yields (first, last) of ranges that cover the classes first … last - 1 in order, whose counts fit in memory."""
    for start in range(first, last, _BLOCK):
        yield start, min(start + _BLOCK, last)


def classes_without_images(train, split):
    """(n,) int64: ids of the classes that the split has examples of and train has none. PackError."""
    found = [np.empty(0, np.int64)]
    for first, last in blocks_of(0, train.num_classes):
        lacking = train.class_counts(first, last) == 0
        if lacking.any():
            found.append(first + np.flatnonzero(lacking & (split.class_counts(first, last) > 0)))
    return np.concatenate(found)
