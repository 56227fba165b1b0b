"""Memory for batches that is used again: on many machines fresh pages take longer than filling them."""

import math
import weakref
from collections import deque

import numpy as np
import torch


class RecycledMemory:
    """Tensors of one size after another. The memory of a tensor comes back as soon as nothing refers to it, whether
    Python or a graph of gradients did. So there is as much of it as was in use at one time.

    Threads may share it.
    """

    def __init__(self):
        self._free_of_size = deque(), 0  # one attribute, so that threads see both change at once

    def empty(self, shape):
        """A float32 tensor of this shape, in host memory; its values are arbitrary."""
        num_bytes = 4 * math.prod(shape)
        free, size = self._free_of_size
        if num_bytes != size:  # tensors of the last size that are in use still go back to the old deque
            self._free_of_size = free, _ = deque(), num_bytes
        try:
            memory = free.pop()
        except IndexError:
            memory = np.empty(num_bytes // 4, np.float32)  # numpy uses huge pages
        lent = memory.reshape(shape)  # an object of its own, which the storage of the tensor keeps alive
        weakref.finalize(lent, free.append, memory).atexit = False
        return torch.from_numpy(lent)
