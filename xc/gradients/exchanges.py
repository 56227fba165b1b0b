"""The exchanges of the backbone's gradients by name.

A new exchange is one file with a class that has the methods of AllReduce, and one line in EXCHANGES. That line names a
function (backbone, world, cfg) that makes it; it may raise a UserError and must not use collectives.
"""

import sys

from xc.config import FLAGS_OF_EXCHANGES, option, unused_flags
from xc.errors import UserError
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.gradients.powersgd import PowerSgd
from xc.optim.loss_scale import LossScale


def _dense(backbone, world, cfg):
    return AllReduce(backbone, world, bits=cfg.gradient_bits, loss_scale=LossScale.of(cfg))


def _dgc(backbone, world, cfg, two_level=False):
    dgc = Dgc(backbone, world, bits=cfg.gradient_bits, loss_scale=LossScale.of(cfg), momentum=cfg.momentum,
              two_level=two_level)
    if dgc.outer.size == 1 and world.rank == 0:
        print(f"warning: --exchange {cfg.exchange} sends nothing sparse on one "
              f"{'rank' if world.size == 1 else 'host'}: all gradients are dense", file=sys.stderr)
    return dgc


def _dgc_hier(backbone, world, cfg):
    if world.cross_host is None:
        raise UserError("--exchange dgc-hier needs the same number of ranks on every host: launch as many on each, or "
                        "use --exchange dgc")
    return _dgc(backbone, world, cfg, two_level=True)


def _powersgd(backbone, world, cfg):
    return PowerSgd(backbone, world, bits=cfg.gradient_bits, loss_scale=LossScale.of(cfg), rank=cfg.powersgd_rank)


EXCHANGES = {"dense": _dense, "dgc": _dgc, "dgc-hier": _dgc_hier, "powersgd": _powersgd}


def build(backbone, world, cfg):
    """The exchange that --exchange names. UserError if these ranks cannot use it. Not collective."""
    for flag in unused_flags(cfg, "exchange", FLAGS_OF_EXCHANGES) if world.rank == 0 else ():
        print(f"warning: {option(flag)} has no effect with --exchange {cfg.exchange}", file=sys.stderr)
    return EXCHANGES[cfg.exchange](backbone, world, cfg)
