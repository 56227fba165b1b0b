"""The facts about a cluster that --plan is given: ranks=256,ranks-per-host=8,memory=80GB,network=100gbit,…"""

import dataclasses
import math
import re
from dataclasses import dataclass, field

from xc.errors import UserError

_PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15,
             "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def _fact(example, meaning, *, whole=False, units=(), most=1e18, **default):
    return field(metadata={"example": example, "meaning": meaning, "whole": whole, "units": units, "most": most},
                 **default)


@dataclass(frozen=True)
class Cluster:
    """One rank is one GPU, or one process on cores of its own. Bytes, seconds."""

    ranks: int = _fact("256", "in all", whole=True, most=2**20)
    ranks_per_host: int = _fact("8", "on a host", whole=True, most=2**20)
    memory: float = _fact("80GB", "of a rank: its GPU's, or its part of the host's", units=("B",))
    network: float = _fact("100gbit", "of a host's link a second, each way", units=("bit", "B"))
    flops: float = _fact("300e12", "operations a second that large matrix products reach on a rank, in 16 bits on GPUs",
                         units=("flop",))
    bandwidth: float = _fact("2e12", "bytes a second that a rank reads and writes in its memory", units=("B",))
    flops32: float = _fact("60e12", "the same in float32; on GPUs a fifth of flops if left out, on CPUs as flops",
                           units=("flop",), default=0.0)
    latency: float = _fact("20e-6", "seconds of a collective of a few bytes among all ranks", most=10, default=20e-6)
    local: float = _fact("400GB", "bytes a second that a rank sends inside its host; a fifth of bandwidth if left out",
                         units=("bit", "B"), default=0.0)
    classes: int = _fact("100000000", "where --data is not given: of the data", whole=True, most=2**31, default=0)
    examples: int = _fact("1000000000", "where --data is not given: of an epoch", whole=True, default=0)

    @classmethod
    def parse(cls, text):
        """The Cluster in "ranks=256,ranks-per-host=8,…"; UserError for anything wrong with it."""
        facts, values = {f.name.replace("_", "-"): f for f in dataclasses.fields(cls)}, {}
        for pair in text.split(","):
            key, _, value = (part.strip() for part in pair.partition("="))
            if key not in facts:
                raise UserError(f"--plan {text}: {key!r} is not known: give key=value of {', '.join(facts)}")
            if facts[key].name in values:
                raise UserError(f"--plan {text}: {key} is given twice")
            values[facts[key].name] = _number(facts[key], key, value)
        for key, f in facts.items():
            if f.default is dataclasses.MISSING and f.name not in values:
                raise UserError(f"--plan lacks {key}, {f.metadata['meaning']}: add it, as {key}={_example(f)}")
        cluster = cls(**values)
        if cluster.ranks % min(cluster.ranks, cluster.ranks_per_host):
            raise UserError(f"--plan ranks={cluster.ranks} is not a multiple of ranks-per-host="
                            f"{cluster.ranks_per_host}: every host has as many")
        return cluster

    @property
    def num_hosts(self):
        return -(-self.ranks // self.ranks_per_host)

    def flops_of(self, bits, on_cpu):
        """Operations a second of matrix products in 16 or 32 bits."""
        return self.flops if bits == 16 or on_cpu else self.flops32 or self.flops / 5

    def sending_rate(self, on_cpu):
        """Bytes a second that each rank sends, if all do at the same time.

        NCCL sends round a ring that enters and leaves a host once, so the link carries what one rank sends. MPI sends
        from rank to rank: those of a host share its link.
        """
        if self.num_hosts == 1:
            return self.local or self.bandwidth / 5
        return self.network / self.ranks_per_host if on_cpu else self.network


def _number(f, key, text):
    """The value of a fact, in bytes where it has a unit of bits or bytes."""
    match = re.fullmatch(r"([0-9.]+(?:e[+-]?[0-9]{1,2})?) ?([kmgtp]i?)?(bit|b|flops?)?(?:/s)?", text.lower())
    unit = match and (match[3] or "").rstrip("s")
    allowed = "".join(f" ({one})" for one in f.metadata["units"])
    wrong = UserError(f"--plan: {key}={text} is not allowed: give a number{allowed}, as {key}={_example(f)}")
    if not match or (unit and unit not in [one.lower() for one in f.metadata["units"]]):
        raise wrong
    try:
        value = float(match[1]) * _PREFIXES[match[2] or ""]
    except ValueError:
        raise wrong from None
    if unit == "bit" or (f.metadata["units"][:1] == ("bit",) and not unit):
        value /= 8
    if not 0 < value <= f.metadata["most"] or not math.isfinite(value) or (f.metadata["whole"] and value % 1):
        raise wrong
    return int(value) if f.metadata["whole"] else value


def _example(f):
    return f.metadata["example"]
