"""A float32 score and a class id in one int64.

The larger key has the larger score or, if scores are equal, the lower id.
"""

import torch

_LAST_ID = 2**32 - 1


def keys_of(scores, ids):
    """Keys (…) from float32 scores (…) and ids (…)."""
    bits = (scores + 0.0).view(torch.int32)  # + 0.0 turns -0 into 0
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32) | (_LAST_ID - ids)


def scores_of(keys):
    """The scores of keys, float32."""
    bits = (keys >> 32).int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)


def ids_of(keys):
    """The ids of keys, int64; -1 for EMPTY."""
    return torch.where(keys > EMPTY, _LAST_ID - (keys & _LAST_ID), -1)


EMPTY = keys_of(torch.tensor(-torch.inf), torch.tensor(_LAST_ID)).item()
