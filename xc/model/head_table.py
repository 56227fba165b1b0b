"""Classifier heads by name: which classes take part in a step.

A new head is one file, one line in HEADS, and its name in xc/config.py.
"""

import sys

from xc.config import option, unused_flags
from xc.model.head import Head
from xc.model.knn import KnnHead
from xc.model.sampled import SampledHead
from xc.model.scored import ScoredKnnHead
from xc.model.selective import SelectiveHead

HEADS = {"full": Head, "knn": ScoredKnnHead, "sampled": SampledHead, "selective": SelectiveHead}
SELECTS = {"scores": ScoredKnnHead, "labels": KnnHead}


def head_class(cfg):
    """The class of the head of a Config."""
    return SELECTS[cfg.select] if cfg.head == "knn" else HEADS[cfg.head]


def build(cfg, num_classes, world):
    """The head of a Config; UserError where its name is not known or its settings do not fit the classes.

    Rank 0 warns of flags that this head does not read.
    """
    if world.rank == 0:
        for choice, heads in ("head", HEADS), ("select", SELECTS):
            for flag in unused_flags(cfg, choice, {name: head.flags for name, head in heads.items()}):
                print(f"warning: {option(flag)} has no effect with {option(choice)} {getattr(cfg, choice)}",
                      file=sys.stderr)
    return head_class(cfg).of(cfg, num_classes, world)
