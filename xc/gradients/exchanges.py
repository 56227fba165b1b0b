"""Exchanges of the backbone's gradients by name."""

import sys

from xc.config import Config
from xc.errors import UserError
from xc.gradients.allreduce import AllReduce
from xc.gradients.dgc import Dgc
from xc.optim.loss_scale import LossScale


def build(backbone, world, cfg):
    """The exchange that a Config asks for; UserError where these ranks cannot have it. Not collective."""
    if cfg.exchange == "dense":
        for flag in ("density", "density_warmup", "dgc_clip") if world.rank == 0 else ():
            if getattr(cfg, flag) != getattr(Config, flag):
                print(f"warning: --{flag.replace('_', '-')} has no effect with --exchange dense", file=sys.stderr)
        return AllReduce(backbone, world, cfg.bucket_mb, cfg.gradient_bits, LossScale.of(cfg))
    if cfg.exchange == "dgc-hier" and world.across is None:
        raise UserError("--exchange dgc-hier needs as many ranks on every host: launch so, or take --exchange dgc")
    dgc = Dgc(backbone, world, cfg.bucket_mb, cfg.gradient_bits, LossScale.of(cfg), momentum=cfg.momentum,
              clip=cfg.dgc_clip, two_level=cfg.exchange == "dgc-hier")
    if dgc.outer.size == 1 and world.rank == 0:
        print(f"warning: --exchange {cfg.exchange} has nothing to send sparse on one "
              f"{'rank' if world.size == 1 else 'host'}: all is dense", file=sys.stderr)
    return dgc
