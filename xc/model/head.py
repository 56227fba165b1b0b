"""The classifier: class rows split over the shard group, and the exact softmax over those that take part in a step.

Hybrid parallel: every rank gathers the features of its shard group and scores them against the class rows that it
owns; two small reductions join the shards' softmaxes. Song et al. 2020, hybrid parallel framework; the sequence is
written out in `ShardedSoftmax`.
"""

import numpy as np
import torch
import torch.nn.functional as F

from xc.comm.autograd import gather_rows, group_logsumexp
from xc.comm.shard import Shard
from xc.model.margin import MARGINS
from xc.model.softmax import ShardedSoftmax
from xc.run import watchdog

_INIT_BLOCK = 4096  # class rows that share one random generator: a rank draws its own blocks alone
_CACHE_BYTES = 2**20  # of logits that a CPU works on at a time: they are passed over several times
_TOP = 100  # logits of an example that `audit` looks for among the active classes


class Head:
    """Full softmax: all classes take part in every step.

    A step calls `refresh`, `select`, `forward` (once, or for one micro-batch after the other), `reduce`, the row
    optimizer and `zero_grad`; pipeline.py does what forward() does, `directions`, gathering and `loss`, in pieces. A
    step of several rounds (schedule.py) may have several selections, each for the micro-batches after a `turn_to`.
    Heads that leave classes out differ in how they set

    active    (A,)    sorted, unique local ids of the classes that take part; None: all of this shard
    offset    (A,)    added to their logits; 0 for every class that is the right one of an example; None: nothing

    The rest is written here, once:

    weight    (S, D)  class rows of this shard; no autograd leaf, they have one owner and one optimizer (RowSGD)
    row_grad  (A, D)  gradient of the active rows, summed over micro-batches and, by `reduce`, over the replicas; None
                      before the first forward() of a step, complete after the last one. Rows that are not active have
                      none, not even zeros
    """

    flags = ()  # fields of Config, of those that say which classes take part, that this head heeds

    def __init__(self, num_classes, feature_dim, world, *, cosine=True, scale=20.0, margin="none", margin_size=0.0,
                 logits_mb=0.0, seed=0, dtype=torch.float32):
        """dtype: of the class rows; gradients and logits of bfloat16 rows are float32."""
        self.num_classes, self.feature_dim = num_classes, feature_dim
        self.world, self.seed = world, seed
        self.cosine, self.scale = cosine, scale if cosine else 1.0
        self.margin, self.margin_size = MARGINS[margin], margin_size
        on_cpu = world.device.type == "cpu"
        self.memory_bytes = (logits_mb or (64 if on_cpu else 256)) * 2**20
        self._block_bytes = min(self.memory_bytes, _CACHE_BYTES) if on_cpu else self.memory_bytes
        self.shard = Shard.of(num_classes, world.shards.size, world.shards.rank)
        self.weight = initial_rows(self.shard, feature_dim, seed, dtype).to(world.device)
        self.compute_dtype = torch.promote_types(dtype, torch.float32)
        self.step, self.active, self.offset, self.row_grad = 0, None, None, None
        self.num_selections = 1
        self.rows_of_step = None  # the active rows as the logits use them, from the first forward() of a step on
        self._workspace, self._own_labels, self._reduced = {}, None, None

    @classmethod
    def of(cls, cfg, num_classes, world):
        """The head that a Config asks for; ValueError where its settings do not fit the number of classes."""
        return cls(num_classes, cfg.feature_dim, world, cosine=cfg.logits == "cosine", scale=cfg.scale,
                   margin=cfg.margin, margin_size=cfg.margin_size, logits_mb=cfg.logits_mb, seed=cfg.seed,
                   dtype=getattr(torch, cfg.row_dtype), **cls.settings(cfg, num_classes))

    @classmethod
    def settings(cls, cfg, num_classes):
        """What __init__ of this head takes beyond the others', from a Config."""
        return {}

    def refresh(self, step, due):
        """Before a step: bring up to date what the choice of classes goes by, if that is due.

        Returns what there is to log of it, usually nothing. Collective.
        """
        return {}

    def select(self, labels, step, num_rounds=1):
        """Choose the classes that take part in a step. Needs no features, so it can run before the backbone.

        labels      (B,)  of all examples of this rank in this step, round by round, global class ids
        step        rounds before this step, which is also its number while every step has one round
        num_rounds  of this step, alike in length

        Sets `num_selections`, into which the step's micro-batches fall. Collective.
        """
        self.step, self.rows_of_step, self.num_selections = step, None, 1

    def turn_to(self, selection):
        """The micro-batches that follow are of that selection, 0 first."""

    def forward(self, features, labels, global_batch, last=True):
        """Cross-entropy of this rank's examples and of all others', summed over them and divided by `global_batch`.

        features      (B, D)  this rank's, B may differ between ranks
        labels        (B,)    global class ids
        global_batch  examples of the whole step over all ranks and micro-batches
        last          no other micro-batch of this selection follows
        returns       ()      the same on every rank; its gradients are sums over all ranks, complete after `reduce`

        Collective. The gradient of the class rows is taken here, not in backward(), and added to `row_grad`.
        """
        counts, labels = self.gather_labels(labels)  # (G,)
        features = gather_rows(self.directions(features), self.world.shards, counts)  # (G, D)
        return self.loss(features, labels, global_batch, last)

    def loss(self, features, labels, global_batch, last=True):
        """The same of features that are gathered already, so that this can be done behind something else.

        features  (G, D)  as `directions` gives them, of all ranks of the shard group
        labels    (G,)
        returns   ()      its gradient of the features is this shard's part, yet to be summed over the group
        """
        return ShardedSoftmax.apply(features, labels, self, global_batch, last)

    def __call__(self, features, labels, global_batch, last=True):
        return self.forward(features, labels, global_batch, last)

    def reduce_async(self):
        """Begin what `reduce` waits for, after the last forward() of a step. Collective."""
        self._reduced = self.world.replicas.all_reduce_async(self.row_grad)

    def reduce(self):
        """Sum the row gradients over the copies of this shard, which have the same active rows. Collective."""
        if self._reduced is None:
            self.reduce_async()
        self._reduced()
        self._reduced = None

    def zero_grad(self):
        self.row_grad = self.rows_of_step = None

    @property
    def num_active(self):
        """Rows of this shard that take part in the step."""
        return len(self.weight) if self.active is None else len(self.active)

    def active_rows(self, block):
        """Where a slice of the active rows lies in `weight`: a slice, or local ids."""
        return block if self.active is None else self.active[block]

    def blocks(self, num_rows, num_examples):
        """Slices of so many rows, each of whose logits fit the cache and the memory for them."""
        size = max(1, int(self._block_bytes / (max(1, num_examples) * self.compute_dtype.itemsize)))
        return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]

    @torch.no_grad()
    def label_places(self, features, labels):
        """How many classes score above the right one: 0 is a top-1 hit. Of equal scores the lower class id wins.

        features  (B, D)  this rank's
        labels    (B,)    global class ids
        returns   (B,)    int64, exact over all classes

        Collective.
        """
        group = self.world.shards
        features, labels, mine = self._gathered(features, labels)
        own = self.shard.owns(labels)
        score = features.new_zeros(len(labels))  # of the right class, known to its owner
        score[own] = (features[own] * self._unit(self.weight[labels[own] - self.shard.first])).sum(1)
        score = group.all_reduce(score)[:, None]  # (G, 1)
        places = torch.zeros_like(labels)
        for block in self.blocks(len(self.weight), len(labels)):
            scores = features @ self._unit(self.weight[block]).T  # (G, block)
            ids = torch.arange(block.start, block.stop, device=labels.device) + self.shard.first
            behind = (scores < score) | ((scores == score) & (ids > labels[:, None]))  # which no nan is
            places += (~behind & (ids != labels[:, None])).sum(1)
        return group.all_reduce(places)[mine]

    @torch.no_grad()
    def audit(self, features, labels):
        """What the choice of classes costs, on a few examples of the last step; nothing where all take part.

        features  (B, D)  this rank's, of classes that `select` was given
        labels    (B,)    global class ids
        returns   active, of all shards; top100_covered, the share of the examples' 100 highest logits of all classes
                  that are among the active; loss_gap, their mean loss less that of the full softmax, without margins

        Collective.
        """
        group = self.world.shards
        num_active = group.all_reduce(torch.tensor([self.num_active], device=labels.device)).item()
        if self.active is None:
            return {"active": num_active}
        features, labels, _ = self._gathered(features, labels)
        top = min(_TOP, self.num_classes)
        is_active = torch.zeros(len(self.weight), dtype=torch.bool, device=labels.device)
        is_active[self.active] = True
        offset = torch.full((len(self.weight),), -torch.inf, dtype=features.dtype, device=labels.device)
        offset[self.active] = 0.0 if self.offset is None else self.offset

        full = features.new_full((len(labels),), -torch.inf)
        chosen = full.clone()
        best = features.new_full((len(labels), top), -torch.inf)  # highest logits so far, and whether they are active
        covered = torch.zeros_like(best, dtype=torch.bool)
        for block in self.blocks(len(self.weight), len(labels)):
            logits = self.scale * features @ self._unit(self.weight[block]).T  # (G, block)
            full = torch.logaddexp(full, logits.logsumexp(1))
            chosen = torch.logaddexp(chosen, (logits + offset[block]).logsumexp(1))
            best, places = torch.cat([best, logits], 1).topk(top)
            covered = torch.cat([covered, is_active[block].expand(len(labels), -1)], 1).gather(1, places)
        best = group.all_gather(best[None]).transpose(0, 1).flatten(1)  # (G, W top)
        covered = group.all_gather(covered[None].byte()).transpose(0, 1).flatten(1)
        gap = group_logsumexp(chosen, group) - group_logsumexp(full, group)
        among_top = covered.gather(1, best.topk(top).indices)
        totals = torch.stack([among_top.sum() / top, gap.sum(), gap.new_tensor(len(gap))]).float()
        share, gap, examples = self.world.replicas.all_reduce(totals).tolist()
        return {"active": num_active, "top100_covered": share / max(1, examples), "loss_gap": gap / max(1, examples)}

    def files(self):
        """{file name: {name: tensor}} of what the choice of classes goes by, for a checkpoint of this shard."""
        return {}

    def load(self, folder):
        """Read what `files` had, on any number of ranks. Not collective; ValueError names what does not fit."""

    def _gathered(self, features, labels):
        """Features (G, D), as the logits use them, and labels (G,) of the shard group; the slice of this rank."""
        group = self.world.shards
        counts, labels = self.gather_labels(labels)
        first = sum(counts[: group.rank])
        features = group.all_gather(self.directions(features), counts)
        return features, labels, slice(first, first + counts[group.rank])

    def gather_labels(self, labels):
        """Numbers of labels of the shard group's ranks, and all of these labels (G,); those last asked for are kept."""
        if labels is not self._own_labels:
            counts = self._counts(labels, self.world.shards)
            self._own_labels, self._group_labels = labels, (counts, self.world.shards.all_gather(labels, counts))
        return self._group_labels

    @staticmethod
    def _counts(labels, group):
        return group.all_gather(torch.tensor([len(labels)], device=labels.device)).tolist()

    def directions(self, features):
        """Features or rows (N, D) as the logits use them: of length 1 for cosine logits."""
        return F.normalize(features) if self.cosine else features

    def _unit(self, rows):
        return self.directions(rows.to(self.compute_dtype))

    def _with_margin(self, logits):
        """Right classes' logits with the margin, and d(with) / d(without), both (N,)."""
        with torch.enable_grad():
            cosine = (logits / self.scale).requires_grad_()
            shifted = self.margin(cosine, self.margin_size)
            (slope,) = torch.autograd.grad(shifted.sum(), cosine)
        return shifted.detach() * self.scale, slope

    def memory(self, name, num_rows, width):
        """(num_rows, width) of memory that is kept from step to step: fresh pages cost more than what is put there."""
        size, memory = num_rows * width, self._workspace.get(name)
        if memory is None or not size <= len(memory) <= 2 * size:
            memory = torch.empty(size, dtype=self.compute_dtype, device=self.weight.device)
            self._workspace[name] = memory
        return memory[:size].view(num_rows, width)


def initial_rows(shard, feature_dim, seed, dtype=torch.float32):
    """Random class rows, (S, D); a class gets the same row in any shard of any world.

    Of the length that torch's nn.Linear starts with, 1/sqrt(3): the longer a row, the less a step turns it.
    """
    rows = torch.empty(len(shard), feature_dim, dtype=dtype)
    for block in range(shard.first // _INIT_BLOCK, -(-shard.last // _INIT_BLOCK)):
        watchdog.note("making the class rows")
        first = block * _INIT_BLOCK
        # numpy's: torch's generator heeds 32 bits of its seed only.
        drawn = np.random.default_rng([seed, block]).standard_normal((_INIT_BLOCK, feature_dim), np.float32)
        drawn = torch.from_numpy(drawn).div_((3 * feature_dim) ** 0.5)
        start, stop = max(first, shard.first), min(first + _INIT_BLOCK, shard.last)
        rows[start - shard.first : stop - shard.first] = drawn[start - first : stop - first]
    return rows
