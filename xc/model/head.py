"""The classifier: class rows split over the shard group, and the softmax over the classes that take part in a step.

Hybrid parallel (Song et al. 2020): every rank gathers the features of its shard group and scores them against its own
class rows; two small reductions join the softmaxes of the shards. `softmax.ShardedSoftmax` has the steps.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from xc.comm.autograd import gather_rows, group_logsumexp
from xc.comm.shard import Shard
from xc.model.group_labels import GroupLabels
from xc.model.initial_rows import initial_rows
from xc.model.logit_scale import logit_scale
from xc.model.margin import MARGINS
from xc.model.softmax import ShardedSoftmax
from xc.run import watchdog

_CACHE_BYTES = 2**20  # logits that a CPU works on at a time: it reads them several times, so they should stay in cache
_TOP = 100  # highest logits of an example that `selection_quality` looks for among the active classes


@dataclass(frozen=True)
class Part:
    """Examples of a batch that have active classes of their own, beside those that all examples share.

    examples  slice of `Selection.order`
    rows      slice of `Selection.active`: the rows of these examples alone
    offset    (R,)  added to the logits of these examples with these rows; None: nothing is added
    """

    examples: slice
    rows: slice
    offset: torch.Tensor | None


@dataclass(frozen=True)
class Selection:
    """The classes of this shard that take part in a step, or in one accumulation step or micro-batch of it.

    active     (A,)  unique local ids, sorted; with parts, first the target classes, sorted, which all examples share,
                     then those of each part, sorted, and two parts can have the same; None: all S classes
    offset     (A,)  added to the logits, 0 for target classes; None: nothing is added; with parts they have it
    parts            [Part], of the examples of all replicas that are in this replica's order; empty: all are alike
    order      (G,)  the examples of a batch, those of a part side by side; None: as they come
    first            of the batch: the first example of this rank
    """

    active: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    parts: tuple = ()
    order: torch.Tensor | None = None
    first: int = 0

    @property
    def num_shared(self):
        """Active rows that all examples share."""
        return self.parts[0].rows.start if self.parts else len(self.active)

    def spans(self, num_active):
        """[(rows, examples, offset), …]: slices of the `num_active` active rows, the slice of the examples that are
        compared with them, and what is added to their logits, (rows,) or None."""
        if not self.parts:
            return [(slice(0, num_active), slice(None), self.offset)]
        of_parts = [(part.rows, part.examples, part.offset) for part in self.parts]
        return [(slice(0, self.num_shared), slice(None), None), *of_parts]

    def offsets(self, block, dtype):
        """What is added to the logits of a slice of all rows, (P, rows) of P parts, at least one; -inf: not active."""
        size = block.stop - block.start
        table = torch.full((max(1, len(self.parts)), size), -torch.inf, dtype=dtype, device=self.active.device)
        bounds = torch.tensor([block.start, block.stop], device=self.active.device)
        for i, (rows, _, offset) in enumerate(self.spans(len(self.active))):
            places = table[i - 1] if i else table  # the first rows are of all parts
            ids = self.active[rows]
            inside = slice(*torch.searchsorted(ids, bounds).tolist())
            places[..., ids[inside] - block.start] = 0.0 if offset is None else offset[inside].to(dtype)
        return table

    def parts_of_examples(self, count):
        """The part (count,) of the first examples of this rank."""
        part_of = torch.zeros(self.first + count, dtype=torch.int64, device=self.active.device)
        if self.parts:
            part_of = torch.empty(len(self.order), dtype=torch.int64, device=self.active.device)
            for i, part in enumerate(self.parts):
                part_of[self.order[part.examples]] = i
        return part_of[self.first : self.first + count]


class Head:
    """Full softmax: all classes take part in every step.

    A step calls `refresh`, `select`, `forward` (once per micro-batch), `reduce`, the row optimizer and `zero_grad`.
    train/pipeline.py calls the parts of `forward`, `directions`, a gather and `loss`, one by one, to overlap them.
    Heads that leave classes out override `select`.

    weight      (S, D)  class rows of this shard; no autograd leaf: RowSGD updates them
    row_grad    (A, D)  gradient of the active rows, summed over the micro-batches and, by `reduce`, over the replicas;
                        None before the first forward() of a step; inactive rows have no gradient
    selections          list of Selection, one for each equal part of the step's micro-batches, set by `select`; None in
                        the list: not chosen yet
    selection           the Selection that `row_grad` and the next loss() belong to
    step                number of the step, set by `select`; random choices depend on it
    labels              GroupLabels: those of all ranks
    builds              whether `refresh` builds something at all
    has_built           whether `refresh` has built what the choice of classes depends on, or `load` has read it
    """

    builds = has_built = False
    flags = ()  # names of the Config fields about the choice of classes that this head reads

    def __init__(self, num_classes, feature_dim, world, *, cosine=True, scale=20.0, margin="none", margin_size=0.0,
                 logits_mb=0.0, seed=0, dtype=torch.float32):
        """
        logits_mb  MiB for the logits that are kept, and for rows that are gathered; the others are computed twice;
                   0: 256
        dtype      of the class rows; gradients and logits of bfloat16 rows are float32
        """
        self.num_classes, self.feature_dim = num_classes, feature_dim
        self.world, self.seed = world, seed
        self.cosine, self.scale = cosine, scale if cosine else 1.0
        self.margin, self.margin_size = MARGINS[margin], margin_size
        on_cpu = world.device.type == "cpu"
        self.memory_bytes = (logits_mb or 256) * 2**20
        self._block_bytes = min(self.memory_bytes, _CACHE_BYTES) if on_cpu else self.memory_bytes
        self.shard = Shard.of(num_classes, world.shards.size, world.shards.rank)
        self.weight = initial_rows(self.shard, feature_dim, seed, dtype).to(world.device)
        self.compute_dtype = torch.promote_types(dtype, torch.float32)
        self.step, self.selections, self.selection, self.row_grad = 0, [Selection()], Selection(), None
        self.active_row_cache = None  # ActiveRows of the selection, made by its first loss()
        self._workspace, self._reduced, self.labels = {}, None, GroupLabels(world)

    @classmethod
    def of(cls, cfg, num_classes, world):
        """The head of a Config; UserError where its settings do not fit the number of classes."""
        return cls(num_classes, cfg.feature_dim, world, cosine=cfg.logits == "cosine",
                   scale=logit_scale(cfg, num_classes), margin=cfg.margin, margin_size=cfg.margin_size, seed=cfg.seed,
                   dtype=getattr(torch, cfg.row_dtype), **cls.settings(cfg, num_classes))

    @classmethod
    def settings(cls, cfg, num_classes):
        """The arguments that __init__ of this head takes beyond those of `Head`, from a Config."""
        return {}

    def refresh(self, step, due):
        """Rebuild what the choice of classes depends on (a graph, an index) where `due`; called before every step.

        Returns {name: number} to log, often empty. Collective.
        """
        return {}

    def select(self, labels, step, accumulation_steps=1, micro_batches=None):
        """Choose the classes that take part in a step: sets `selections` and returns it. Collective.

        labels              (B,)  global class ids of all examples of this rank in this step, in the order of the
                                  accumulation steps
        step                accumulation steps before this step; the number of the step where every step has one
        accumulation_steps  of this step, of equal length
        micro_batches       of this step; None: each accumulation step is one
        """
        self.step, self.active_row_cache = step, None
        self.selections, self.selection = [Selection()], Selection()
        return self.selections

    def use_selection(self, i):
        """Use selections[i] for the micro-batches that follow. A step with one selection need not call it."""

    def forward(self, features, labels, global_batch, last=True):
        """Cross-entropy summed over the examples of all ranks, divided by `global_batch`. Collective.

        features      (B, D)  of this rank; B may differ between ranks
        labels        (B,)    global class ids
        global_batch  examples of the whole step over all ranks and micro-batches
        last          no other micro-batch of this selection follows
        returns       ()      the same on every rank; its gradients are sums over all ranks, complete after `reduce`

        This call, not backward(), computes the gradient of the class rows and adds it to `row_grad`.
        """
        counts, labels = self.labels.of_copy(labels)  # (G,)
        features = gather_rows(self.directions(features), self.world.shards, counts)  # (G, D)
        return self.loss(features, labels, global_batch, last)

    def loss(self, features, labels, global_batch, last=True):
        """`forward` of features that are gathered already. Collective.

        features  (G, D)  of all ranks of the shard group, from `directions`
        labels    (G,)
        returns   ()      its feature gradient is the part of this shard; the caller sums it over the group
        """
        return ShardedSoftmax.apply(features, labels, self, global_batch, last)

    def __call__(self, features, labels, global_batch, last=True):
        return self.forward(features, labels, global_batch, last)

    def reduce_async(self):
        """Start the sum that `reduce` waits for, after the last forward() of a step. Collective."""
        self._reduced = self.world.replicas.all_reduce_async(self.row_grad)

    def reduce(self):
        """Sum the row gradients over the replicas of this shard, which have the same active rows. Collective."""
        if self._reduced is None:
            self.reduce_async()
        self._reduced()
        self._reduced = None

    def zero_grad(self):
        """Forget the row gradients of the step."""
        self.row_grad = self.active_row_cache = None

    @property
    def num_active(self):
        """A: rows of this shard in the current selection."""
        return self._num_active(self.selection)

    def _num_active(self, selection):
        return len(self.weight) if selection.active is None else len(selection.active)

    def active_rows(self, block):
        """Indices in `weight` of a slice of the active rows: a slice or local ids."""
        return block if self.selection.active is None else self.selection.active[block]

    def blocks(self, num_rows, num_examples):
        """Slices that cover `num_rows` rows; the logits of each fit the cache and the memory for them."""
        size = max(1, int(self._block_bytes / (max(1, num_examples) * self.compute_dtype.itemsize)))
        return [slice(first, min(first + size, num_rows)) for first in range(0, num_rows, size)]

    @torch.no_grad()
    def num_scores_above_target(self, features, labels):
        """How many of all classes score above the target class; 0 is a top-1 hit. Collective.

        features  (B, D)  of this rank
        labels    (B,)    global class ids
        returns   (B,)    int64; of equal scores the lower class id wins, and a NaN score wins over any other
        """
        group = self.world.shards
        features, labels, mine = self._gathered(features, labels)
        own = self.shard.owns(labels)
        target = features.new_zeros(len(labels))  # score of the target class; its owner fills it in
        target[own] = (features[own] * self._unit(self.weight[labels[own] - self.shard.first])).sum(1)
        target = group.all_reduce(target)[:, None]  # (G, 1)
        above = torch.zeros_like(labels)
        for block in self.blocks(len(self.weight), len(labels)):
            watchdog.progress("comparing a batch with all classes", block.start / len(self.weight))
            scores = features @ self._unit(self.weight[block]).T  # (G, block)
            ids = torch.arange(block.start, block.stop, device=labels.device) + self.shard.first
            below = (scores < target) | ((scores == target) & (ids > labels[:, None]))  # False where a score is NaN
            above += (~below & (ids != labels[:, None])).sum(1)
        return group.all_reduce(above)[mine]

    @torch.no_grad()
    def selection_quality(self, features, labels):
        """Compare the first selection of the last step with all classes, on a few examples. Collective.

        features  (B, D)  of this rank, of classes that `select` was given
        labels    (B,)    global class ids
        returns   active, classes of all shards that took part; and, where some did not,
                  active_per_example, the mean number of classes that an example is compared with;
                  top100_covered, the share of the examples' 100 highest logits over all classes that are active;
                  loss_gap, the mean loss less that of the full softmax, without margins
        """
        group, selection = self.world.shards, self.selections[0]
        # Two parts of a batch can have the same class: it counts once.
        own = self._num_active(selection) if not selection.parts else len(selection.active.unique())
        num_active = group.all_reduce(torch.tensor([own], device=labels.device)).item()
        if selection.active is None:
            return {"active": num_active}
        part_of = selection.parts_of_examples(len(labels))
        features, labels, _ = self._gathered(features, labels)
        part_of = group.all_gather(part_of, self.labels.counts_of_last())
        top = min(_TOP, self.num_classes)

        full_lse = features.new_full((len(labels),), -torch.inf)
        active_lse = full_lse.clone()
        best = features.new_full((len(labels), top), -torch.inf)  # highest logits so far, and whether they are active
        covered, compared = torch.zeros_like(best, dtype=torch.bool), torch.zeros_like(labels)
        for block in self.blocks(len(self.weight), len(labels)):
            watchdog.progress("comparing the choice with all classes", block.start / len(self.weight))
            logits = self.scale * features @ self._unit(self.weight[block]).T  # (G, block)
            full_lse = torch.logaddexp(full_lse, logits.logsumexp(1))
            offset = selection.offsets(block, features.dtype)[part_of]  # (G, block)
            compared += (offset > -torch.inf).sum(1)
            active_lse = torch.logaddexp(active_lse, (logits + offset).logsumexp(1))
            best, indices = torch.cat([best, logits], 1).topk(top)
            covered = torch.cat([covered, offset > -torch.inf], 1).gather(1, indices)
        best = group.all_gather(best[None]).transpose(0, 1).flatten(1)  # (G, shards * top)
        covered = group.all_gather(covered[None].byte()).transpose(0, 1).flatten(1)
        gap = group_logsumexp(active_lse, group) - group_logsumexp(full_lse, group)
        covered = covered.gather(1, best.topk(top).indices)
        totals = [group.all_reduce(compared).sum(), covered.sum() / top, gap.sum(), gap.new_tensor(len(gap))]
        totals = torch.stack(totals).float()
        *sums, examples = self.world.replicas.all_reduce(totals).tolist()
        per_example, share, gap = (total / max(1, examples) for total in sums)
        return {"active": num_active, "active_per_example": per_example, "top100_covered": share, "loss_gap": gap}

    def files(self):
        """{file name: {name: tensor}} for a checkpoint: what the choice of classes of this shard depends on.

        The tensors never change in place.
        """
        return {}

    def load(self, folder):
        """Read the files that `files` gave, written by any number of ranks. ValueError where they do not fit."""

    def _gathered(self, features, labels):
        """Of the shard group: features (G, D) from `directions`, labels (G,), and the slice that is this rank's."""
        group = self.world.shards
        counts, labels = self.labels.of_copy(labels)
        first = sum(counts[: group.rank])
        features = group.all_gather(self.directions(features), counts)
        return features, labels, slice(first, first + counts[group.rank])

    def directions(self, features):
        """Features or rows (N, D) as the logits use them: scaled to length 1 for cosine logits."""
        return F.normalize(features) if self.cosine else features

    def _unit(self, rows):
        return self.directions(rows.to(self.compute_dtype))

    def with_margin(self, logits):
        """Target logits (N,) with the margin, and d(with margin) / d(without) (N,)."""
        with torch.enable_grad():
            cosine = (logits / self.scale).requires_grad_()
            shifted = self.margin(cosine, self.margin_size)
            (slope,) = torch.autograd.grad(shifted.sum(), cosine)
        return shifted.detach() * self.scale, slope

    def memory(self, name, num_rows, width):
        """An uninitialized tensor (num_rows, width) in memory that stays from step to step: fresh pages are slow."""
        size, memory = num_rows * width, self._workspace.get(name)
        if memory is None or not size <= len(memory) <= 2 * size:
            memory = torch.empty(size, dtype=self.compute_dtype, device=self.weight.device)
            self._workspace[name] = memory
        return memory[:size].view(num_rows, width)
