"""Exact search for the K nearest rows in all shards, by cosine. Blocks of queries go round the ring of the shard group.

A rank searches its own rows for one block while it receives the next one. The K best results of a block so far follow
it one hop behind, and each rank merges its own results into them (Song et al. 2020 build the graph by such a ring).

A GEMM with all rows gives candidates; float64 cosines of them give the K best. So the order depends neither on W nor on
the blocks, and among equal rows the lower class id comes first.

Further dimension letters: Q queries of a block.
"""

import torch

from xc.knn.keys import EMPTY, ids_of, keys_of, scores_of
from xc.knn.products import directions, sum_of, top_products, unit
from xc.run import watchdog

_BLOCK_BYTES = 128 * 2**20  # most bytes of the queries of a block
_MARGIN = 8  # candidates beyond K that a GEMM passes on to float64; one of them is the query itself
_CHUNK = 2**18  # numbers of a temporary, so that it stays in the cache
_NUMBERS = 2**21  # in the rows that are compared with few


class ExactSearch:
    """The unit rows of this rank in float32, and the search in those of all ranks."""

    def __init__(self, weight, shard, num_neighbors, group):
        self.shard, self.group, self.num_neighbors = shard, group, num_neighbors
        self.rows = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for part in torch.arange(len(weight), device=weight.device).split(max(1, _CHUNK // weight.shape[1])):
            self.rows[part] = unit(weight[part])
        self.sixteen_bits = weight.device.type == "cuda"
        # The largest error of a cosine by GEMM: a sum of D products, rounded to 24 or 11 bits.
        self.slack = 2e-3 if self.sixteen_bits else (weight.shape[1] + 2) * 2.0**-24

    def search(self):
        """Yield (local ids (n,), global ids (n, K) of their neighbours, nearest first), in the order of rows.

        Collective.
        """
        group, K, device = self.group, self.num_neighbors, self.rows.device
        counts = group.all_gather(torch.tensor([len(self.rows)], device=device)).tolist()
        num_blocks = -(-max(counts) * 4 * self.rows.shape[1] // _BLOCK_BYTES)
        size = -(-max(counts) // max(1, num_blocks))
        for first in range(0, max(counts), max(1, size)):
            sizes = [max(0, min(size, count - first)) for count in counts]
            rows = self.rows[first : first + size]
            ids = own = torch.arange(first, first + len(rows), device=device) + self.shard.first
            best = torch.full((len(rows), K), EMPTY, device=device)
            best_so_far = lambda best=best: best  # noqa: E731  # waits for the results; each hop calls it once
            for hop in range(group.size):
                watchdog.progress("search of neighbours", (first + size * hop / group.size) / max(counts))
                next_size = sizes[(group.rank - hop - 1) % group.size]
                if hop + 1 < group.size:
                    next_rows, next_ids = group.shift_async(rows, next_size), group.shift_async(ids, next_size)
                best = self._merge(rows, ids, best_so_far) if len(rows) and len(self.rows) else best_so_far()
                best_so_far = group.shift_async(best, next_size)
                if hop + 1 < group.size:
                    rows, ids = next_rows(), next_ids()
            yield own - self.shard.first, ids_of(best_so_far())

    def _merge(self, queries, query_ids, best_so_far):
        """The K best keys (Q, K) among all rows of this rank and `best_so_far`, by float64 cosine, then by id.

        queries, query_ids  (Q, D), (Q,)
        best_so_far         () -> keys (Q, K)
        """
        K, count = self.num_neighbors, min(self.num_neighbors + _MARGIN, len(self.rows))
        scores, found = top_products(queries, self.rows, count, self.sixteen_bits)
        best = best_so_far()
        floor = scores_of(best[:, -1:])
        if count > K:  # K + 1, since one of the candidates may be the query itself
            floor = torch.maximum(floor, scores[:, K : K + 1])
        keys = self._keys_above(floor, scores, found, queries, query_ids)
        merged = torch.cat([best, keys], 1).topk(K).values
        if count == len(self.rows):
            return merged
        # Rows that the GEMM left out may be among the best, for instance if many rows are equal.
        unsure = (scores[:, -1] + self.slack >= scores_of(merged[:, -1])).nonzero().squeeze(1)
        for part in unsure.split(max(1, 2**22 // len(self.rows))):
            scores = queries[part] @ self.rows.T
            found = torch.arange(len(self.rows), device=scores.device).expand_as(scores)
            keys = self._keys_above(scores_of(merged[part, -1:]), scores, found, queries[part], query_ids[part])
            merged[part] = torch.cat([best[part], keys], 1).topk(K).values
        return merged

    def _keys_above(self, floor, scores, found, queries, query_ids):
        """Keys of the candidates that score at least `floor` within rounding. EMPTY for others and the query itself."""
        keys = torch.full_like(found, EMPTY)
        ids = found + self.shard.first
        query, column = ((scores >= floor - 2 * self.slack) & (ids != query_ids[:, None])).nonzero(as_tuple=True)
        for part in torch.arange(len(query), device=query.device).split(max(1, _CHUNK // queries.shape[1])):
            q, c = query[part], column[part]
            product = queries.index_select(0, q).double().mul_(self.rows.index_select(0, found[q, c]))
            keys[q, c] = keys_of(sum_of(product).float(), ids[q, c])
        return keys


def neighbors_of_few(weight, shard, classes, num_neighbors, group):
    """The exact K nearest classes (N, K) of a few classes (N,), global ids, the same on every rank. Collective.

    weight  (S, D)  rows of this shard; no copy of them is made
    """
    own = shard.owns(classes)
    queries = torch.zeros(len(classes), weight.shape[1], device=weight.device)
    queries[own] = unit(weight.index_select(0, classes[own] - shard.first))
    group.all_reduce(queries)
    keys = torch.full((len(classes), num_neighbors), EMPTY, device=weight.device)
    size = max(1, _NUMBERS // weight.shape[1])
    for first in range(0, len(weight), size):
        watchdog.heartbeat("exact search for sampled rows")
        rows = directions(weight[first : first + size])
        scores, found = top_products(queries, rows, min(num_neighbors + 1, len(rows)))
        ids = found + (shard.first + first)
        some = torch.where(ids == classes[:, None], EMPTY, keys_of(scores, ids))
        keys = torch.cat([keys, some], 1).topk(num_neighbors).values
    keys = group.all_gather(keys[None]).transpose(0, 1).flatten(1)
    return ids_of(keys.topk(num_neighbors).values)
