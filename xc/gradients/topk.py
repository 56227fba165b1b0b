"""The k largest of many numbers, and their message.

Layer-wise top-k by divide and conquer (Song et al. 2020); the way of dividing is ours.
"""

import torch


def top_places(values, k):
    """Places (k,) of the k largest |values| (N,), exactly, in no order; of equal ones any.

    Divide: |values| fall into columns; the k columns with the highest maxima hold k values that are not below the k-th
    highest maximum, so the k largest of all lie in these columns (equals aside) and are not below it either. Conquer:
    the k largest of those. With columns of sqrt(N/k) values this looks at 2 sqrt(N k) numbers after a pass over all.
    """
    height = int((len(values) / max(1, k)) ** 0.5)
    if height < 4:  # nothing to gain
        return values.abs().topk(k, sorted=False).indices
    width = len(values) // height
    whole = height * width  # the few that are left over are candidates all
    table = values[:whole].view(height, width)
    maxima = torch.maximum(table.amax(0), table.amin(0).neg_())  # twice read, but nothing of that size written
    least, columns = maxima.topk(k, sorted=False)
    row, column = (~(table.index_select(1, columns).abs() < least.min())).nonzero(as_tuple=True)  # a NaN stays in
    places = torch.cat([row * width + columns[column], torch.arange(whole, len(values), device=values.device)])
    return places[values[places].abs().topk(k, sorted=False).indices]


def pack(values, places, bits):
    """One int32 buffer of values (k,) and their places (k,): (2 k,) with 32 bits a value, (k + ceil(k/2),) with 16.

    Returns the buffer and the values as the receiver will have them: 16 bits are bfloat16's.
    """
    if bits == 32:
        return torch.cat([places.int(), values.view(torch.int32)]), values
    short = values.bfloat16()
    even = torch.nn.functional.pad(short, (0, len(short) % 2))
    return torch.cat([places.int(), even.view(torch.int32)]), short.float()


def unpack(buffer, k, bits):
    """Values (k,) float32 and places (k,) of a buffer of `pack`."""
    places, values = buffer[:k], buffer[k:]
    return (values.view(torch.float32) if bits == 32 else values.view(torch.bfloat16)[:k].float()), places


def message_bytes(k, bits):
    """Of a buffer of `pack`."""
    return 4 * (2 * k if bits == 32 else k + (k + 1) // 2)
