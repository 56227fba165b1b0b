"""Selection of the k largest numbers, and the wire format of the message that carries them.

The selection is layer-wise top-k by divide and conquer (Song et al. 2020). The paper does not say how it divides. This
way is ours.
"""

import torch


def topk_indices(values, k):
    """Indices (k,) of the k largest |values| (N,). Exact, in no order; among equal values, any.

    Divide: arrange the values in columns, and find the maximum of each. Let t be the k-th largest maximum. The k
    columns with the largest maxima hold at least k values >= t, and all other columns only values <= t. So these
    columns hold k largest values, and all of them are >= t.
    Conquer: take the k largest of those. With columns of sqrt(N/k) values this reads 2 sqrt(N k) numbers after one
    pass over all.
    """
    height = int((len(values) / max(1, k)) ** 0.5)
    if height < 4:  # columns would gain nothing
        return values.abs().topk(k, sorted=False).indices
    width = len(values) // height
    whole = height * width  # the values after these are candidates, too
    table = values[:whole].view(height, width)
    maxima = torch.maximum(table.amax(0), table.amin(0).neg_())  # reads the table twice, but writes no copy of it
    least, columns = maxima.topk(k, sorted=False)
    row, column = (~(table.index_select(1, columns).abs() < least.min())).nonzero(as_tuple=True)  # keeps NaN
    indices = torch.cat([row * width + columns[column], torch.arange(whole, len(values), device=values.device)])
    return indices[values[indices].abs().topk(k, sorted=False).indices]


def pack(values, indices, bits):
    """The message of k values: one int32 buffer with the indices (k,), then the values (k,).

    values   (k,)  float32
    indices  (k,)
    bits     of a value in the message: 32, or 16 for bfloat16 with two values in one int32
    returns  the buffer, (2 k,) for 32 bits or (k + ceil(k/2),) for 16; the values (k,) as the receiver will get them
    """
    if bits == 32:
        return torch.cat([indices.int(), values.view(torch.int32)]), values
    short = values.bfloat16()
    even = torch.nn.functional.pad(short, (0, len(short) % 2))
    return torch.cat([indices.int(), even.view(torch.int32)]), short.float()


def unpack(buffer, k, bits):
    """Read a buffer of `pack`. Returns values (k,) float32, indices (k,) int32."""
    indices, values = buffer[:k], buffer[k:]
    return (values.view(torch.float32) if bits == 32 else values.view(torch.bfloat16)[:k].float()), indices


def message_bytes(k, bits):
    """Bytes of a buffer of `pack` with k values."""
    return 4 * (2 * k if bits == 32 else k + (k + 1) // 2)
