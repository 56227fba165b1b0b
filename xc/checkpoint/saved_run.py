"""A run that was saved: its settings, one of its checkpoints, the class rows in it, and the names of the classes."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file

from xc.checkpoint.layout import best_of, fault_of, folders, ranges_of, read_meta, rows_name
from xc.checkpoint.tensor_file import TensorFile
from xc.config import Config, option
from xc.data import synthetic
from xc.data.class_names import ClassNames
from xc.data.hdf5_tables import PackError
from xc.data.pack import open_splits
from xc.errors import UserError
from xc.model.backbone import resolved
from xc.model.logit_scale import logit_scale
from xc.run.folder import CLASSES_FILE

_BLOCK_ROWS = 4096  # class rows that are mapped at once
_ADVICE = "name the pack of the run by --classes"
_ROW_TYPES = {"float32": "F32", "bfloat16": "BF16"}


@dataclass(frozen=True)
class SavedRun:
    """cfg: the run's Config; folder, meta: of the checkpoint."""

    cfg: Config
    folder: Path
    meta: dict

    @property
    def run(self):
        """The run folder."""
        return self.folder.parent.parent

    @property
    def num_classes(self):
        return self.meta["num_classes"]

    @property
    def feature_dim(self):
        return self.meta["feature_dim"]

    @property
    def classes_digest(self):
        return self.meta.get("classes_digest")

    @property
    def scale(self):
        """Factor of the logits, as in `Head`."""
        return logit_scale(self.cfg, self.num_classes)

    def directions(self, features):
        """Features or rows (N, D) as the logits use them, as in `Head`: scaled to length 1 for cosine logits."""
        return F.normalize(features) if self.cfg.logits == "cosine" else features

    def row_blocks(self, shard, device):
        """Yields (first class, rows (n, D) as the logits use them, float32) of the classes of a Shard, ascending.

        The rows are mapped from the files of the checkpoint, block by block. ValueError where a file is damaged.
        """
        for begin, rows in self._mapped(shard.first, shard.last):
            yield begin, self.directions(rows.to(device).float())

    def copy_rows(self, classes, table, places):
        """Copy class rows as they were saved: table[places[i]] becomes the row of classes[i].

        classes  (n,)  int64, ascending
        table    (S, D)
        places   (n,)  int64

        ValueError where a file is damaged.
        """
        if not len(classes):
            return
        for begin, rows in self._mapped(int(classes[0]), int(classes[-1]) + 1):
            start, stop = torch.searchsorted(classes, torch.tensor([begin, begin + len(rows)])).tolist()
            if start < stop:  # else no byte of the block is read
                table[places[start:stop]] = rows[classes[start:stop] - begin].to(table.device, table.dtype)

    def start(self, backbone, cfg, images):
        """Give the Backbone of a new run with this Config the weights of the checkpoint.

        images  whether its examples are images

        UserError where pixels, features or class rows mean something else there, or the network is another one.
        """
        pairs = {name: (getattr(cfg, name), getattr(self.cfg, name))
                 for name in ("feature_dim", "channels", "logits", "input_norm")}
        pairs["backbone"] = tuple(resolved(one.backbone, images) for one in (cfg, self.cfg))
        for name, (here, there) in pairs.items():
            if here != there:
                raise UserError(f"{option(name)} {here} does not fit --init {self.run}, which has {there}: give "
                                f"{option(name)} {there}")
        self.load_backbone(backbone, advice=f"give --image-size {self.cfg.image_size} and --data of the kind of "
                                            f"{self.cfg.data}, as {self.run} has them")

    def load_backbone(self, backbone, advice="take another checkpoint"):
        """Give a Backbone the weights of the checkpoint; UserError with the advice where it is another network."""
        path = self.folder / "backbone.safetensors"
        try:
            backbone.load_state_dict(backbone.renamed(load_file(path)))
        except (OSError, RuntimeError, SafetensorError) as e:
            raise UserError(f"{path} does not fit the network ({e}): {advice}") from e

    def class_table(self, pack="", advice=_ADVICE):
        """The ClassNames that the run was trained with: those that it kept, or of the pack at that path.

        UserError with the advice where they are not there or are of other classes.
        """
        kept, path = self.run / CLASSES_FILE, pack or self.cfg.data
        try:
            if not pack and kept.exists():
                path, names = kept, ClassNames.of_file(kept)
            elif path.startswith(synthetic.PREFIX):
                names = synthetic.open_splits(self.cfg)["train"].names
            else:  # code before this one kept no names
                names = open_splits(path)["train"].names
        except (ValueError, OSError) as e:
            raise UserError(f"the names of the classes cannot be read ({e}): {advice}") from e
        return self._of_run(names, path, advice)

    def training_pack(self, path=""):
        """The Pack that the run was trained with: at that path, or where its --data was.

        UserError where it is not there or has other classes.
        """
        path = path or self.cfg.data
        try:
            pack = open_splits(path)["train"]
        except (PackError, OSError) as e:
            raise UserError(f"the images of the run cannot be read ({e}): {_ADVICE}") from e
        return self._of_run(pack, path, _ADVICE)

    def _of_run(self, table, path, advice):
        if (table.num_classes, table.classes_digest) != (self.num_classes, self.classes_digest):
            raise UserError(f"{path} has {table.num_classes} classes that are not the {self.num_classes} of "
                            f"{self.folder}: {advice}")
        return table

    def _mapped(self, first, last):
        """Yields (first class, rows (n, D)) that cover the classes first … last - 1, ascending."""
        width, kind = self.meta["feature_dim"], _ROW_TYPES.get(self.meta["row_dtype"])
        for begin, end in ranges_of(self.folder, self.meta):
            start, stop = max(begin, first), min(end, last)
            if start >= stop:
                continue
            file = TensorFile(self.folder / rows_name(begin, end))
            if (file.dtype("weight"), file.shape("weight")) != (kind, (end - begin, width)):
                raise ValueError(f"checkpoint file {file.path} cannot be used: weight is {file.dtype('weight')} "
                                 f"{file.shape('weight')}")
            for block in range(start, stop, _BLOCK_ROWS):
                block_end = min(block + _BLOCK_ROWS, stop)
                yield block, file.mapped("weight", block - begin, block_end - begin)


def chosen(run, checkpoint, world):
    """The name of the checkpoint that `open_saved` takes on rank 0, for all ranks: of a run that still trains, each
    could see other ones. Collective; UserError, ValueError as there.
    """
    name = ""
    with world.raise_on_all_ranks():
        if world.rank == 0:
            _config_of(Path(run))
            name = _chosen(Path(run), checkpoint).name
    return world.all_ranks.all_gather_object(name)[0]


def open_saved(run, checkpoint, world, rows=True):
    """The SavedRun of a run folder, after a check of the bytes of its backbone and class rows. Not collective.

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
    return SavedRun(cfg, folder, meta)


def is_run(path):
    """Whether a path is the folder of a run."""
    return os.path.isfile(os.path.join(path, "config.json"))


_GONE = ("graph_refresh_angle",)  # settings of older versions that a trained run does not need


def _config_of(run):
    path = run / "config.json"
    try:
        values = dict(json.loads(path.read_text()))
        return Config(**{name: value for name, value in values.items() if name not in _GONE})
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
