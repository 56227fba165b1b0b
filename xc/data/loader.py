"""From a data set to batches: decoding, augmentation, reading ahead.

A split is what the Loader takes examples from, `Images` of a pack or a `synth.Split`:

    data_seed                                  int, of the order of the records: another one has other records there
    num_classes, classes_digest, input_shape   (channels, size, size) or (dim,): one example as the backbone sees it
    len(split)                                 examples of an epoch
    split.order(seed).records(first, count)    record numbers of examples of the endless training sequence (xc/order.py)
    split.examples(records, replace=True)      inputs (n, *input_shape), pixels as uint8 or else float32, and labels
                                               (n,), as tensors; of records that cannot be used others, or
                                               (replace=False) none
    split.bad_records                          set of the records that this rank could not use and left out

The order of examples over all ranks is one endless sequence, epoch after epoch, fixed by the seed. A step takes the
next `global_batch` of it and each rank its part of those, so a run's position is one number, any number of ranks can
go on from it, and with --sampler natural no example is left out or repeated within an epoch.

Threads read and decode. What is left to do, making numbers of pixels and distorting them (`prepared`), takes four
times as long as decoding a JPEG of 224 × 224 pixels: a GPU does it for itself, from pixels that take a quarter of the
memory of numbers on their way; for a CPU the same threads do.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from xc.comm.shard import Shard
from xc.data import pack as packs
from xc.data import synthetic as synth
from xc.data.augment import prepared
from xc.data.pack_split import Images, too_many_bad
from xc.errors import UserError
from xc.run import watchdog


def open_splits(cfg):
    """{"train": split, …} of what --data names: a pack, a folder of packs, or synth: and a description."""
    if cfg.data.startswith(synth.PREFIX):
        return synth.open_splits(cfg)
    return {name: Images(one, cfg.channels, cfg.image_size, cfg.max_bad_records,
                         cfg.sampler if name == "train" else "natural")
            for name, one in packs.open_splits(cfg.data).items()}


class Loader:
    """Batches of one rank, read or made, and augmented ahead in threads.

    A batch is a pure function of (seed, place in the sequence, rank, W): the number of threads changes nothing.
    """

    def __init__(self, split, cfg, world):
        self.split, self.cfg, self.world, self.order = split, cfg, world, split.order(cfg.seed)

    def bad_records(self):
        """Number of records that ranks have left out so far, None where there are none. UserError where they are more
        than allowed. Collective."""
        found = set().union(*self.world.all_ranks.all_gather_object(self.split.bad_records))
        if len(found) > self.cfg.max_bad_records:
            raise UserError(too_many_bad(len(found), self.cfg.max_bad_records, f"records {sorted(found)}"))
        return len(found) or None

    def train(self, first, last, micro_batch):
        """Examples first … last - 1 of the sequence in micro-batches (inputs, labels), as a `Queue`.

        micro_batch  examples of each over all ranks, which does not depend on their number; divides last - first
        """
        mine = Shard.of(micro_batch, self.world.size, self.world.rank)
        places = ((start + mine.first, len(mine)) for start in range(first, last, micro_batch))
        return Queue(places, self._load, self._prepare, self.cfg, self.world.device)

    def test(self, global_batch):
        """Yields every record once over all ranks, unaltered; as many batches on every rank, some may be empty."""
        num_records = len(self.split)
        batches = ((first, Shard.of(min(global_batch, num_records - first), self.world.size, self.world.rank))
                   for first in range(0, num_records, global_batch))
        queue = Queue(((first + np.arange(mine.first, mine.last), False) for first, mine in batches),
                      self.split.examples, lambda inputs, *_: prepared(inputs), self.cfg, self.world.device)
        while batch := queue.take(1):
            yield batch[0]

    def _load(self, first, count):
        return self.split.examples(self.order.records(first, count))

    def _prepare(self, inputs, first, count):
        return prepared(inputs, first, self.cfg.augment, self.cfg.seed)


class Queue:
    """Batches of one rank, loaded ahead of their use in threads, in order."""

    def __init__(self, jobs, load, prepare, cfg, device):
        """jobs: an iterable of arguments of load(*job), which returns inputs and more tensors, and of
        prepare(inputs, *job), which makes of them what a step takes: on the GPU, or else where they were loaded."""
        self._gpu = torch.cuda.current_device() if device.type == "cuda" else None
        self._jobs, self._load, self._prepare = iter(jobs), load, prepare
        self._prefetch, self._device = cfg.prefetch, device
        self._pool, self._pending = ThreadPoolExecutor(cfg.loader_threads), deque()

    def take(self, count):
        """A list of the next `count` batches, of fewer at the end; as many, at least `prefetch`, are then under way."""
        watchdog.note("data")
        for job in islice(self._jobs, max(0, count + max(count, self._prefetch) - len(self._pending))):
            self._pending.append((job, self._pool.submit(self._loaded, job)))
        taken = [self._pending.popleft() for _ in range(min(count, len(self._pending)))]
        return [self._arrived(job, loading.result()) for job, loading in taken]

    def _loaded(self, job):
        inputs, *others = self._load(*job)
        if self._gpu is None:
            return self._prepare(inputs, *job), *others
        with torch.cuda.device(self._gpu):  # a thread begins with GPU 0, and would take memory of it
            # Memory that stays in place is copied while the host goes on.
            return tuple(tensor.pin_memory() for tensor in (inputs, *others))

    def _arrived(self, job, batch):
        if self._gpu is None:
            return batch
        inputs, *others = (tensor.to(self._device, non_blocking=True) for tensor in batch)
        return self._prepare(inputs, *job), *others

    def __del__(self):
        self._pool.shutdown(wait=False, cancel_futures=True)  # a run that fails does not read on


