"""The k largest, and their message."""

import pytest
import torch

from xc.gradients.topk import message_bytes, pack, topk_indices, unpack


@pytest.mark.parametrize("size, k", [(1, 1), (7, 7), (1000, 1), (1009, 37), (4099, 4000)])
@pytest.mark.parametrize("kind", ["normal", "one column", "equal", "few"])
def test_the_k_largest(size, k, kind):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size + k))
    if kind == "one column":  # of whatever width: large values side by side and at equal distances
        values[: size // 3] *= 100
        values[:: max(1, int((size / k) ** 0.5))] *= 1000
    if kind == "equal":
        values = values.sign()
    if kind == "few":
        values[size // 2 :] = 0
    places = topk_indices(values, k)
    assert len(places) == k == len(places.unique())
    torch.testing.assert_close(values[places].abs().sort().values, values.abs().sort().values[-k:], rtol=0, atol=0)


def test_a_number_that_is_none_does_not_stop_it():
    """It is in the loss too, which ends the run with a line of its own."""
    values = torch.randn(10_000)
    values[77] = torch.nan
    assert 77 in topk_indices(values, 10) and len(topk_indices(torch.full((10_000,), torch.nan), 10)) == 10


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("bits", [32, 16])
def test_a_message_comes_back(k, bits):
    values, places = torch.randn(k) * 1e-3, torch.randperm(1000)[:k] + 2**31 - 1001
    buffer, as_sent = pack(values, places, bits)
    got, got_places = unpack(buffer, k, bits)
    assert buffer.dtype == torch.int32 and buffer.nbytes == message_bytes(k, bits)
    assert torch.equal(got, as_sent) and torch.equal(got_places.long(), places)
    torch.testing.assert_close(as_sent, values, rtol=0 if bits == 32 else 2**-8, atol=0)
