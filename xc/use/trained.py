"""A trained run, opened for use: its settings, one checkpoint, the backbone and the class rows."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from xc.checkpoint.layout import best_of, fault_of, folders, ranges_of, read_meta, rows_name
from xc.checkpoint.tensor_file import TensorFile
from xc.config import Config
from xc.data.pack import open_splits
from xc.data.synthetic import PREFIX, Spec
from xc.errors import UserError
from xc.model import backbone as backbones

_BLOCK_ROWS = 4096  # class rows that are mapped and scored at once
_ROW_TYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Trained:
    """cfg: the run's Config; folder, meta: of the checkpoint; backbone: in evaluation mode, on the device."""

    cfg: Config
    folder: Path
    meta: dict
    backbone: torch.nn.Module

    @property
    def num_classes(self):
        return self.meta["num_classes"]

    @property
    def feature_dim(self):
        return self.meta["feature_dim"]

    @property
    def scale(self):
        """Factor of the logits, as in `Head`."""
        return self.cfg.scale if self.cfg.logits == "cosine" else 1.0

    def directions(self, features):
        """Features or rows (N, D) as the logits use them, as in `Head`: scaled to length 1 for cosine logits."""
        return F.normalize(features) if self.cfg.logits == "cosine" else features

    def row_blocks(self, shard, device):
        """Yields (first class, rows (n, D) as the logits use them, float32) of the classes of a Shard, ascending.

        The rows are mapped from the files of the checkpoint, block by block. ValueError where a file is damaged.
        """
        width, kind = self.meta["feature_dim"], _ROW_TYPES.get(self.meta["row_dtype"])
        for first, last in ranges_of(self.folder, self.meta):
            start, stop = max(first, shard.first), min(last, shard.last)
            if start >= stop:
                continue
            file = TensorFile(self.folder / rows_name(first, last))
            if (file.dtype("weight"), file.shape("weight")) != (kind, (last - first, width)):
                raise ValueError(f"checkpoint file {file.path} cannot be used: weight is {file.dtype('weight')} "
                                 f"{file.shape('weight')}")
            for begin in range(start, stop, _BLOCK_ROWS):
                end = min(begin + _BLOCK_ROWS, stop)
                rows = file.mapped("weight", begin - first, end - first)
                yield begin, self.directions(rows.to(device).float())

    def class_table(self, classes):
        """The Pack whose class table the run was trained with: `classes`, or where that is "" the run's --data.

        UserError where it is not there or has other classes.
        """
        path = classes or self.cfg.data
        try:
            pack = open_splits(path)["train"]
        except (ValueError, OSError) as e:
            raise UserError(f"the names of the classes cannot be read ({e}): name the pack of the run by --classes"
                            ) from e
        if (pack.num_classes, pack.classes_digest) != (self.num_classes, self.meta.get("classes_digest")):
            raise UserError(f"{pack.path} has {pack.num_classes} classes that are not the {self.num_classes} of "
                            f"{self.folder}: name the pack of the run by --classes")
        return pack


def open_run(run, checkpoint, world, rows=True):
    """The Trained of a run folder, after a check of the bytes of its backbone and class rows. Not collective.

    checkpoint  name of a folder in RUN/checkpoints; "": the one with the highest top-1, else the newest
    rows        whether the class rows are used, and so checked

    UserError where the run has no such checkpoint, or the checkpoint does not fit its settings; ValueError where it is
    damaged. The ranks share the checksums.
    """
    run = Path(run)
    cfg = _config_of(run)
    folder = _chosen(run, checkpoint)
    meta = read_meta(folder)
    for name in "feature_dim", "logits":
        if meta.get(name) != getattr(cfg, name):
            raise UserError(f"checkpoint {folder} has {name} {meta.get(name)}, {run / 'config.json'} has "
                            f"{getattr(cfg, name)}: take another checkpoint")
    used = ["backbone.safetensors", *(rows_name(*one) for one in ranges_of(folder, meta) if rows)]
    for number, name in enumerate(used):
        facts = meta["files"].get(name, {"bytes": -1, "crc32": -1})
        if fault := fault_of(folder / name, facts, number % world.size == world.rank):
            raise UserError(fault)
    if cfg.data.startswith(PREFIX) and not Spec.parse(cfg.data).images:
        raise UserError(f"{run} was trained on vectors ({cfg.data}), and takes no images: name a run of images")
    backbone = backbones.build(cfg.backbone, (cfg.channels, cfg.image_size, cfg.image_size), cfg.feature_dim, cfg.seed,
                               world, cfg.amp)
    try:
        backbone.load_state_dict(load_file(folder / "backbone.safetensors"))
    except (OSError, RuntimeError, SafetensorError) as e:
        raise UserError(f"{folder / 'backbone.safetensors'} does not fit {run / 'config.json'} ({e}): take another "
                        "checkpoint") from e
    return Trained(cfg, folder, meta, backbone.eval())


def _config_of(run):
    path = run / "config.json"
    try:
        return Config(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as e:
        raise UserError(f"{run} is not the folder of a run (config.json: {e}): name the --out of train.py") from e


def _chosen(run, checkpoint):
    """Folder of the checkpoint that is used."""
    found = folders(run / "checkpoints")
    if not found:
        raise UserError(f"{run} has no checkpoint: let it train until one is saved, or name another run")
    if not checkpoint:
        for folder in found:
            read_meta(folder)  # one that cannot be read may be the best
        return best_of(found) or found[-1]
    named = [folder for folder in found if folder.name == checkpoint]
    if not named:
        names = ", ".join(folder.name for folder in found)
        raise UserError(f"--checkpoint {checkpoint}: {run} has no such checkpoint, but {names}")
    return named[0]
