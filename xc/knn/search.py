"""Search for the K nearest rows in all shards, by cosine. Blocks of queries go round the ring of the shard group.

A rank searches its own rows for one block while it receives the next one. The K best results of a block so far follow
it one hop behind, and each rank merges its own results into them.

Exact search is one GEMM with all rows, then float64 cosines of all candidates for the K best. So the order depends
neither on W nor on the blocks, and among equal rows the lower class id comes first. Approximate search sorts the rows
by cell. It searches for the queries of a cell in the P cells nearest to that cell, with a GEMM, too.

Further dimension letters: Q queries of a block, N cells, P cells searched for a row.
"""

import torch

from xc.knn.graph import CHUNK, blocks, offsets_of
from xc.run import watchdog

_BLOCK_BYTES = 128 * 2**20  # most bytes of the queries of a block
_MARGIN = 8  # candidates beyond K that a GEMM passes on to float64; one of them is the query itself
_LAST_ID = 2**32 - 1


class RingSearch:
    """The rows of this rank to search in, and the search in the rows of all ranks.

    Results are keys: a cosine and a class id in one int64 (see the end of this file).

    rows         (S, D)  float32 unit rows; sorted by cell in an approximate graph
    ids          (S,)    their global ids
    positions    (S,)    where each row of the shard is in `rows`; approximate graphs only
    cell_bounds  [N + 1] cell c has rows[cell_bounds[c] : cell_bounds[c + 1]]; approximate graphs only
    probes       P; may be changed between two searches
    """

    def __init__(self, weight, shard, indexed, num_neighbors, group, graph=None):
        self.shard, self.group, self.graph, self.num_neighbors = shard, group, graph, num_neighbors
        self.cells, self.centroids, self.probes = indexed.cells, indexed.centroids, indexed.probes
        self.approximate, self._nearest = self.cells is not None, None
        self.ids = torch.arange(shard.first, shard.last, device=weight.device)
        if self.approximate:
            order = self.cells.argsort(stable=True)
            self.ids, self.positions = self.ids[order], order.argsort()
            self.cell_bounds = offsets_of(self.cells.bincount(minlength=len(self.centroids))).tolist()
        self.rows = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for block in blocks(*weight.shape):
            self.rows[block] = unit(weight.index_select(0, self.ids[block] - shard.first))
        self.sixteen_bits = weight.device.type == "cuda"
        # The largest error of a cosine by GEMM: a sum of D products, rounded to 24 or 11 bits.
        self.slack = 2e-3 if self.sixteen_bits else (weight.shape[1] + 2) * 2.0**-24

    def search(self, queries, exact=False):
        """Yield (keys (Q, K), global ids (Q,)) for each block of queries. Collective.

        queries  local ids of rows of this shard
        exact    search all rows even in an approximate graph
        """
        group, K = self.group, self.num_neighbors
        find = self._search_all_rows if exact or not self.approximate else self._search_cells
        counts = group.all_gather(torch.tensor([len(queries)], device=queries.device)).tolist()
        num_blocks = -(-max(counts) * 4 * self.rows.shape[1] // _BLOCK_BYTES)
        size = -(-max(counts) // max(1, num_blocks))
        for first in range(0, max(counts), max(1, size)):
            sizes = [max(0, min(size, count - first)) for count in counts]
            mine = queries[first : first + size]
            rows = self.rows.index_select(0, self.positions[mine] if self.approximate else mine)
            ids = mine + self.shard.first
            tags = torch.stack([ids, self.cells[mine].long() if self.approximate else ids], 1)
            best = torch.full((len(mine), K), EMPTY, device=rows.device)
            best_so_far = lambda best=best: best  # noqa: E731  # waits for the results; each hop calls it once
            for hop in range(group.size):
                watchdog.heartbeat("search of neighbours")
                next_size = sizes[(group.rank - hop - 1) % group.size]
                if hop + 1 < group.size:
                    next_rows, next_tags = group.shift_async(rows, next_size), group.shift_async(tags, next_size)
                best = find(rows, tags, best_so_far) if len(rows) and len(self.rows) else best_so_far()
                best_so_far = group.shift_async(best, next_size)
                if hop + 1 < group.size:
                    rows, tags = next_rows(), next_tags()
            yield best_so_far(), ids

    def _search_all_rows(self, queries, tags, best_so_far):
        """The K best keys (Q, K) among all rows of this rank and `best_so_far`, by float64 cosine, then by id.

        queries      (Q, D)
        tags         (Q, 2)  their global ids and cells
        best_so_far  () -> keys (Q, K)
        """
        K, count = self.num_neighbors, min(self.num_neighbors + _MARGIN, len(self.rows))
        scores, found = top_products(queries, self.rows, count, self.sixteen_bits)
        best = best_so_far()
        floor = _scores(best[:, -1:])
        if count > K:  # K + 1, since one of the candidates may be the query itself
            floor = torch.maximum(floor, scores[:, K : K + 1])
        keys = self._keys_above(floor, scores, found, queries, tags)
        merged = torch.cat([best, keys], 1).topk(K).values
        if count == len(self.rows):
            return merged
        # Rows that the GEMM left out may be among the best, for instance if many rows are equal.
        unsure = (scores[:, -1] + self.slack >= _scores(merged[:, -1])).nonzero().squeeze(1)
        for part in unsure.split(max(1, 2**22 // len(self.rows))):
            scores = queries[part] @ self.rows.T
            found = torch.arange(len(self.rows), device=scores.device).expand_as(scores)
            keys = self._keys_above(_scores(merged[part, -1:]), scores, found, queries[part], tags[part])
            merged[part] = torch.cat([best[part], keys], 1).topk(K).values
        return merged

    def _keys_above(self, floor, scores, found, queries, tags):
        """Keys of the candidates that score at least `floor` within rounding. EMPTY for others and the query itself."""
        keys = torch.full_like(found, EMPTY)
        ids = self.ids[found]
        query, column = ((scores >= floor - 2 * self.slack) & (ids != tags[:, :1])).nonzero(as_tuple=True)
        for part in torch.arange(len(query), device=query.device).split(max(1, CHUNK // queries.shape[1])):
            q, c = query[part], column[part]
            product = queries.index_select(0, q).double().mul_(self.rows.index_select(0, found[q, c]))
            keys[q, c] = _keys(_sum(product).float(), ids[q, c])
        return keys

    def _search_cells(self, queries, tags, best_so_far):
        """The K best keys (Q, K) of the P cells nearest to each query's cell, its former neighbours and `best_so_far`.

        The arguments are those of `_search_all_rows`.
        """
        K = self.num_neighbors
        order = tags[:, 1].argsort(stable=True)
        cells, sizes = (t.tolist() for t in tags[order, 1].unique_consecutive(return_counts=True))
        nearest = self._nearest_cells()
        scores = queries.new_full((len(queries), K + 1), -torch.inf)
        ids = torch.zeros_like(scores, dtype=torch.int64)
        first = 0
        for probed, part in zip(nearest[cells].tolist(), queries[order].split(sizes), strict=True):
            ranges = [slice(*self.cell_bounds[cell : cell + 2]) for cell in probed]
            rows = torch.cat([self.rows[r] for r in ranges])
            top, indices = top_products(part, rows, min(K + 1, rows.shape[0]))
            target = slice(first, first + part.shape[0]), slice(0, top.shape[1])
            scores[target], ids[target] = top, torch.cat([self.ids[r] for r in ranges])[indices]
            first = target[0].stop
        scores[ids == tags[order, :1]] = -torch.inf
        keys = torch.full_like(ids, EMPTY)
        keys[order] = _keys(scores, torch.where(scores == -torch.inf, _LAST_ID, ids))
        candidates = [best_so_far(), keys]
        if self.graph is not None:
            candidates.append(self._former_neighbors(queries, tags, nearest))
        return torch.cat(candidates, 1).topk(K).values

    def _former_neighbors(self, queries, tags, nearest):
        """Keys (Q, K) of the queries' neighbours in the old graph that are not in their P nearest cells."""
        query, neighbor, place = self.graph.lookup(tags[:, 0])
        outside = (nearest[tags[query, 1]] != self.cells[neighbor, None]).all(1)
        query, neighbor, place = query[outside], neighbor[outside], place[outside]
        keys = torch.full((len(queries), self.num_neighbors), EMPTY, device=queries.device)
        for part in torch.arange(len(query), device=query.device).split(max(1, CHUNK // queries.shape[1])):
            q, position = query[part], self.positions[neighbor[part]]
            cosines = (queries.index_select(0, q) * self.rows.index_select(0, position)).sum(1)
            keys[q, place[part]] = _keys(cosines, self.ids[position])
        return keys

    def _nearest_cells(self):
        """The P cells nearest to every cell (N, P). The first one is the cell itself."""
        if self._nearest is None or self._nearest.shape[1] != self.probes:
            self._nearest = top_products(self.centroids, self.centroids, self.probes)[1]
        return self._nearest


def top_products(queries, rows, count, sixteen_bits=False):
    """The `count` rows with the largest dot products with each query.

    queries, rows  (Q, D), (N, D)
    returns        scores (Q, count) float32, best first; indices (Q, count)
    """
    num_queries, num_rows = queries.shape[0], rows.shape[0]
    if queries.device.type == "cpu" and num_queries >= 1024 and count:  # torch is faster for fewer queries
        import faiss  # must come after torch: both load an OpenMP library

        faiss.omp_set_num_threads(torch.get_num_threads())
        scores, found = faiss.knn(queries.numpy(), rows.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
        return torch.from_numpy(scores), torch.from_numpy(found)
    if sixteen_bits:
        queries, rows = queries.half(), rows.half()
    tile = 65536 if queries.device.type == "cuda" else 8192
    if num_rows <= tile and num_queries <= 4096:
        top = (queries @ rows.T).topk(count)
        return top.values.float(), top.indices
    blocks = []
    for part in queries.split(4096):
        scores, found = part.new_empty(len(part), 0), torch.empty(len(part), 0, dtype=torch.int64, device=part.device)
        for first in range(0, num_rows, tile):
            top = (part @ rows[first : first + tile].T).topk(min(count, num_rows - first, tile))
            scores, found = torch.cat([scores, top.values], 1), torch.cat([found, top.indices + first], 1)
            if first:
                best = scores.topk(min(count, scores.shape[1]))
                scores, found = best.values, found.gather(1, best.indices)
        blocks.append((scores.float(), found))
    return tuple(torch.cat(column) for column in zip(*blocks, strict=True))


def cells_of(rows, centroids):
    """The cell of every row: the one with the nearest centroid. Rows (B, D), centroids (N, D); returns (B,) int32."""
    return top_products(rows, centroids, 1)[1][:, 0].int()


def unit(rows):
    """Rows (B, D) scaled to length 1, in float32. A row's bits do not depend on the other rows."""
    rows = rows.float()
    return rows / _sum(rows.double().square_()).sqrt().clamp_(min=1e-12).float()[:, None]


def _sum(products):
    """Sums (B,) of rows (B, D). The order of summation depends on D alone."""
    while (width := products.shape[1]) > 1:
        half = width // 2
        folded = products[:, :half] + products[:, half : 2 * half]
        products = torch.cat([folded, products[:, 2 * half :]], 1) if width % 2 else folded
    return products[:, 0]


# A key holds a float32 score and a global id in one int64. The larger key has the larger score or, if scores are equal,
# the lower id.


def _keys(scores, ids):
    """Keys (…) from float32 scores (…) and ids (…)."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (_LAST_ID - ids)


def _scores(keys):
    """The scores of keys, float32."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def ids_of(keys):
    """The global ids of keys, int64."""
    return _LAST_ID - (keys & _LAST_ID)


EMPTY = _keys(torch.tensor(-torch.inf), torch.tensor(_LAST_ID)).item()
