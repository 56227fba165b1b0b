"""Memory of batches is used again, and never while a tensor has it."""

import threading

import pytest
import torch

from xc.data.recycled import RecycledMemory


def test_memory_comes_back_when_nothing_refers_to_it():
    memory = RecycledMemory()
    one, two = memory.empty((3, 5)), memory.empty((3, 5))
    place = one.data_ptr()
    assert one.dtype == torch.float32 and one.shape == (3, 5) and place != two.data_ptr()
    del one
    assert memory.empty((5, 3)).data_ptr() == place


@pytest.mark.parametrize("keep", [
    lambda x: x[1:], lambda x: x.numpy(), lambda x: (x * torch.ones(4, requires_grad=True)).sum(), lambda x: [x]])
def test_memory_is_kept_by_whatever_refers_to_it(keep):
    """A view, an array, a graph of gradients that needs it for the backward pass."""
    memory = RecycledMemory()
    tensor = memory.empty((3, 4)).fill_(2)
    place, kept = tensor.data_ptr(), keep(tensor)
    del tensor
    assert memory.empty((3, 4)).fill_(7).data_ptr() != place
    del kept
    assert memory.empty((3, 4)).data_ptr() == place


def test_another_size_has_memory_of_its_own():
    memory = RecycledMemory()
    small = memory.empty((2, 2)).fill_(1)
    large = memory.empty((9,)).fill_(2)
    del large
    assert memory.empty((9,)).sum() == 18 and small.sum() == 4
    assert memory.empty((0, 4)).shape == (0, 4)


def test_threads_never_share_memory():
    memory, faults = RecycledMemory(), []

    def work(number):
        for i in range(300):
            tensor = memory.empty((50 + i % 2,)).fill_(number)
            if not (tensor == number).all():
                faults.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
