"""Unit rows, and the rows with the largest dot products with others."""

import threading

import torch

from xc.run import watchdog

_TILE = 2**20  # products at a time, so that they stay in a cache
_CUDA_TILE = 2**28
_STRIPES = 16  # of the columns of a tile: the best few are among those of the stripes' maxima
_MANY, _QUERIES = 1024, 2**14  # queries from which on faiss searches, and so many at a time
_memory = threading.local()  # ranks can be threads


def top_products(queries, rows, count, sixteen_bits=False):
    """The `count` rows with the largest dot products with each query.

    queries, rows  (Q, D), (N, D)
    returns        scores (Q, count) float32, best first; indices (Q, count)
    """
    num_queries, num_rows = len(queries), len(rows)
    if queries.device.type == "cpu" and num_queries >= _MANY and count:
        return _top_of_many(queries, rows, count)
    if sixteen_bits:
        queries, rows = queries.half(), rows.half()
    scores = queries.new_empty(num_queries, count)
    found = torch.empty(num_queries, count, dtype=torch.int64, device=queries.device)
    tile = _TILE if queries.device.type == "cpu" else _CUDA_TILE
    height = max(1, min(num_queries, max(128, tile // max(1, num_rows))))
    width = max(_STRIPES * count, tile // height)
    for top in range(0, num_queries, height):
        watchdog.heartbeat("search of neighbours")
        part, best, places = queries[top : top + height], None, None
        for left in range(0, num_rows, width):
            columns = rows[left : left + width]
            values, indices = _top(_product(part, columns), min(count, len(columns)))
            if best is None:
                best, places = values, indices
            else:
                both = torch.cat([best, values], 1).topk(count)
                best, places = both.values, torch.cat([places, indices + left], 1).gather(1, both.indices)
        scores[top : top + height], found[top : top + height] = best, places
    return scores.float(), found


def _top_of_many(queries, rows, count):
    """`top_products` by faiss, which is quicker where there are many queries."""
    import faiss  # must come after torch: both load an OpenMP library

    faiss.omp_set_num_threads(torch.get_num_threads())
    scores, found = [], []
    for part in queries.split(_QUERIES):
        watchdog.heartbeat("search of neighbours")
        top = faiss.knn(part.numpy(), rows.numpy(), count, metric=faiss.METRIC_INNER_PRODUCT)
        scores.append(torch.from_numpy(top[0]))
        found.append(torch.from_numpy(top[1]))
    return torch.cat(scores), torch.cat(found)


def _product(queries, rows):
    """queries @ rows.T in memory that stays: fresh pages take longer than the product."""
    if queries.device.type != "cpu":
        return queries @ rows.T
    size = len(queries) * len(rows)
    memory = getattr(_memory, "products", None)
    if memory is None or len(memory) < size:
        memory = _memory.products = torch.empty(max(size, _TILE))
    return torch.mm(queries, rows.T, out=memory[:size].view(len(queries), len(rows)))


def _top(products, count):
    """torch.topk of products (Q, N), by way of the maxima of columns that lie N / 16 apart."""
    num_queries, num_rows = products.shape
    width = num_rows // _STRIPES
    if count == 1:
        best = products.max(1, keepdim=True)
        return best.values, best.indices
    if width < 2 * count:
        return products.topk(count)
    striped = products[:, : width * _STRIPES].unflatten(1, (_STRIPES, width))
    columns = striped.amax(1).topk(count).indices  # (Q, count): every column with one of the best
    values = striped.gather(2, columns[:, None].expand(-1, _STRIPES, -1)).flatten(1)
    places = (columns[:, None] + width * torch.arange(_STRIPES, device=products.device)[:, None]).flatten(1)
    if rest := num_rows - width * _STRIPES:
        values = torch.cat([values, products[:, -rest:]], 1)
        tail = torch.arange(num_rows - rest, num_rows, device=products.device).expand(num_queries, -1)
        places = torch.cat([places, tail], 1)
    best = values.topk(count)
    return best.values, places.gather(1, best.indices)


def directions(rows):
    """Rows (B, D) scaled to length 1, in float32, quickly; numbers that are not finite become 0."""
    rows = torch.nan_to_num(rows.float(), 0.0, 0.0, 0.0)
    return rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_(min=1e-12))


def unit(rows):
    """Rows (B, D) scaled to length 1, in float32. A row's bits do not depend on the other rows."""
    rows = rows.float()
    return rows / sum_of(rows.double().square_()).sqrt().clamp_(min=1e-12).float()[:, None]


def sum_of(products):
    """Sums (B,) of rows (B, D). The order of summation depends on D alone."""
    while (width := products.shape[1]) > 1:
        half = width // 2
        folded = products[:, :half] + products[:, half : 2 * half]
        products = torch.cat([folded, products[:, 2 * half :]], 1) if width % 2 else folded
    return products[:, 0]
