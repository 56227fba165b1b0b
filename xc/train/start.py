"""What a new run starts from (--init): the weights of a file, or a trained run and its class rows, by class name."""

import json
import math
import sys
from pathlib import Path

import torch

from xc.checkpoint.saved_run import chosen, is_run, open_saved
from xc.config import Config
from xc.data.class_names import NAMES, labels_in, names_of
from xc.errors import UserError, one_line
from xc.files import replace_text
from xc.model import start_weights
from xc.model.initial_rows import RANDOM_LENGTH
from xc.train.feature_rows import fill_rows

_FRESH_RATES = {"adamw": Config.lr, "sgd": 0.1}  # rates for random weights
_BLOCK = 2**20  # old classes that are looked at at once


class Start:
    """Gives a new run its weights, in the order of the methods; nothing where a checkpoint is resumed. All methods are
    collective.

    rows_known  whether the class rows are more than random numbers: they classify already, and tell which classes are
                near each other
    """

    def __init__(self, cfg, state, train_split, resumed, world):
        """Load the backbone and, from a run, the rows of the classes that have the same names.

        resumed  whether a checkpoint was loaded, which goes before --init

        UserError where the file or the run cannot be used.
        """
        self._cfg, self._state, self._split, self._world = cfg, state, train_split, world
        self._saved, self._old, self._new, self.rows_known = None, None, None, False
        self._length = RANDOM_LENGTH
        self._begins = bool(cfg.init) and not resumed
        if cfg.init and resumed:
            self._say("note: --init is not read, since the weights are those of the checkpoint")
        elif cfg.init and is_run(cfg.init):
            self._take_run()
        elif cfg.init:
            self._take_file()

    def record(self):
        """Say how many classes were kept, are new and are gone, and list them in the run folder."""
        if not self._saved:
            return
        out = Path(self._cfg.out)
        num_gone = self._list_gone(out / "init-gone.txt")
        num_new = len(self._new)
        num_kept = self._split.names.num_classes - num_new
        with self._world.raise_on_all_ranks():
            if self._world.rank == 0:
                with open(out / "init-new.txt", "w", encoding="utf-8") as file:
                    _write_names(file, self._split.names, self._new)
                replace_text(out / "init.json", json.dumps({
                    "run": str(self._saved.run), "checkpoint": self._saved.folder.name, "kept": num_kept,
                    "new": num_new, "gone": num_gone}, indent=1) + "\n")
        self._say(f"init: of the classes {num_kept:,} are kept, {num_new:,} new, {num_gone:,} gone (by name; see "
                  f"init-new.txt and init-gone.txt in {out})")

    def fill_rows(self, loader, stopped):
        """Set the rows of new classes from the features of their images, where --init-rows says so.

        stopped  asked before every batch, answers alike on all ranks
        returns  False where it was stopped
        """
        if not self._begins:
            return True
        num_classes = self._split.names.num_classes if self._new is None else len(self._new)
        if self._cfg.init_rows == "features" and num_classes:
            with self._world.traffic.uncounted():
                found = fill_rows(self._state, loader, self._new, self._length, stopped, self._world)
            if found is None:
                return False
            num_images, num_random = found
            random = f"; {num_random:,} have no image, their rows are random" if num_random else ""
            self._say(f"init: rows of {num_classes - num_random:,} classes from the features of {num_images:,} "
                      f"images{random}")
        self.rows_known = self._saved is not None or self._cfg.init_rows == "features"
        return True

    def _take_file(self):
        with self._world.raise_on_all_ranks():
            lines = start_weights.load(self._state.backbone, Path(self._cfg.init)) if self._world.rank == 0 else []
        start_weights.share(self._state.backbone, self._world)
        for line in lines:
            self._say(line)

    def _take_run(self):
        cfg, head, shards = self._cfg, self._state.head, self._world.shards
        checkpoint = chosen(cfg.init, "", self._world)
        with self._world.raise_on_all_ranks():
            self._saved = saved = open_saved(cfg.init, checkpoint, self._world)
            saved.start(self._state.backbone, cfg, images=len(self._split.input_shape) == 3)
            self._old_names = saved.class_table(advice="move the pack of that run back")
            old = torch.from_numpy(labels_in(self._old_names, self._split.names, head.shard))  # (S,), -1: none
            kept = (old >= 0).nonzero()[:, 0]
            self._old, order = old[kept].sort()
            self._kept = kept[order]
            saved.copy_rows(self._old, head.weight, self._kept)
        new = head.shard.first + (old < 0).nonzero()[:, 0]
        counts = shards.all_gather(torch.tensor([len(new)])).tolist()
        self._new = shards.all_gather(new, counts)  # of all ranks, ascending
        if len(self._new) == self._split.names.num_classes:
            raise UserError(f"--init {cfg.init} has no class of --data {cfg.data}, by name: give "
                            f"{saved.folder / 'backbone.safetensors'} to start from its backbone alone")
        self._length = self._set_length()
        self._say(f"init: backbone and class rows of {saved.run}, {saved.folder.name}")
        if cfg.lr >= _FRESH_RATES.get(cfg.optimizer, math.inf) and self._world.rank == 0:
            print(f"warning: --lr {cfg.lr:g} is a rate for random weights, and throws trained ones about: give "
                  "@recipes/grow.args, or a lower one", file=sys.stderr, flush=True)

    def _list_gone(self, path):
        """Write the names of the old classes that are in no shard; returns their number."""
        num_gone, num_old, file = 0, self._old_names.num_classes, None
        with self._world.raise_on_all_ranks():
            if self._world.rank == 0:
                file = open(path, "w", encoding="utf-8")  # noqa: SIM115
        for first in range(0, num_old, _BLOCK):
            last = min(first + _BLOCK, num_old)
            kept = torch.zeros(last - first, dtype=torch.int32)
            begin, end = torch.searchsorted(self._old, torch.tensor([first, last])).tolist()
            kept[self._old[begin:end] - first] = 1
            gone = first + (self._world.shards.all_reduce(kept) == 0).nonzero()[:, 0]
            num_gone += len(gone)
            with self._world.raise_on_all_ranks():
                if file:
                    _write_names(file, self._old_names, gone)
        with self._world.raise_on_all_ranks():
            if file:
                file.close()  # writes what is left
        return num_gone

    def _set_length(self):
        """Give the rows that are kept the length of new ones; returns that length.

        Cosine logits do not depend on it, but a step turns a longer row less, and rows grow while they are trained. So
        all rows get the length that the rates of a new run are for. Rows of --logits inner keep their length, and new
        ones get the mean of them.
        """
        head, total = self._state.head, torch.zeros(2, dtype=torch.float64)
        for places in self._kept.split(_BLOCK):
            rows = head.weight[places].float()
            lengths = rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
            total += torch.tensor([lengths.sum(dtype=torch.float64), len(lengths)])
            if head.cosine:
                head.weight[places] = (rows * (RANDOM_LENGTH / lengths)).to(head.weight.dtype)
        length, count = self._world.shards.all_reduce(total).tolist()
        return RANDOM_LENGTH if head.cosine else length / count

    def _say(self, line):
        if self._world.rank == 0:
            print(line, flush=True)


def _write_names(file, names, labels):
    """Write the names of some labels (n,), one a line."""
    for some in labels.split(NAMES):
        found = names_of(some, names)
        file.writelines(f"{one_line(found[label])}\n" for label in some.tolist())
