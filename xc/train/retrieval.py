"""Retrieval metrics of images among images: recall@1, @10, @100, and mAP.

Every image is a query. It ranks all other images by score, the product of the two features as the logits use them: the
cosine for cosine logits. The images of its own class are relevant; R is their number.

    recall@k   share of the queries that have at least one relevant image among their first k, the measure of product
               search
    AP         average precision of a query: (1 / R) · Σ i / place(i), where place(i) is the place of its i-th relevant
               image among ALL other images, from 1
    mAP        mean of AP over the queries

A query without a relevant image (R = 0) has neither. It is counted as `queries_without_match`, and stays among the
images that others rank. Scores are computed in float64 and rounded to float32, so that a score does not depend on how
the work is cut. Of equal scores, relevant images come last: a network that gives all images the same features gets 0,
and the order of the images does not matter.

The features stay with the ranks that computed them. Blocks of queries go to all ranks, and each rank scores its own
images: so memory on each of W ranks is N · D / W numbers and a block of 64 MB.

Dimension letters: N images of all ranks, n of this rank, Q queries of a block, R relevant images of a query.
"""

import torch

from xc.errors import UserError
from xc.run import watchdog

RECALLS = (1, 10, 100)
_MOST_QUERIES = 1024  # of a block
_SCORES = 2**24  # most scores that a rank keeps of a block of queries, 64 MB
_TILE = 8192  # images that are scored at once
_UNITS = 2**32  # AP is summed in integers, in units of 1 / 2³²: such a sum is the same in any order
_NAMED = 3  # classes without a match that are returned


@torch.no_grad()
def features_and_labels(backbone, head, batches, world, stopped=lambda: False):
    """(features (n, D), labels (n,)) of this rank's images, for `retrieval_scores`; None where `stopped` says so.

    head     its feature_dim and directions(features), the features as the logits use them
    batches  of (images, labels), as many on every rank; a rank's may be empty
    stopped  asked before every batch, answers alike on all ranks
    """
    training = backbone.training
    backbone.eval()
    features = [torch.zeros(0, head.feature_dim, device=world.device)]
    labels = [torch.zeros(0, dtype=torch.int64, device=world.device)]
    stop = False
    for images, of_batch in batches:
        watchdog.heartbeat("evaluation")
        if stop := stopped():
            break
        if len(images):  # not every network takes an empty batch
            features.append(head.directions(backbone(images).float()))
            labels.append(of_batch)
    backbone.train(training)
    if stop:
        return None
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def retrieval_scores(features, labels, group, stopped=lambda: False, progress=lambda count: None):
    """Retrieval metrics of the images of all ranks; the same numbers at any W.

    features  (n, D)  float32, of this rank's images, as the logits use them
    labels    (n,)    int64
    progress  called with every number of queries that are done
    returns   ({recall_at_1, recall_at_10, recall_at_100, map, queries, queries_without_match, examples}, where the
              first four are None if no query has a match; up to three labels of classes without a match)
              None where `stopped` says so

    UserError where features are not finite. Collective.
    """
    with group.raise_on_all_ranks():
        if not features.isfinite().all():
            raise UserError("features of images are not finite, so there is no nearest image: take another checkpoint")
    counts = group.all_gather(torch.tensor([len(features)], device=features.device)).tolist()
    size = max(1, min(_MOST_QUERIES, _SCORES // max(1, *counts)))
    totals = _Totals()
    for owner, count in enumerate(counts):
        for start in range(0, count, size):
            watchdog.heartbeat("retrieval")
            if stopped():
                return None
            sizes = [min(size, count - start) if rank == owner else 0 for rank in range(group.size)]
            mine = slice(start, start + sizes[group.rank])
            queries = group.all_gather(features[mine], sizes)
            query_labels = group.all_gather(labels[mine], sizes)
            images = _Scored(queries, query_labels, features, labels, start if group.rank == owner else None)
            totals.add(*images.before_relevant(group), query_labels)
            progress(len(queries))
    return totals.scores(), totals.unmatched


class _Scored:
    """The scores of a block of queries against the images of this rank.

    scores    (Q, n)  float32
    relevant  yields (first image, (Q, t) bool) by tiles
    """

    def __init__(self, queries, query_labels, features, labels, own):
        """own: place of the first query among the images of this rank; None: the queries are another rank's"""
        self._labels, self._query_labels, self._own = labels, query_labels, own
        self.scores = queries.new_empty(len(queries), len(features))
        queries = queries.double()
        for tile in self._tiles():
            self.scores[:, tile] = (queries @ features[tile].double().T).float()

    def _tiles(self):
        return (slice(first, first + _TILE) for first in range(0, len(self._labels), _TILE))

    def _kinds(self, tile):
        """(Q, t) bool: images of the query's own class, and of other classes. The query itself is neither."""
        same = self._query_labels[:, None] == self._labels[None, tile]
        others = ~same
        if self._own is not None:
            places = torch.arange(self._own, self._own + len(same), device=same.device) - tile.start
            here = ((places >= 0) & (places < same.shape[1])).nonzero()[:, 0]
            same[here, places[here]] = False
        return same, others

    def before_relevant(self, group):
        """For each query R (Q,), and for its relevant images, worst first, the number of images of other classes
        that come before each (Q, most R), int64; beyond R it means nothing. Collective."""
        num = len(self._query_labels)
        found = [(same.nonzero()[:, 0], self.scores[:, tile][same])
                 for tile in self._tiles() for same in [self._kinds(tile)[0]]]
        empty = self._query_labels.new_empty(0), self.scores.new_empty(0)
        rows, values = (torch.cat(parts) for parts in zip(empty, *found, strict=True))
        sizes = group.all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        rows, values = group.all_gather(rows, sizes), group.all_gather(values, sizes)
        relevant = rows.bincount(minlength=num)
        values, order = values.sort()
        rows, order = rows[order].sort(stable=True)
        places = torch.arange(len(rows), device=rows.device) - (relevant.cumsum(0) - relevant)[rows]
        table = self.scores.new_full((num, max(1, int(relevant.max()))), torch.inf)  # ascending in each row
        table[rows, places] = values[order]
        # An image of another class with a score above m of the relevant ones, or equal to them, is before those m.
        beaten = torch.zeros(num, table.shape[1] + 1, dtype=torch.int64, device=table.device)
        for tile in self._tiles():
            above = torch.searchsorted(table, self.scores[:, tile].contiguous(), right=True)
            query, image = (self._kinds(tile)[1] & (above > 0)).nonzero(as_tuple=True)
            cells = query * beaten.shape[1] + above[query, image]
            beaten.view(-1).index_add_(0, cells, torch.ones_like(cells))
        group.all_reduce(beaten)
        return relevant, beaten.flip(1).cumsum(1).flip(1)[:, 1:]


class _Totals:
    """Sums over queries, in integers. Every rank adds the same."""

    def __init__(self):
        self._hits, self._precision, self._queries, self._alone = [0] * len(RECALLS), 0, 0, 0
        self.unmatched = []

    def add(self, relevant, before, labels):
        """relevant, before: of `_Scored.before_relevant`; labels (Q,) of the queries"""
        matched = relevant > 0
        numbers = relevant[:, None] - torch.arange(before.shape[1], device=before.device)  # i of each relevant image
        places = numbers + before
        precision = torch.where(numbers > 0, numbers.double() / places.clamp(min=1), 0.0).sum(1)
        average = precision[matched] / relevant[matched]
        first = places.gather(1, (relevant[:, None] - 1).clamp(min=0))[:, 0][matched]
        self._hits = [hits + int((first <= k).sum()) for hits, k in zip(self._hits, RECALLS, strict=True)]
        self._precision += int((average * _UNITS).round().long().sum())
        self._queries += int(matched.sum())
        self._alone += int((~matched).sum())
        self.unmatched += labels[~matched][: _NAMED - len(self.unmatched)].tolist()

    def scores(self):
        def share(sum_of):
            return sum_of / self._queries if self._queries else None

        recalls = {f"recall_at_{k}": share(hits) for k, hits in zip(RECALLS, self._hits, strict=True)}
        return {**recalls, "map": share(self._precision / _UNITS), "queries": self._queries,
                "queries_without_match": self._alone, "examples": self._queries + self._alone}
