"""Recall of an index against exact search, on a sample of its own vectors.

A query is a vector of the index, and is left out of its own result. recall@k is the share of the k exact nearest other
vectors that the index finds among its first k. A vector that scores as high as the k-th nearest is as good. (That is
the measure of an index. The recall@k of retrieval, train/retrieval.py, asks for one relevant image.)
"""

import numpy as np
import torch

from xc.run import watchdog
from xc.use.index_types import search, search_settings, set_search
from xc.use.vectors import sample_of, shard_of, take

RECALLS = (1, 10)
_TUNED_BY, _MEASURED_BY = 200, 800  # queries
_TOLERANCE = 1e-5  # of equal scores, which float32 rounds differently
_LEAST_GAIN = 5e-3  # of recall, for twice the time


def measured(index, vectors, target, seed, world):
    """Chooses the search setting of an index for a recall@10, and measures the recall. Collective.

    index    on rank 0; None on the others
    target   recall@10 that the setting is doubled for, until more brings nothing
    returns  {recall_at_1, recall_at_10, recall_queries, search: {name: value}}; the same on every rank. Recalls are
             None where there is one vector
    """
    k = min(max(RECALLS), vectors.count - 1)
    if not k:
        return {**{f"recall_at_{at}": None for at in RECALLS}, "recall_queries": 0, "search": {}}
    rows = sample_of(vectors.count, _TUNED_BY + _MEASURED_BY, seed)
    exact = Exact(vectors, rows, k, world)
    result = None
    with world.raise_on_all_ranks():
        if world.rank == 0:
            order = np.random.default_rng(seed).permutation(len(rows))
            tuned, measured_by = (order[:_TUNED_BY], order[_TUNED_BY:]) if len(rows) > _TUNED_BY else (order, order)
            setting = _tuned(index, exact, tuned, target)
            recalls = exact.recalls_of(index, measured_by)
            result = {f"recall_at_{at}": recalls[at] for at in RECALLS} | {"recall_queries": len(measured_by),
                                                                          "search": setting}
    return world.all_ranks.all_gather_object(result)[0]


def _tuned(index, exact, queries, target):
    """Set the search setting of an index; returns {name: value}, {} where it has none."""
    name, values = search_settings(index)
    best, chosen = -1.0, None
    for value in values:
        watchdog.heartbeat("choosing the search setting")
        set_search(index, name, value)
        found = exact.recalls_of(index, queries)[max(RECALLS)]
        if found < best + _LEAST_GAIN and chosen is not None and best > 0:
            break
        best, chosen = found, value
        if found >= target:
            break
    if chosen is not None:
        set_search(index, name, chosen)
    return {name: chosen} if name else {}


class Exact:
    """The exact nearest vectors of some rows among all others. Every rank searches its own range, in blocks.

    rows     (Q,)    the queries
    scores   (Q, k)  best first
    found    (Q, k)  rows
    """

    def __init__(self, vectors, rows, k, world):
        """Collective. UserError where a file is damaged."""
        self._vectors, self._rows, self._k = vectors, rows, k
        with world.raise_on_all_ranks():
            self._queries = take(vectors, rows)
        shard, group = shard_of(vectors, world), world.all_ranks
        queries, own = torch.from_numpy(self._queries), torch.from_numpy(rows)
        scores = torch.full((len(rows), k), -torch.inf)
        found = torch.full((len(rows), k), -1)
        with world.raise_on_all_ranks():
            for first, block in vectors.blocks(shard):
                watchdog.heartbeat("exact search")
                products = queries @ torch.from_numpy(block).T
                here = ((own >= first) & (own < first + len(block))).nonzero()[:, 0]
                products[here, own[here] - first] = -torch.inf
                top = products.topk(min(k, len(block)))
                scores, found = _best(torch.cat([scores, top.values], 1), torch.cat([found, top.indices + first], 1), k)
        scores, found = (group.all_gather(one[None].contiguous()).transpose(0, 1).flatten(1)
                         for one in (scores, found))
        self.scores, self.found = (one.numpy() for one in _best(scores, found, k))

    def recalls_of(self, index, queries):
        """{k: recall@k} of an index for some of the queries, by their places (q,)."""
        rows, vectors = self._rows[queries], self._queries[queries]
        _, found = search(index, vectors, self._k + 1)
        others = found != rows[:, None]
        others[others.all(1), -1] = False  # the query itself was not found
        found = found[others].reshape(len(rows), -1)
        scores = self._exact_scores(found, vectors)
        hits = {k: scores[:, : min(k, self._k)] >= self._floor(queries, k) for k in RECALLS}
        return {k: float(of_k.mean()) for k, of_k in hits.items()}

    def _floor(self, queries, k):
        """The exact score of the k-th nearest vector, less what rounding may take (q, 1)."""
        kth = self.scores[queries][:, min(k, self._k) - 1, None]
        return kth - _TOLERANCE * np.maximum(1, np.abs(kth))

    def _exact_scores(self, found, queries):
        """Inner products (q, k) of queries (q, D) and the rows that were found for them; -inf where row is -1."""
        rows, places = np.unique(np.maximum(found, 0), return_inverse=True)
        vectors = take(self._vectors, rows)[places.reshape(found.shape)]
        return np.where(found < 0, -np.inf, np.einsum("qd,qkd->qk", queries, vectors))


def _best(scores, rows, k):
    top = scores.topk(k)
    return top.values, rows.gather(1, top.indices)
