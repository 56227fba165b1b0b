"""Sampled softmax: the right classes and uniformly random others (An et al. 2021, PartialFC)."""

from xc.heads.partial import PartialHead


class SampledHead(PartialHead):
    """The right classes of a step, and random ones up to the budget."""
