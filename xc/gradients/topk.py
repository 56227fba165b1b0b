"""Selection of the k largest numbers, and the wire format of the message that carries them.

The selection is layer-wise top-k by divide and conquer (Song et al. 2020). The paper does not say how it divides. This
way is ours.
"""

import torch


def topk_indices(values, k):
    """Indices (P, k) of the k largest |values| (P, N) of every row. Exact, in no order; among equal values, any.

    Divide: arrange the values of a row in columns, and find the maximum of each. Let t be the k-th largest maximum. The
    k columns with the largest maxima hold at least k values >= t, and all other columns only values <= t. So these
    columns hold k largest values.
    Conquer: take the k largest of those. With columns of sqrt(N/k) values this reads 2 sqrt(N k) numbers after one
    pass over all.
    """
    length = values.shape[1]
    height = int((length / max(1, k)) ** 0.5)
    if height < 4:  # columns would gain nothing
        return values.abs().topk(k, 1, sorted=False).indices
    width = length // height
    whole = height * width  # the values after these are candidates, too
    table = values[:, :whole].unflatten(1, (height, width))
    maxima = torch.maximum(table.amax(1), table.amin(1).neg_())  # reads the table twice, but writes no copy of it
    columns = maxima.topk(k, 1, sorted=False).indices
    begins = width * torch.arange(height, device=values.device)
    rest = torch.arange(whole, length, device=values.device).expand(len(values), -1)
    candidates = torch.cat([(begins[:, None] + columns[:, None]).flatten(1), rest], 1)
    largest = values.gather(1, candidates).abs_().topk(k, 1, sorted=False).indices
    return candidates.gather(1, largest)


def pack(values, indices, bits):
    """The message of k values, a row for each: its index, then the value.

    values   (k,)  float32
    indices  (k,)  below 2^31
    bits     of a value in the message: 32, or 16 for bfloat16
    returns  the message, (k, 2) int32 or (k, 3) int16; the values (k,) as the receiver will get them
    """
    indices = indices.int()[:, None]
    if bits == 32:
        return torch.cat([indices, values.view(torch.int32)[:, None]], 1), values
    short = values.bfloat16()
    return torch.cat([indices.view(torch.int16), short.view(torch.int16)[:, None]], 1), short.float()


def unpack(message):
    """Read a message of `pack`. Returns values (k,) float32, indices (k,) int32."""
    if message.dtype == torch.int32:
        indices, values = message.T.contiguous()
        return values.view(torch.float32), indices
    values = message[:, 2].contiguous().view(torch.bfloat16).float()
    return values, message[:, :2].flatten().view(torch.int32)


def row_bytes(bits):
    """Bytes of a row of a message."""
    return 8 if bits == 32 else 6
