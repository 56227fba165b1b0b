"""Classifier heads by name: which classes take part in a step.

A new head is one file, one line in HEADS, and its name in xc/config.py.
"""

import sys

from xc.config import option, unused_flags
from xc.model.head import Head
from xc.model.knn import KnnHead
from xc.model.sampled import SampledHead
from xc.model.selective import SelectiveHead

HEADS = {"full": Head, "knn": KnnHead, "sampled": SampledHead, "selective": SelectiveHead}


def build(cfg, num_classes, world):
    """The head of a Config; UserError where its name is not known or its settings do not fit the classes.

    Rank 0 warns of flags that this head does not read.
    """
    if world.rank == 0:
        for flag in unused_flags(cfg, "head", {name: head.flags for name, head in HEADS.items()}):
            print(f"warning: {option(flag)} has no effect with --head {cfg.head}", file=sys.stderr)
    return HEADS[cfg.head].of(cfg, num_classes, world)
