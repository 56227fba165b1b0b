"""The best classes of examples and their probabilities over ALL classes, streamed over blocks of class rows.

The classes are split over the ranks, as in training: each rank scores the features of all ranks against its own rows.
So a rank reads 1/W of the rows in every pass, and the page cache of a host keeps what fits. If each rank scored its own
images alone, every rank would read all rows: of 100 million classes with 128 numbers those are 51 GB.
"""

import torch

from xc.comm.shard import Shard

_EXAMPLES = 128  # scored at once: their logits against a block of rows take 2 MB
_CHUNK = 32  # classes whose highest logit is found first; only chunks that may hold a best class are sorted


@torch.no_grad()
def best_classes(features, trained, k, world):
    """The k classes with the highest scores, best first, and their probabilities. Collective.

    features  (G, D)  the same on every rank, finite
    k         at most C
    returns   (G, k)  int64 classes; of equal scores the lower class comes first
              (G, k)  float64 probabilities of the softmax over all C classes without margin; the sum is exact to the
                      rounding of the logits, at any W

    ValueError where a file of class rows is damaged.
    """
    group = world.shards
    shard = Shard.of(trained.num_classes, group.size, group.rank)
    scaled = trained.directions(features) * trained.scale
    best = _Best(len(features), k, features.device)
    with world.raise_on_all_ranks():
        for first, rows in trained.row_blocks(shard, features.device):
            for start in range(0, len(scaled), _EXAMPLES):
                piece = slice(start, start + _EXAMPLES)
                best.add(piece, scaled[piece] @ rows.T, first)
    return best.joined(group)


class _Best:
    """The k best classes of G examples among those seen so far, and the sum of all exponentials.

    scores, classes  (G, k)  best first
    high             (G,)    highest logit
    total            (G,)    float64: sum of exp(logit - high); float32 would lose digits over many millions of classes
    """

    def __init__(self, num_examples, k, device):
        self.k = k
        self.scores = torch.full((num_examples, k), -torch.inf, device=device)
        self.classes = torch.zeros(num_examples, k, dtype=torch.int64, device=device)
        self.high = torch.full((num_examples,), -torch.inf, device=device)
        self.total = torch.zeros(num_examples, dtype=torch.float64, device=device)

    def add(self, piece, logits, first):
        """Take the logits (g, n) of a slice of the examples for the classes first … first + n - 1; overwrites them.

        Classes come in ascending order.
        """
        logits = torch.nn.functional.pad(logits, (0, -logits.shape[1] % _CHUNK), value=-torch.inf)
        chunks = logits.view(len(logits), -1, _CHUNK)
        tops = chunks.amax(2)
        highest = tops.amax(1)
        # An equal score of a later class does not count.
        better = (highest > self.scores[piece][:, -1]).nonzero()[:, 0]
        if len(better):
            self._insert(better + piece.start, chunks, tops, better, first)
        high = torch.maximum(self.high[piece], highest)
        sums = logits.sub_(high[:, None]).exp_().sum(1, dtype=torch.float64)
        self.total[piece] = self.total[piece] * (self.high[piece].double() - high.double()).exp() + sums
        self.high[piece] = high

    def _insert(self, examples, chunks, tops, better, first):
        # The k best classes lie in the k chunks with the highest tops.
        order = _highest(tops[better], self.k)[1].sort(1).values
        found = chunks[better[:, None], order].flatten(1)
        places = order[:, :, None] * _CHUNK + torch.arange(_CHUNK, device=order.device)
        self._keep(examples, torch.cat([self.scores[examples], found], 1),
                   torch.cat([self.classes[examples], first + places.flatten(1)], 1))

    def _keep(self, examples, scores, classes):
        self.scores[examples], order = _highest(scores, self.k)
        self.classes[examples] = classes.gather(1, order)

    def joined(self, group):
        """(classes, probabilities) over the classes of all ranks of a group. Collective."""
        high = group.all_reduce(self.high.clone(), "max")
        total = group.all_reduce(self.total * (self.high.double() - high.double()).exp())
        examples = torch.arange(len(high), device=high.device)
        # The ranks hold ascending classes, so the lower class still comes first.
        scores, classes = (group.all_gather(one[None]).transpose(0, 1).flatten(1)
                           for one in (self.scores, self.classes))
        self._keep(examples, scores, classes)
        return self.classes, (self.scores.double() - high[:, None].double()).exp() / total[:, None]


def _highest(values, k):
    """(values, indices) of the k highest of each row (n, m), or all m, highest first; of equal ones the first."""
    if k < values.shape[1]:
        found, indices = values.topk(k + 1)
        if not (found[:, 1:] == found[:, :-1]).any():
            return found[:, :k], indices[:, :k]
    found, indices = values.sort(dim=1, descending=True, stable=True)  # four times the time, but it keeps the order
    return found[:, :k], indices[:, :k]
