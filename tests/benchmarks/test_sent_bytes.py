"""What sent_bytes.py says of the classifier is what its collectives are given."""

from argparse import Namespace

import pytest
import torch

from benchmarks.sent_bytes import classifier, predicted_mb
from tests.support.worlds import run_ranks
from xc.comm.traffic import sent_all_reduce


@pytest.mark.parametrize("name", ["full", "knn"])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_the_softmax_sends_what_the_formula_says(num_ranks, name):
    args = Namespace(head=name, dim=16, batch_per_rank=4, model_parallel_size=0, density=0.1, ranks_per_host=1)

    def body(world):
        head, all_reduce, reduced = classifier(args, world), world.shards.all_reduce, []

        def counted(tensor, op="sum"):
            reduced.append(tensor.nbytes)
            return all_reduce(tensor, op)

        world.shards.all_reduce = counted
        labels = torch.arange(args.batch_per_rank)
        head.select(labels, 0)
        head(torch.ones(len(labels), args.dim), labels, num_ranks * len(labels))
        return sum(reduced)

    predicted = predicted_mb(args, num_ranks, ([], []), "dense", 32)["softmax"]
    for num_bytes in run_ranks(num_ranks, body):
        assert sent_all_reduce(num_ranks, num_bytes) / 2**20 == pytest.approx(predicted)
