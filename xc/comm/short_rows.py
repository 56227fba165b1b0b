"""Rows of numbers that travel between ranks in 32, 16 or 8 bits a number.

With one rank they are rounded, too, so that the numbers of a run do not depend on the number of ranks.
"""

import torch

SCALE_BYTES = 4  # of a row of 8-bit numbers


def bits_of(cfg):
    """Bits in which features travel: --feature-bits; with 0, as many as the backbone computes with."""
    return cfg.feature_bits or (32 if cfg.amp == "off" else 16)


def row_bytes(dim, bits):
    """Bytes of a row of `dim` numbers."""
    return dim * bits // 8 + SCALE_BYTES * (bits == 8)


def gather_async(rows, group, counts, bits):
    """Begin to gather the rows of all ranks; 16 bits are float16. Returns a function that waits for them, (G, D) float.

    rows    (B, D)
    counts  the B of every rank of the group
    """
    if bits == 8:
        wait = group.all_gather_async(_to_bytes(rows), counts)
        return lambda: _from_bytes(wait()).to(rows.dtype)
    wait = group.all_gather_async(rows if bits == 32 else rows.half(), counts)
    return lambda: wait().to(rows.dtype)


def reduce_scatter_async(rows, group, counts, bits):
    """Begin to sum rows (G, D) over the ranks; 16 bits are bfloat16, since gradients can be very small.

    Returns a function that waits for the sums (B, D) of this rank's rows. They are made in float32 at least.
    """
    if bits == 8:
        own = counts[group.rank]
        wait = group.all_to_all_async(_to_bytes(rows), counts, [own] * group.size)
        return lambda: _from_bytes(wait()).view(group.size, own, rows.shape[1]).sum(0).to(rows.dtype)
    wait = group.reduce_scatter_async(rows if bits == 32 else rows.bfloat16(), counts)
    return lambda: wait().to(rows.dtype)


def _to_bytes(rows):
    """(n, D + 4) int8: each row in 255 steps of a 127th of its largest number, and that step in float32."""
    step = rows.float().abs().amax(1, keepdim=True) / 127
    numbers = (rows / step.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
    return torch.cat([numbers, step.view(torch.int8)], 1)


def _from_bytes(message):
    numbers, step = message.split([message.shape[1] - SCALE_BYTES, SCALE_BYTES], 1)
    return numbers.float() * step.contiguous().view(torch.float32)
