"""What a new run starts from (--init): the weights of a file, or a trained run and its class rows, by class name."""

import json
from pathlib import Path

import torch

from xc.checkpoint.saved_run import is_run, open_saved
from xc.config import option
from xc.data.class_names import NAMES, labels_in, names_of
from xc.errors import UserError, one_line
from xc.files import replace_text
from xc.model import start_weights
from xc.model.backbone import resolved
from xc.model.head import RANDOM_LENGTH
from xc.train.feature_rows import fill_rows

_BLOCK = 2**20  # old classes that are looked at at once


class Start:
    """Gives a new run its weights, in the order of the methods; nothing where a checkpoint is resumed. All methods are
    collective.

    rows_tell  whether the class rows say which classes are near each other: they are no random numbers
    """

    def __init__(self, cfg, state, train_split, resumed, world):
        """Load the backbone and, from a run, the rows of the classes that have the same names.

        resumed  whether a checkpoint was loaded, which goes before --init

        UserError where the file or the run cannot be used.
        """
        self._cfg, self._state, self._split, self._world = cfg, state, train_split, world
        self._saved, self._old, self._new, self.rows_tell = None, None, None, False
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
        if self._cfg.init_rows == "features" and (self._new is None or len(self._new)):
            found = fill_rows(self._state, loader, self._new, self._row_length(), stopped, self._world)
            if found is None:
                return False
            num_images, num_random = found
            num_filled = (self._split.names.num_classes if self._new is None else len(self._new)) - num_random
            random = f"; {num_random:,} have no image, their rows are random" if num_random else ""
            self._say(f"init: rows of {num_filled:,} classes from the features of {num_images:,} images{random}")
            self.rows_tell = True
        self.rows_tell = self.rows_tell or bool(self._saved)
        return True

    def _take_file(self):
        with self._world.raise_on_all_ranks():
            lines = start_weights.load(self._state.backbone, Path(self._cfg.init)) if self._world.rank == 0 else []
        start_weights.share(self._state.backbone, self._world)
        for line in lines:
            self._say(line)

    def _take_run(self):
        cfg, head, shards = self._cfg, self._state.head, self._world.shards
        with self._world.raise_on_all_ranks():
            self._saved = saved = open_saved(cfg.init, "", self._world)
            check_fit(cfg, saved, images=len(self._split.input_shape) == 3)
            saved.load_backbone(self._state.backbone)
            self._old_names = saved.class_table()
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
        self._say(f"init: backbone and class rows of {saved.run}, {saved.folder.name}")

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
        if file:
            file.close()
        return num_gone

    def _row_length(self):
        """Length of the rows of new classes: the mean of those that are kept, or that of random ones."""
        weight, total = self._state.head.weight, torch.zeros(2, dtype=torch.float64)
        if not self._saved:
            return RANDOM_LENGTH
        for first in range(0, len(self._kept), _BLOCK):
            lengths = weight[self._kept[first : first + _BLOCK]].float().norm(dim=1)
            total += torch.tensor([lengths.sum(dtype=torch.float64), len(lengths)])
        length, count = self._world.shards.all_reduce(total).tolist()
        return length / count

    def _say(self, line):
        if self._world.rank == 0:
            print(line, flush=True)


def check_fit(cfg, saved, images):
    """UserError where pixels, features or class rows of a saved run mean something else in a run with this Config."""
    for name in "feature_dim", "channels", "logits", "input_norm":
        here, there = getattr(cfg, name), getattr(saved.cfg, name)
        if here != there:
            raise UserError(f"{option(name)} {here} does not fit --init {cfg.init}, which has {there}: give "
                            f"{option(name)} {there}")
    here, there = (resolved(one.backbone, images) for one in (cfg, saved.cfg))
    if here != there:
        raise UserError(f"--backbone {cfg.backbone} does not fit --init {cfg.init}, which has {there}: give --backbone "
                        f"{there}")


def _write_names(file, names, labels):
    """Write the names of some labels (n,), one a line."""
    for some in labels.split(NAMES):
        found = names_of(some, names)
        file.writelines(f"{one_line(found[label])}\n" for label in some.tolist())
