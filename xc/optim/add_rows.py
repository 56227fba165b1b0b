"""Adds rows to some rows of a table."""


def add_rows(table, ids, rows):
    """table[ids[i]] += rows[i].

    table, ids, rows  (S, D), (A,), (A, D)

    Where ids repeat, CPUs add in the order of i; GPUs in any order.

    On CPUs scatter_add_ with one index for a whole row takes a third of the time of index_add_ (5,000 of 500,000 rows x
    128: 0.24 ms, not 0.77).
    """
    table.scatter_add_(0, ids[:, None].expand(rows.shape), rows)
