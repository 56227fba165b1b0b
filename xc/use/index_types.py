"""The kinds of an index: what --type means to faiss, what it takes, and the setting that trades time for recall.

Scores are inner products. Of vectors of length 1, as cosine logits have them, that is the cosine.
"""

import math
import os
import re

import numpy as np
import torch  # noqa: F401

# isort: split
import faiss  # after torch: both load an OpenMP library

from xc.errors import UserError

TYPES = ("flat", "ivf", "hnsw", "ivfpq")
_TRAINED_BY = 64  # vectors of the sample for each cell
_LEAST_SAMPLE = 2**16  # where the type learns more than cells
_LEAST_OF_A_CELL = 39  # faiss warns of fewer
_MOST_CODE_BITS = 8  # of a part of a vector
_MOST_CELLS, _MOST_LINKS = 2**24, 512
_GRAPH_BYTES = 300  # of an element of HNSW32, beside its vector


def factory_of(kind, count, width):
    """The factory string of faiss for --type.

    ivf    N vectors in about 2 √N cells, whole
    ivfpq  the same, each vector as codes of 8 bits for 2 numbers; of fewer bits where the vectors are few
    hnsw   a graph of 32 links
    """
    cells = max(1, min(2 ** round(math.log2(2 * math.sqrt(max(1, count)))), count // _LEAST_OF_A_CELL))
    bits = min(_MOST_CODE_BITS, int(math.log2(max(2, count))))
    parts = next(parts for parts in range(max(1, width // 2), 0, -1) if width % parts == 0)
    return {"flat": "Flat", "hnsw": "HNSW32", "ivf": f"IVF{cells},Flat",
            "ivfpq": f"IVF{cells},PQ{parts}x{bits}"}.get(kind, kind)


def check_type(kind, width):
    """UserError where --type is none for inner products of so many numbers, whatever the number of vectors."""
    _made(kind, _MOST_CELLS, width)


def new_index(kind, count, width):
    """An empty index, not trained yet; UserError where --type is none for inner products, or does not fit."""
    index = _made(kind, count, width)
    _check_memory(index, kind, count)
    return index


def _made(kind, count, width):
    text = factory_of(kind, count, width)
    advice = f"give {', '.join(TYPES)}, or another factory string of faiss"
    cells = re.match(r"(?:.*,)?IVF(\d+)", text)
    if cells and not 0 < int(cells[1]) <= min(count, _MOST_CELLS):
        raise UserError(f"--type {kind}: {cells[1]} is not a number of cells from 1 to {min(count, _MOST_CELLS)}: "
                        f"{advice}")
    links = [int(number) for number in re.findall(r"(?:HNSW|NSG)(\d+)", text)]
    if re.search(r"(?<!\d)0+(?!\d)", text) or not all(1 < number <= _MOST_LINKS for number in links):
        raise UserError(f"--type {kind}: faiss crashes on parts of 0, and on graphs of other than 2 to {_MOST_LINKS} "
                        f"links: {advice}")
    try:
        index = faiss.index_factory(width, text, faiss.METRIC_INNER_PRODUCT)
    except (RuntimeError, MemoryError) as error:
        raise UserError(f"--type {kind} is no index of {width} numbers by inner product ({reason_of(error)}): "
                        f"{advice}") from error
    if isinstance(index, faiss.IndexIDMap):
        raise UserError(f"--type {kind}: rows are numbered already, so leave IDMap out")
    ivf = _lists_of(index)
    if ivf is not None:  # faiss warns of small samples; the recall that is measured says more
        ivf.cp.min_points_per_centroid = 1
        if isinstance(ivf, faiss.IndexIVFPQ):
            ivf.pq.cp.min_points_per_centroid = 1
            ivf.do_polysemous_training = False  # a second of CPU for each part, for a filter that no search here uses
    return index


def reason_of(error):
    """What faiss says, without the place in its source."""
    return str(error).rpartition(" Error: ")[2].rpartition("cpp:")[2].lstrip("0123456789: ") or repr(error)


def _lists_of(index):
    """The inverted lists inside of an index; None where it has none."""
    ivf = faiss.try_extract_index_ivf(index)
    return None if ivf is None else faiss.downcast_index(ivf)


def _check_memory(index, kind, count):
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = count * bytes_of_vector(index)
    if needed > total:
        raise UserError(f"--type {kind} takes {needed / 1e9:.1f} GB for {count} vectors, and this host has "
                        f"{total / 1e9:.1f} GB: give --type ivfpq, or a host with more memory")


def bytes_of_vector(index):
    """About how many bytes a vector takes in the index."""
    try:
        return index.sa_code_size() + 8  # the number of its row
    except RuntimeError:
        return 4 * index.d + _GRAPH_BYTES


def sample_size(index):
    """Vectors that the index learns from; 0: it has nothing to learn."""
    if index.is_trained:
        return 0
    ivf = _lists_of(index)
    only_cells = type(faiss.downcast_index(index)) is faiss.IndexIVFFlat
    cells = _TRAINED_BY * ivf.nlist if ivf is not None else 0
    return cells if only_cells else max(cells, _LEAST_SAMPLE)


def can_be_merged(index):
    """Whether parts that ranks have filled make the same index as one rank would.

    Only inverted lists do. A graph depends on the order in which it grows, and whole vectors take no work to add.
    """
    ivf = _lists_of(index)
    simple = type(faiss.downcast_index(index)) in (faiss.IndexPreTransform, faiss.IndexIVFFlat, faiss.IndexIVFPQ,
                                                   faiss.IndexIVFScalarQuantizer)
    return simple and ivf is not None and type(ivf) in (
        faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)


def search_settings(index):
    """(name, [values]) of the number that a search takes more time for, and finds more: cells or candidates.

    ("", []) where there is none.
    """
    ivf = _lists_of(index)
    if ivf is not None:
        return "nprobe", sorted({*(2**power for power in range(ivf.nlist.bit_length())), ivf.nlist})
    while isinstance(index, (faiss.IndexPreTransform, faiss.IndexRefine)):
        index = faiss.downcast_index(index.index if isinstance(index, faiss.IndexPreTransform) else index.base_index)
    return ("efSearch", [2**power for power in range(4, 12)]) if isinstance(index, faiss.IndexHNSW) else ("", [])


def set_search(index, name, value):
    """Set that number; it is saved with the index."""
    faiss.ParameterSpace().set_index_parameter(index, name, value)


def search(index, queries, k):
    """(scores, rows) (Q, k) of the k best vectors, best first; row −1 where the index finds fewer."""
    scores, rows = index.search(np.ascontiguousarray(queries, np.float32), k)
    return scores, rows
