"""Sums of the largest numbers of every rank, in messages whose bytes do not grow with the number of ranks W.

An all-gather of every rank's k largest numbers sends (W - 1) k of them from each rank. Here the numbers of a bucket are
cut into pieces, and each piece has a rank that owns it. Two rounds of messages make the sum:

    1. each rank sends the largest numbers of a piece to its owner, about k of all pieces together (all-to-all)
    2. the owner adds them to its own, and sends the largest of the piece's sum to all ranks (all-gather)

What an owner does not send stays with it. A sparse sum in two such rounds is that of SparCML (Renggli et al. 2019) and
Ok-Topk (Li and Hoefler 2022). Ours differs in this: each rank selects as many numbers of every piece, so all messages
have sizes that every rank knows, and ranks own as many pieces as each other, but for one. The owner adds all of its own
numbers, not its largest only. And a round holds many buckets, so that a step at many ranks has few messages.
"""

import math
from dataclasses import dataclass

import torch

from xc.comm.traffic import sent_all_reduce, sent_reduce_scatter
from xc.gradients.topk import pack, row_bytes, topk_indices, unpack

KEPT = 4  # numbers of a piece's sum that its owner sends, for each one that a rank sends to the owner
ROUND_BYTES = 2**20  # messages of a rank that travel together: fewer would be mostly latency


@dataclass(frozen=True)
class Pieces:
    """How the numbers of a bucket are cut. Piece p is owned by rank (first + p) mod W.

    count   P, number of pieces, at most W
    length  numbers of a piece; the last pieces may reach beyond the bucket
    sent    numbers of a piece that every other rank sends to its owner
    kept    numbers of the sum that the owner sends to all
    """

    count: int
    length: int
    sent: int
    kept: int
    first: int

    @classmethod
    def of(cls, numbers, density, num_ranks, bits, first):
        """None if a dense sum sends no more bytes.

        numbers  of the bucket; a density's share of them is sent to the owners
        """
        k = math.ceil(density * numbers)
        sent = -(-k // num_ranks)
        count = -(-k // sent)
        length = -(-numbers // count)
        kept = min(KEPT * sent, length)
        dense = sent_all_reduce(num_ranks, 4 * numbers)
        # An all-to-all and an all-gather of near-equal parts send as many bytes as one reduce-scatter of them all.
        sparse = sent_reduce_scatter(num_ranks, row_bytes(bits) * count * (sent + kept))
        return None if k >= numbers or sparse >= dense else cls(count, length, sent, kept, first)

    def owners(self, num_ranks):
        """(P,) rank that owns each piece."""
        return (self.first + torch.arange(self.count)) % num_ranks

    def piece_of(self, rank, num_ranks):
        """Index of the piece that a rank owns; None if it owns none."""
        piece = (rank - self.first) % num_ranks
        return piece if piece < self.count else None


def cut(sizes, density, num_ranks, bits):
    """[Pieces, or None if it is summed dense, of every bucket]. Owners take turns from bucket to bucket.

    sizes  numbers in each bucket
    """
    pieces, first = [], 0
    for numbers in sizes:
        pieces.append(Pieces.of(numbers, density, num_ranks, bits, first % num_ranks))
        first += pieces[-1].count if pieces[-1] else 0
    return pieces


def rounds(pieces, bits):
    """Lists of the indices of the buckets that travel together: consecutive ones, of about ROUND_BYTES."""
    together, num_bytes = [], 0
    for i, of_bucket in enumerate(pieces):
        if of_bucket:
            together.append(i)
            num_bytes += row_bytes(bits) * of_bucket.count * (of_bucket.sent + of_bucket.kept)
        if together and num_bytes >= ROUND_BYTES:
            yield together
            together, num_bytes = [], 0
    if together:
        yield together


def rows_sent(pieces, rank, num_ranks):
    """Rows that a rank sends of these buckets: to the owners of pieces; and to each rank, of its own pieces."""
    owned = [one for one in pieces if one.piece_of(rank, num_ranks) is not None]
    return (sum(one.count * one.sent for one in pieces) - sum(one.sent for one in owned),
            sum(one.kept for one in owned))


class Unsent:
    """The unsent numbers of a bucket and their momentum, cut into pieces.

    first               index of the bucket's first number among those of all buckets; messages have such indices
    residual, momentum  (N + W,)  the N numbers, then zeros, since the last pieces may reach beyond N
    """

    def __init__(self, first, numbers, num_ranks, like):
        self.first = first
        self.residual, self.momentum = (like.new_zeros(numbers + num_ranks) for _ in range(2))

    def take(self, indices, bits):
        """The message of these numbers, which are unsent no longer."""
        message, sent = pack(self.residual[indices], indices + self.first, bits)
        self.residual[indices] -= sent  # what 16 bits lose stays
        self.momentum[indices] = 0
        return message

    def add(self, message):
        """Add the numbers of a message, in which an index may occur more than once."""
        values, indices = unpack(message)
        self.residual.index_add_(0, indices - self.first, values)

    def largest(self, pieces, piece, count, k):
        """Indices (count k,) of the k largest of each of `count` pieces, from this one on."""
        begins = pieces.length * torch.arange(piece, piece + count, device=self.residual.device)
        numbers = self.residual[piece * pieces.length : (piece + count) * pieces.length].view(count, pieces.length)
        return (topk_indices(numbers, k) + begins[:, None]).flatten()


class Round:
    """The messages of some buckets. All ranks of the group make the same calls in the same order."""

    def __init__(self, group, buckets, bits):
        """buckets: [(Unsent, Pieces)]"""
        self._group, self._buckets, self._bits, self._messages, self._wait = group, buckets, bits, [], None
        pieces, ranks = [pieces for _, pieces in buckets], range(group.size)
        owners = torch.cat([one.owners(group.size).repeat_interleave(one.sent) for one in pieces])
        owners = owners[owners != group.rank]
        self._by_owner = owners.argsort(stable=True).to(buckets[0][0].residual.device)
        self._sent = owners.bincount(minlength=group.size).tolist()
        self._own = [(unsent, one, one.piece_of(group.rank, group.size)) for unsent, one in buckets
                     if one.piece_of(group.rank, group.size) is not None]
        self._of_buckets = [one.sent for _, one, _ in self._own]
        self._received = [sum(self._of_buckets) * (rank != group.rank) for rank in ranks]
        self._kept = [rows_sent(pieces, rank, group.size)[1] for rank in ranks]

    def select(self):
        """Take the largest numbers of the next bucket. After the last one, begin to send them to the owners."""
        unsent, pieces = self._buckets[len(self._messages)]
        own = pieces.piece_of(self._group.rank, self._group.size)
        indices = unsent.largest(pieces, 0, pieces.count, pieces.sent).view(pieces.count, pieces.sent)
        if own is not None:
            indices = torch.cat([indices[:own], indices[own + 1 :]])
        self._messages.append(unsent.take(indices.flatten(), self._bits))
        if len(self._messages) == len(self._buckets):
            message, self._messages = torch.cat(self._messages)[self._by_owner], []
            self._wait = self._group.all_to_all_async(message, self._sent, self._received)

    def reduce(self):
        """Add what others sent to the pieces that this rank owns. Begin to send the largest numbers of the sums."""
        received = self._wait()
        by_rank = received.reshape(self._group.size - 1, sum(self._of_buckets), received.shape[1])
        messages = [received[:0]]  # a rank may own no piece
        for (unsent, pieces, piece), message in zip(self._own, by_rank.split(self._of_buckets, 1), strict=True):
            unsent.add(message.flatten(0, 1))
            messages.append(unsent.take(unsent.largest(pieces, piece, 1, pieces.kept), self._bits))
        self._wait = self._group.all_gather_async(torch.cat(messages), self._kept)

    def finish(self):
        """Wait for the message of all owners."""
        wait, self._wait = self._wait, None
        return wait()
