"""KNN softmax by scores: of the neighbours of the target classes, those to which the features give most probability."""

import math

import torch
import torch.nn.functional as F

from xc.comm.autograd import group_logsumexp
from xc.errors import UserError
from xc.knn.similar_parts import similar_parts
from xc.model.group_labels import counts_of
from xc.model.head import Part, Selection
from xc.model.knn import KnnHead, num_neighbors
from xc.model.sampled import budget, skip

_FAR_ROWS = 64  # random rows that stand for all that are no candidates in an example's partition function
_BEST, _PLACES = 3, 12  # of an example's candidates the best, whose nearest neighbours are candidates as well
NUM_FURTHER = _BEST * _PLACES  # candidates of an example beside the K neighbours of its target class, at most
_PAIRS = 512  # candidates that are scored at a time, so that their rows stay in the cache
_NEAR_OF_EXAMPLE, _LEAST_EXAMPLES = 32, 8  # near classes for each example that parts aim at; examples of a part
_FEW_PARTS, _FEW_ROWS = 8, 2**13  # more parts than that only where they have fewer rows than that, which cost little
_NO_CLASS = 2**62  # fills up rows of local ids
_LEAST_FAR = 4  # drawn classes of a shard from which on candidates are drawn by their scores


class ScoredKnnHead(KnnHead):
    """Near classes are chosen by SCORE among the neighbours of the target classes in the graph of KNN softmax.

    Song et al. 2020 take neighbours by their place in the graph. This choice (ours) asks the features:

    1. Candidates of an example are the K neighbours of its target class, and the nearest neighbours of the best of
       them; a shard takes the best of its own. Their logits are exact. The rest of the partition function comes from a
       few random rows. That gives the probability of every candidate, estimated.
    2. The batch is cut into `near_parts` parts of similar examples. Each part has active classes of its own beside the
       target classes of the whole batch. So an example is compared with M classes, while up to near_parts times as
       many different classes take part in the step.
    3. Near classes of a part are the candidates with the highest sum of probabilities over its examples, at most
       `near_share` of the quota that the target classes leave.
    4. The rest of its quota is drawn: candidates with a probability π that is a mix, half and half, of their scores and
       of equal shares, by systematic sampling (Madow 1949); the others from strata, as in SampledHead. -log π is added
       to the logit of a drawn class: the expected partition function of every part is the full one.

    Each micro-batch has a selection of its own. Before the first build of the graph the other classes are random, and
    all examples are one part: what is near to young features is no better than random, and costs more.

    What a rank needs of the others for it: two all-reduces over the shards, each of one number of 4 bytes for each
    example of the batch. With copies of the classifier their features and labels are gathered too, and the choice of
    the first copy, 12 bytes a class, is sent to the others, so that a difference in rounding cannot part them.

    A shard chooses by its own scores and fills its own quota. So the choice depends on the number of shards, as that of
    SampledHead does. The parts do not: they are cut by whole numbers.
    """

    flags = (*KnnHead.flags, "near_parts")

    def __init__(self, *args, near_parts=1, **kwargs):
        super().__init__(*args, **kwargs)
        self.near_parts, self._per_accumulation_step = near_parts, 1

    @classmethod
    def settings(cls, cfg, num_classes):
        parts = near_parts(cfg, num_classes)
        return super().settings(cfg, num_classes) | {
            "near_parts": parts, "num_neighbors": num_neighbors(cfg, num_classes, parts, least=20)}

    def _selections_of(self, labels, accumulation_steps, micro_batches):
        """No Selection yet: `loss` chooses them from the features. Before there is a graph, those of SampledHead."""
        if self.graph is None:
            return super()._selections_of(labels, accumulation_steps, micro_batches)
        micro_batches = micro_batches or accumulation_steps
        self._per_accumulation_step = micro_batches // accumulation_steps
        counts, _ = self.labels.of_copy(labels)
        self._first = sum(counts[: self.world.shards.rank]) // micro_batches  # example of this rank in a micro-batch
        return [None] * micro_batches

    def loss(self, features, labels, global_batch, last=True):
        if self.selection is None:
            assert last, "a selection is for one micro-batch"
            self.selection = self.selections[self._current] = self._choose(features.detach(), labels)
        return super().loss(features, labels, global_batch, last)

    def _choose(self, features, labels):
        """The Selection of a micro-batch, by the features (G, D) and labels (G,) of this replica. Collective."""
        replicas = self.world.replicas
        counts = counts_of(labels, replicas)
        first = sum(counts[: replicas.rank])
        own = slice(first, first + counts[replicas.rank])
        features, labels = replicas.all_gather(features, counts), replicas.all_gather(labels, counts)
        step, number = divmod(self._current, self._per_accumulation_step)
        step = self.step + step + (number << 32)
        part_of = similar_parts(features, self.near_parts)
        targets, candidates, scores = self._scores(features, labels, part_of, step)
        chosen = self._near_and_drawn(targets, candidates, scores, step)
        targets, chosen = self._of_first_replica(targets, chosen)
        return self._joined(targets, chosen, part_of[own])

    def _scores(self, features, labels, part_of, step):
        """Target classes (T,) of this shard, local ids, ascending; the candidates (P, K) of each part that are none,
        ascending, filled up with _NO_CLASS; and their scores (P, K), the sums of their probabilities over the examples
        of the part. Collective.

        features, labels, part_of  (G, D), (G,), (G,)  of all replicas
        """
        examples, logits, parts, classes, which = self._pairs(features, labels, part_of)
        lse = torch.logaddexp(_logsumexp_by(examples, logits, len(labels)),
                              self._far(features, examples, classes, which, step))
        probability = (logits - group_logsumexp(lse, self.world.shards)[examples]).exp_()
        scores = probability.new_zeros(len(classes)).index_add_(0, which, probability)
        targets = torch.unique(labels[self.shard.owns(labels)] - self.shard.first)
        others = (~_places_in(targets, classes)[1]).nonzero().squeeze(1)
        candidates, scores = _padded(parts[others], self.near_parts, (classes[others], _NO_CLASS), (scores[others], 0))
        return targets, candidates, scores

    def _pairs(self, features, labels, part_of):
        """Pairs of an example and a class of this shard that is its target class or a candidate of it, each once.

        returns  examples (E,); logits (E,); parts (U,) and classes (U,), local ids, of all pairs of the examples of a
                 part, ascending; and the place (E,) of each pair's part and class among them
        """
        owned = self.shard.owns(labels).nonzero().squeeze(1)
        of_near, near, _ = self.graph.lookup(labels)
        examples, ids = torch.cat([owned, of_near]), torch.cat([labels[owned] - self.shard.first, near])
        logits = self._products(features, examples, ids)
        best = _best_of_each(of_near, logits[len(owned) :], _BEST)
        of_best, further, places = self.graph.lookup(near[best] + self.shard.first)
        nearest = (places < _PLACES).nonzero().squeeze(1)
        examples = torch.cat([examples, of_near[best[of_best[nearest]]]])
        ids = torch.cat([ids, further[nearest]])
        # Sorting is what costs here, so one sort serves the pairs and their classes. Of equal pairs, which are next to
        # each other, the first remains: its logit may be known already.
        num_rows = len(self.weight)
        pairs, order = ((part_of[examples] * num_rows + ids) * len(labels) + examples).sort(stable=True)
        order = order[F.pad(pairs.diff(), (1, 0), value=1).nonzero().squeeze(1)] if len(order) else order
        new = (order >= len(logits)).nonzero().squeeze(1)
        examples, ids = examples[order], ids[order]
        logits = F.pad(logits, (0, len(nearest)))[order]
        logits[new] = self._products(features, examples[new], ids[new])
        classes, which = torch.unique_consecutive(part_of[examples] * num_rows + ids, return_inverse=True)
        return examples, logits, classes // max(1, num_rows), classes % max(1, num_rows), which

    def _products(self, features, examples, ids):
        """Logits (E,) of some of the features (G, D), each with one row of this shard."""
        products, length = features.new_empty(2, len(ids)).unbind()
        for first in range(0, len(ids), _PAIRS):
            part = slice(first, first + _PAIRS)
            rows = self.weight.index_select(0, ids[part]).to(self.compute_dtype)
            if self.cosine:
                torch.linalg.vector_norm(rows, dim=1, out=length[part])
            torch.sum(rows.mul_(features.index_select(0, examples[part])), 1, out=products[part])
        return self.scale * (products / length.clamp_(min=1e-12) if self.cosine else products)

    def _far(self, features, examples, classes, which, step):
        """Log of the sum of exp(logit) over the rows of this shard (G,) that an example has no pair with, estimated.

        examples, classes, which  (E,), (U,), (E,)  of `_pairs`
        """
        num_rows = len(self.weight)
        if not num_rows:
            return features.new_full((len(features),), -torch.inf)
        rows, _ = self._draw(classes[:0], min(_FAR_ROWS, num_rows), self._generator(step, 1))
        logits = self.scale * features @ self._unit(self.weight[rows]).T  # (G, R)
        place, found = _places_in(rows, classes)
        paired = found[which].nonzero().squeeze(1)
        logits[examples[paired], place[which[paired]]] = -torch.inf
        return logits.logsumexp(1) + math.log(num_rows / len(rows))

    def _near_and_drawn(self, targets, candidates, scores, step):
        """[(local ids (R,), what is added to their logits (R,)), …] of each part, beside the target classes.

        targets, candidates, scores  (T,), (P, K), (P, K)  of `_scores`
        """
        num_rows = len(self.weight)
        quota = max(self.quota, min(num_rows, len(targets) + self.sampling_correction))
        room = quota - len(targets)
        one_random = self.sampling_correction and quota < num_rows  # at least one, which stands for the others
        num_near = min(int(self.near_share * room), room - one_random, candidates.shape[1])
        best = scores.topk(max(0, num_near), dim=1, sorted=False).indices
        near = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True) & (scores > 0)
        counts, generator = room - near.sum(1), self._generator(step)
        if self.sampling_correction and quota < num_rows and counts.min() >= _LEAST_FAR:
            return self._drawn_by_score(targets, candidates, near, scores, counts, generator)
        chosen = []
        for of_part, its_near, count in zip(candidates, near, counts.tolist(), strict=True):
            ids = of_part[its_near]
            drawn, sizes = self._draw(torch.cat([targets, ids]).sort().values, count, generator)
            chosen.append((torch.cat([ids, drawn]), F.pad(sizes.to(self.compute_dtype).log(), (len(ids), 0))))
        return chosen

    def _drawn_by_score(self, targets, candidates, near, scores, counts, generator):
        """What `_near_and_drawn` returns, with candidates drawn by their scores.

        near    (P, K)  mask of the near classes of each part
        counts  (P,)    classes to draw for each part
        """
        exists = candidates < _NO_CLASS
        some = exists & ~near  # candidates that can be drawn
        num_others = len(self.weight) - len(targets) - exists.sum(1, keepdim=True)  # (P, 1)
        scores, counts = (scores * some).double(), counts[:, None].double()
        equal = counts / (some.sum(1, keepdim=True) + num_others)
        share = some * (counts / 2 * scores / scores.sum(1, keepdim=True).clamp_(min=1e-300) + equal / 2).clamp_(max=1)
        # One at least is left for the others. The sum is rounded down or up to the number drawn: it must leave no more
        # to the others than there are.
        most, total = counts - num_others.clamp(max=1), share.sum(1, keepdim=True).clamp_(min=1e-300)
        share *= (most / total).clamp_(max=1)
        lacking = (counts - num_others - share.sum(1, keepdim=True)).clamp_(min=0)
        share += some * (1 - share) * (lacking / (some * (1 - share)).sum(1, keepdim=True).clamp_(min=1e-300))
        ends = share.cumsum(1) + torch.from_numpy(generator.random((len(share), 1))).to(share.device)
        hit = ends.floor() > (ends - share).floor()
        counts = torch.minimum((counts - hit.sum(1, keepdim=True)).long(), num_others)
        others, sizes = _from_strata(targets, candidates, counts, num_others, generator)
        share[near] = 1
        taken, chosen = near | hit, []
        for i, count in enumerate(counts[:, 0].tolist()):
            offset = torch.cat([-share[i, taken[i]].log(), sizes[i, :count].double().log()]).to(self.compute_dtype)
            chosen.append((torch.cat([candidates[i, taken[i]], others[i, :count]]), offset))
        return chosen

    def _of_first_replica(self, targets, chosen):
        """Target classes and [(ids, offsets), …] of the parts, as the first replica of this shard found. Collective."""
        replicas = self.world.replicas
        if replicas.size == 1:
            return targets, chosen
        lengths = torch.tensor([len(targets), *(len(ids) for ids, _ in chosen)], device=targets.device)
        lengths = replicas.all_gather(lengths[None])[0].tolist()

        def first(tensor, length):
            counts = [length] + [0] * (replicas.size - 1)
            return replicas.all_gather(tensor if replicas.rank == 0 else tensor[:0], counts)

        ids = first(torch.cat([targets, *(ids for ids, _ in chosen)]), sum(lengths)).split(lengths)
        offsets = first(torch.cat([offset for _, offset in chosen]), sum(lengths[1:])).split(lengths[1:])
        return ids[0], list(zip(ids[1:], offsets, strict=True))

    def _joined(self, targets, chosen, part_of):
        """The Selection of these classes.

        targets  (N,)                active for all parts, ascending
        chosen   [((R,), (R,)), …]   the other classes of each part, and what is added to their logits
        part_of  (G,)                the part of each example of this replica
        """
        if self.near_parts == 1:
            (ids, offset), = chosen
            active, order = torch.cat([targets, ids]).sort()
            offset = F.pad(offset, (len(targets), 0))[order]
            return Selection(active, offset if self.sampling_correction else None, first=self._first)
        parts, all_ids, row, example = [], [targets], len(targets), 0
        for i, (ids, offset) in enumerate(chosen):
            ids, order = ids.sort()
            num_examples = int((part_of == i).sum())
            parts.append(Part(slice(example, example + num_examples), slice(row, row + len(ids)),
                              offset[order] if self.sampling_correction else None))
            all_ids.append(ids)
            row, example = row + len(ids), example + num_examples
        return Selection(torch.cat(all_ids), None, tuple(parts), part_of.argsort(stable=True), self._first)


def near_parts(cfg, num_classes):
    """P of a Config; UserError where it is no power of two, or more than a micro-batch has examples."""
    if cfg.near_parts & (cfg.near_parts - 1):
        raise UserError(f"--near-parts {cfg.near_parts} is not allowed: give 1, 2, 4, 8, … or 0 for a choice by "
                        "--active-classes and --global-batch")
    batch = cfg.global_batch // cfg.micro_batches
    if cfg.near_parts > batch:
        raise UserError(f"--near-parts {cfg.near_parts} is not allowed: a micro-batch has {batch} examples, and a part "
                        "without any costs as much as another")
    if cfg.near_parts:
        return cfg.near_parts
    active, parts = budget(cfg, num_classes), 1
    if active == num_classes:
        return 1
    near = cfg.near_share * (active - min(cfg.global_batch, num_classes))
    while (near * parts < _NEAR_OF_EXAMPLE * batch and batch >= 2 * parts * _LEAST_EXAMPLES
           and (2 * parts <= _FEW_PARTS or 2 * parts * active <= _FEW_ROWS)):
        parts *= 2
    return parts


def _logsumexp_by(index, values, size):
    """Log-sum-exp (size,) of the values (E,) with each index (E,); -inf where there are none."""
    top = values.new_full((size,), -torch.inf).scatter_reduce_(0, index, values, "amax")
    total = values.new_zeros(size).index_add_(0, index, (values - top[index]).exp_())
    return total.log_() + top


def _best_of_each(index, values, count):
    """Positions of the `count` highest of the values (E,) with each index (E,), which ascends."""
    if not len(index):
        return index
    (table,) = _padded(index, int(index[-1]) + 1, (values, -torch.inf))
    counts = index.bincount()
    best = table.topk(min(count, table.shape[1]), dim=1).indices
    return ((counts.cumsum(0) - counts)[:, None] + best)[best < counts[:, None]]


def _padded(index, size, *columns):
    """Of each (values (E,), fill): a table (size, K) with the values of each index, which ascends, in a row, in their
    order, filled up to the longest row."""
    counts = index.bincount(minlength=size)
    place = torch.arange(len(index), device=index.device) - (counts.cumsum(0) - counts)[index]
    tables = [values.new_full((size, int(counts.max())), fill) for values, fill in columns]
    for table, (values, _) in zip(tables, columns, strict=True):
        table[index, place] = values
    return tables


def _from_strata(targets, candidates, counts, num_others, generator):
    """As SampledHead._draw, for P parts at once: local ids (P, R), ascending, and the sizes of their strata (P, R).

    targets, candidates  (T,), (P, K)  the classes that are not drawn, as in `ScoredKnnHead._scores`
    counts, num_others   (P, 1)        classes to draw; beyond the count of a part, a row means nothing. And those to
                                       draw from
    """
    edges = torch.arange(int(counts.max()) + 1, device=counts.device) * num_others // counts.clamp(min=1)
    sizes = edges.diff()
    uniform = torch.from_numpy(generator.random(tuple(sizes.shape))).to(sizes.device)
    index = edges[:, :-1] + (uniform * sizes).long()  # among the others
    index = skip(candidates - torch.searchsorted(targets, candidates), index)  # among all that are no targets
    return skip(targets, index), sizes


def _places_in(ids, wanted):
    """Where each of the wanted (N,) would stand among ids (E,) that ascend, and whether it does: (N,), (N,)."""
    places = torch.searchsorted(ids, wanted)
    return places, F.pad(ids, (0, 1), value=-1)[places] == wanted
