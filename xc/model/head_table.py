"""Classifier heads by name: which classes take part in a step. A new head is one file and one line in HEADS."""

import sys

from xc.config import Config
from xc.model.head import Head
from xc.model.knn import KnnHead
from xc.model.sampled import SampledHead
from xc.model.selective import SelectiveHead

HEADS = {"full": Head, "knn": KnnHead, "sampled": SampledHead, "selective": SelectiveHead}


def build(cfg, num_classes, world):
    """The head of a Config; UserError where its name is not known or its settings do not fit the classes.

    Rank 0 warns of flags that this head does not read.
    """
    head = HEADS[cfg.head]
    unused = {flag for other in HEADS.values() for flag in other.flags} - set(head.flags)
    if world.rank == 0:
        for flag in sorted(flag for flag in unused if getattr(cfg, flag) != getattr(Config, flag)):
            print(f"warning: --{flag.replace('_', '-')} has no effect with --head {cfg.head}", file=sys.stderr)
    return head.of(cfg, num_classes, world)
