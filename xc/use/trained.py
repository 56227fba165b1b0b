"""A trained run, opened for use: its settings, one checkpoint, the backbone and the class rows."""

from dataclasses import dataclass

import torch

from xc.checkpoint.saved_run import SavedRun, open_saved
from xc.data.synthetic import PREFIX, Spec
from xc.errors import UserError
from xc.model import backbone as backbones


@dataclass(frozen=True)
class Trained(SavedRun):
    """backbone: in evaluation mode, on the device."""

    backbone: torch.nn.Module


def open_run(run, checkpoint, world, rows=True):
    """The Trained of a run folder; see `open_saved`. UserError too where the run takes no images."""
    saved = open_saved(run, checkpoint, world, rows)
    cfg = saved.cfg
    if cfg.data.startswith(PREFIX) and not Spec.parse(cfg.data).images:
        raise UserError(f"{run} was trained on vectors ({cfg.data}), and takes no images: name a run of images")
    backbone = backbones.build(cfg.backbone, (cfg.channels, cfg.image_size, cfg.image_size), cfg.feature_dim, cfg.seed,
                               world, cfg.amp)
    saved.load_backbone(backbone)
    return Trained(cfg, saved.folder, saved.meta, backbone.eval())
