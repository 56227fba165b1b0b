"""A step's batches: each example once, and the labels of all ranks as a gather of them gives."""

import pytest
import torch

from tests.support.worlds import run_ranks
from xc.config import Config
from xc.data.loader import Loader, open_splits
from xc.optim.schedule import Progress, Schedule
from xc.train.batches import StepBatches

CFG = Config(data="synth:classes=40,dim=4,examples=3", out="-", global_batch=13, epochs=2.0, loader_threads=2)


@pytest.mark.parametrize("size", [1, 2, 3, 14])  # 14: a rank has no example
@pytest.mark.parametrize("counts", [[1] * 18, [3] * 6, [1, 4, 2, 9, 2]])
def test_labels_of_all_ranks(size, counts):
    split = open_splits(CFG)["train"]
    schedule = Schedule.of(CFG, len(split), 1)

    def body(world):
        loader = Loader(split, CFG, world)
        batches, plain = StepBatches(loader, Progress(), schedule, world), loader.train(0, schedule.examples, 13)
        for count in counts:
            batch, labels = batches.take(count)
            expected = plain.take(count)
            assert len(batch) == len(expected) == count
            for (images, own), (as_loaded, of_loaded) in zip(batch, expected, strict=True):
                assert torch.equal(images, as_loaded) and torch.equal(own, of_loaded)
            own = torch.cat([own for _, own in expected])
            assert torch.equal(labels.own, own) and labels.counts == world.all_ranks.all_gather_object(len(own))
            assert torch.equal(labels.of_all, world.all_ranks.all_gather(own, labels.counts))
        batches.close()

    run_ranks(size, body)


def test_close_waits_for_what_travels(monkeypatch):
    def body(world):
        waited = []
        begin = world.all_ranks.all_gather_async

        def noted(*arguments):
            wait = begin(*arguments)
            return lambda: waited.append(1) or wait()

        world.all_ranks.all_gather_async = noted
        batches = StepBatches(Loader(open_splits(CFG)["train"], CFG, world), Progress(), schedule, world)
        batches.take(2)
        before = len(waited)
        batches.close()
        return before, len(waited)

    schedule = Schedule.of(CFG, 120, 2)
    assert run_ranks(2, body) == [(2, 4)] * 2
