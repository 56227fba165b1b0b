"""The k largest, and their message."""

import pytest
import torch

from xc.gradients.topk import pack, row_bytes, topk_indices, unpack


@pytest.mark.parametrize("rows, size, k", [(1, 1, 1), (3, 7, 7), (1, 1000, 1), (5, 1009, 37), (1, 4099, 4000)])
@pytest.mark.parametrize("kind", ["normal", "one column", "equal", "few"])
def test_the_k_largest_of_every_row(rows, size, k, kind):
    values = torch.randn(rows, size, generator=torch.Generator().manual_seed(size + k))
    if kind == "one column":  # of whatever width: large values side by side and at equal distances
        values[:, : size // 3] *= 100
        values[:, :: max(1, int((size / k) ** 0.5))] *= 1000
    if kind == "equal":
        values = values.sign()
    if kind == "few":
        values[:, size // 2 :] = 0
    indices = topk_indices(values, k)
    assert indices.shape == (rows, k)
    for row, of_row in zip(values, indices, strict=True):
        assert len(of_row.unique()) == k
        torch.testing.assert_close(row[of_row].abs().sort().values, row.abs().sort().values[-k:], rtol=0, atol=0)


def test_a_number_that_is_none_does_not_stop_it():
    """It is in the loss too, which ends the run with a line of its own."""
    values = torch.randn(1, 10_000)
    values[0, 77] = torch.nan
    assert 77 in topk_indices(values, 10)
    assert len(topk_indices(torch.full_like(values, torch.nan), 10)[0].unique()) == 10


@pytest.mark.parametrize("k", [0, 1, 2, 5])
@pytest.mark.parametrize("bits", [32, 16])
def test_a_message_comes_back(k, bits):
    values, places = torch.randn(k) * 1e-3, torch.randperm(1000)[:k] + 2**31 - 1001
    message, as_sent = pack(values, places, bits)
    got, got_places = unpack(message)
    assert len(message) == k and message.nbytes == k * row_bytes(bits)
    assert torch.equal(got, as_sent) and torch.equal(got_places.long(), places)
    torch.testing.assert_close(as_sent, values, rtol=0 if bits == 32 else 2**-8, atol=0)
