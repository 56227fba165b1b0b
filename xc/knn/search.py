"""Search of the K nearest rows of all shards, by cosine: blocks of queries travel round the ring of the shard group.

While a rank searches its own rows for one block, the next block is in transit. The K best results of a block so far
follow it one hop behind and are joined with the results of each hop. Exact search is one GEMM against all rows, then
float64 cosines of every candidate for the K best; so neither W nor the blocking changes the order, and ties go to the
lower class id. Approximate search keeps the rows by cell: the rows of a cell are searched for in the P cells nearest to
it, by a GEMM as well.

Further dimension letters: Q queries of a block, N cells, P cells searched for a row.
"""

import torch

from xc.knn.graph import CHUNK, blocks, offsets_of
from xc.run import watchdog

_BLOCK_BYTES = 128 * 2**20  # of the queries of a block
_MARGIN = 8  # candidates beyond K that a GEMM hands to the float64 ranking; one of them is the row itself
_LAST_ID = 2**32 - 1


class RingSearch:
    """This rank's unit rows to search in; sorted by cell where the graph is approximate.

    The K best results of a block are kept as keys (see the end of this file).

    rows  (S, D)  float32
    ids   (S,)    global ids
    """

    def __init__(self, weight, shard, indexed, num_neighbors, group, graph=None):
        self.shard, self.group, self.graph, self.num_neighbors = shard, group, graph, num_neighbors
        self.cells, self.centroids, self.probes = indexed.cells, indexed.centroids, indexed.probes
        self.approximate, self.near = self.cells is not None, None
        self.ids = torch.arange(shard.first, shard.last, device=weight.device)
        if self.approximate:
            order = self.cells.argsort(stable=True)
            self.ids, self.position = self.ids[order], order.argsort()
            self.bounds = offsets_of(self.cells.bincount(minlength=len(self.centroids))).tolist()
        self.rows = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        for block in blocks(*weight.shape):
            self.rows[block] = unit(weight.index_select(0, self.ids[block] - shard.first))
        self.sixteen_bits = weight.device.type == "cuda"
        # The largest error of a cosine by GEMM: sums of D products, rounded to 24 or 11 bits.
        self.slack = 2e-3 if self.sixteen_bits else (weight.shape[1] + 2) * 2.0**-24

    def search(self, queries, exact=False):
        """Yield (keys (Q, K), global ids (Q,)) of each block of the queries, which are local ids (N,). Collective."""
        group, K = self.group, self.num_neighbors
        find = self._in_all if exact or not self.approximate else self._in_cells
        counts = group.all_gather(torch.tensor([len(queries)], device=queries.device)).tolist()
        rounds = -(-max(counts) * 4 * self.rows.shape[1] // _BLOCK_BYTES)
        size = -(-max(counts) // max(1, rounds))
        for first in range(0, max(counts), max(1, size)):
            sizes = [max(0, min(size, count - first)) for count in counts]
            mine = queries[first : first + size]
            rows = self.rows.index_select(0, self.position[mine] if self.approximate else mine)
            ids = mine + self.shard.first
            tags = torch.stack([ids, self.cells[mine].long() if self.approximate else ids], 1)
            best = torch.full((len(mine), K), EMPTY, device=rows.device)
            best_so_far = lambda best=best: best  # noqa: E731  # waits for it; each hop calls this once
            for hop in range(group.size):
                watchdog.heartbeat("search of neighbours")
                coming = sizes[(group.rank - hop - 1) % group.size]
                if hop + 1 < group.size:
                    next_rows, next_tags = group.shift_async(rows, coming), group.shift_async(tags, coming)
                best = find(rows, tags, best_so_far) if len(rows) and len(self.rows) else best_so_far()
                best_so_far = group.shift_async(best, coming)
                if hop + 1 < group.size:
                    rows, tags = next_rows(), next_tags()
            yield best_so_far(), ids

    def _in_all(self, queries, tags, best_so_far):
        """The K best keys among all rows of this rank and `best_so_far`, by float64 cosine and then by id."""
        K, count = self.num_neighbors, min(self.num_neighbors + _MARGIN, len(self.rows))
        scores, found = top_products(queries, self.rows, count, self.sixteen_bits)
        best = best_so_far()
        floor = _scores(best[:, -1:])
        if count > K:  # since one of the first K + 1 may be the row itself
            floor = torch.maximum(floor, scores[:, K : K + 1])
        keys = self._keys_above(floor, scores, found, queries, tags)
        merged = torch.cat([best, keys], 1).topk(K).values
        if count == len(self.rows):
            return merged
        # Rows that the GEMM left out may still be among the best, for instance where many rows are alike.
        unsure = (scores[:, -1] + self.slack >= _scores(merged[:, -1])).nonzero().squeeze(1)
        for part in unsure.split(max(1, 2**22 // len(self.rows))):
            scores = queries[part] @ self.rows.T
            found = torch.arange(len(self.rows), device=scores.device).expand_as(scores)
            keys = self._keys_above(_scores(merged[part, -1:]), scores, found, queries[part], tags[part])
            merged[part] = torch.cat([best[part], keys], 1).topk(K).values
        return merged

    def _keys_above(self, floor, scores, found, queries, tags):
        """Keys of the candidates that score `floor` or more within rounding; EMPTY for others and for the row
        itself."""
        keys = torch.full_like(found, EMPTY)
        ids = self.ids[found]
        query, column = ((scores >= floor - 2 * self.slack) & (ids != tags[:, :1])).nonzero(as_tuple=True)
        for part in torch.arange(len(query), device=query.device).split(max(1, CHUNK // queries.shape[1])):
            q, c = query[part], column[part]
            product = queries.index_select(0, q).double().mul_(self.rows.index_select(0, found[q, c]))
            keys[q, c] = _keys(_sum(product).float(), ids[q, c])
        return keys

    def _in_cells(self, queries, tags, best_so_far):
        """The K best keys in the P cells nearest to each query's cell, among its former neighbours, and in
        `best_so_far`."""
        K = self.num_neighbors
        order = tags[:, 1].argsort(stable=True)
        cells, sizes = (t.tolist() for t in tags[order, 1].unique_consecutive(return_counts=True))
        near = self._nearest_cells()
        scores = queries.new_full((len(queries), K + 1), -torch.inf)
        ids = torch.zeros_like(scores, dtype=torch.int64)
        first = 0
        for chosen, part in zip(near[cells].tolist(), queries[order].split(sizes), strict=True):
            ranges = [slice(*self.bounds[c : c + 2]) for c in chosen]
            rows = torch.cat([self.rows[r] for r in ranges])
            top, at = top_products(part, rows, min(K + 1, rows.shape[0]))
            target = slice(first, first + part.shape[0]), slice(0, top.shape[1])
            scores[target], ids[target] = top, torch.cat([self.ids[r] for r in ranges])[at]
            first = target[0].stop
        scores[ids == tags[order, :1]] = -torch.inf
        keys = torch.full_like(ids, EMPTY)
        keys[order] = _keys(scores, torch.where(scores == -torch.inf, _LAST_ID, ids))
        keys = [best_so_far(), keys]
        if self.graph is not None:
            query, known, place = self.graph.lookup(tags[:, 0])
            outside = (near[tags[query, 1]] != self.cells[known, None]).all(1)  # former neighbours in other cells
            query, known, place = query[outside], known[outside], place[outside]
            former = torch.full_like(keys[0], EMPTY)
            for part in torch.arange(len(query), device=query.device).split(max(1, CHUNK // queries.shape[1])):
                q, at = query[part], self.position[known[part]]
                cosines = (queries.index_select(0, q) * self.rows.index_select(0, at)).sum(1)
                former[q, place[part]] = _keys(cosines, self.ids[at])
            keys.append(former)
        return torch.cat(keys, 1).topk(K).values

    def _nearest_cells(self):
        """The P cells nearest to every cell (N, P); the first is the cell itself."""
        if self.near is None or self.near.shape[1] != self.probes:
            self.near = top_products(self.centroids, self.centroids, self.probes)[1]
        return self.near


def top_products(queries, rows, count, sixteen_bits=False):
    """The rows with the largest dot products with each query.

    queries, rows  (Q, D), (N, D)
    returns        scores (Q, count) float32, best first; indices (Q, count)
    """
    num_queries, num_rows = queries.shape[0], rows.shape[0]
    if queries.device.type == "cpu" and num_queries >= 1024 and count:  # torch is faster for fewer queries
        import faiss  # after torch: both bring an OpenMP

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
    """The cell (N,) int32 of every row (N, D)."""
    return top_products(rows, centroids, 1)[1][:, 0].int()


def unit(rows):
    """Rows (N, D) as float32 of length 1, the same bits for any blocking."""
    rows = rows.float()
    return rows / _sum(rows.double().square_()).sqrt().clamp_(min=1e-12).float()[:, None]


def _sum(products):
    """Sums (N,) of the rows (N, D), in an order that depends on D alone."""
    while (width := products.shape[1]) > 1:
        half = width // 2
        folded = products[:, :half] + products[:, half : 2 * half]
        products = torch.cat([folded, products[:, 2 * half :]], 1) if width % 2 else folded
    return products[:, 0]


# A key is a float32 score and a global id in one int64. The larger key has the larger score or, at equal scores, the
# lower id.


def _keys(scores, ids):
    bits = (scores + 0.0).view(torch.int32)  # turns -0 into 0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (_LAST_ID - ids)


def _scores(keys):
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def ids_of(keys):
    return _LAST_ID - (keys & _LAST_ID)


EMPTY = _keys(torch.tensor(-torch.inf), torch.tensor(_LAST_ID)).item()
