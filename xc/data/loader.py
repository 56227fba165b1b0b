"""From a data set to batches: reading, decoding, augmentation, in threads ahead of their use.

A split is what the Loader takes examples from, a `PackSplit` or a `SyntheticSplit`:

    data_seed                                  int: splits with another seed have other records in the same order
    num_classes, classes_digest, input_shape   (channels, size, size) or (dim,): one example as the backbone sees it
    len(split)                                 examples of an epoch
    split.class_counts(first, last)            (last - first,) int64: examples of an epoch, of these classes
    split.names                                ClassNames, or what stands for them
    split.labels(records)                      (n,) int64: class ids of a range of records
    split.order(seed).records(first, count)    record numbers of examples of the endless training sequence (sampler.py)
    split.examples(records, replace=True)      tensors: inputs (n, *input_shape), pixels as uint8, else float32, and
                                               labels (n,); others replace records that cannot be used, or
                                               (replace=False) those are missing
    split.bad_records                          set of the record numbers that this rank could not use

The examples of all ranks are one endless sequence, epoch after epoch, fixed by the seed. A step takes the next
`global_batch` examples, and each rank its part of them. So the progress of a run is one number, any number of ranks can
resume from it, and with --sampler natural no example is left out or repeated within an epoch.

Threads read and decode. `prepared` then converts pixels to numbers and distorts them, which takes four times as long as
decoding a JPEG of 224 x 224 pixels. A GPU does that itself, from pixels that take a quarter of the memory of the
numbers; on a CPU the threads do it.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from xc.comm.shard import Shard
from xc.data import pack as packs
from xc.data import synthetic
from xc.data.augment import norm_of, prepared
from xc.data.evaluated import check_pairs
from xc.data.pack_split import PackSplit, too_many_bad
from xc.errors import UserError
from xc.run import watchdog

PREFETCH = 4  # batches that each rank reads ahead


def open_splits(cfg):
    """{"train": split, …} of --data: a pack, a folder of packs, or synth: and a description. UserError, PackError."""
    if cfg.data.startswith(synthetic.PREFIX):
        splits = synthetic.open_splits(cfg)
    else:
        splits = {name: PackSplit(one, cfg.channels, cfg.image_size, cfg.max_bad_records,
                                  cfg.sampler if name == "train" else "natural")
                  for name, one in packs.open_splits(cfg.data).items()}
    if cfg.eval == "retrieval":
        check_pairs(splits)
    return splits


class Loader:
    """Batches of one rank, read or made and augmented ahead in threads.

    A batch is a function of (seed, position in the sequence, rank, W) alone; the number of threads does not matter.
    """

    def __init__(self, split, cfg, world):
        self.split, self.cfg, self.world, self.order = split, cfg, world, split.order(cfg.seed)
        self.norm = norm_of(cfg.input_norm, cfg.channels)

    def bad_records(self):
        """Number of records that the ranks have left out so far, None if there are none. Collective.

        UserError where there are more than --max-bad-records.
        """
        found = set().union(*self.world.all_ranks.all_gather_object(self.split.bad_records))
        if len(found) > self.cfg.max_bad_records:
            raise UserError(too_many_bad(len(found), self.cfg.max_bad_records, f"records {sorted(found)}"))
        return len(found) or None

    def train(self, first, last, micro_batch):
        """A BatchQueue of the examples first … last - 1 of the sequence, in micro-batches (inputs, labels).

        micro_batch  examples of each over all ranks; divides last - first
        """
        mine = Shard.of(micro_batch, self.world.size, self.world.rank)
        jobs = ((start + mine.first, len(mine)) for start in range(first, last, micro_batch))
        return BatchQueue(jobs, self._load, self._prepare, self.cfg.loader_threads, self.world.device)

    def test(self, global_batch):
        """`in_order` of all records, each once over all ranks."""
        num_records = len(self.split)
        return self.in_order(np.arange(first, min(first + global_batch, num_records))
                             for first in range(0, num_records, global_batch))

    def in_order(self, batches):
        """Yields (inputs, labels) of this rank's part of each batch of record numbers (n,), without augmentation.

        All ranks get the same number of batches; some may be empty.
        """
        mine = ((records, Shard.of(len(records), self.world.size, self.world.rank)) for records in batches)
        jobs = ((records[own.first : own.last], False) for records, own in mine)
        queue = BatchQueue(jobs, self.split.examples, lambda inputs, *_: prepared(inputs, norm=self.norm),
                           self.cfg.loader_threads, self.world.device)
        while batch := queue.take(1):
            yield batch[0]

    def _load(self, first, count):
        return self.split.examples(self.order.records(first, count))

    def _prepare(self, inputs, first, count):
        return prepared(inputs, first, self.cfg.augment, self.cfg.seed, self.norm)


class BatchQueue:
    """Batches of one rank in order, loaded in threads ahead of their use."""

    def __init__(self, jobs, load, prepare, num_threads, device):
        """
        jobs     iterable of tuples, the arguments of load and prepare for each batch
        load     load(*job) returns inputs and more tensors; runs in a thread
        prepare  prepare(inputs, *job) returns what a step takes; runs on the GPU, or in the thread without one
        """
        self._gpu = torch.cuda.current_device() if device.type == "cuda" else None
        self._jobs, self._load, self._prepare, self._device = iter(jobs), load, prepare, device
        self._pool, self._pending = ThreadPoolExecutor(num_threads), deque()

    def take(self, count):
        """A list of the next `count` batches, fewer at the end. Then max(count, PREFETCH) more are being loaded."""
        watchdog.heartbeat("data")
        self._load_ahead(count)
        taken = [self._pending.popleft() for _ in range(min(count, len(self._pending)))]
        return [self._on_device(job, loading.result()) for job, loading in taken]

    def labels_ahead(self, first, last):
        """The labels [(B,), …] of the batches first … last - 1 from the next one on, fewer at the end, once they are
        loaded."""
        self._load_ahead(last)
        return [loading.result()[1].to(self._device, non_blocking=True)
                for _, loading in islice(self._pending, first, last)]

    def _load_ahead(self, count):
        for job in islice(self._jobs, max(0, count + max(count, PREFETCH) - len(self._pending))):
            self._pending.append((job, self._pool.submit(self._loaded, job)))

    def _loaded(self, job):
        inputs, *others = self._load(*job)
        if self._gpu is None:
            return self._prepare(inputs, *job), *others
        with torch.cuda.device(self._gpu):  # a thread starts with GPU 0, and would use memory on it
            # Copies from pinned memory run while the host continues.
            return tuple(tensor.pin_memory() for tensor in (inputs, *others))

    def _on_device(self, job, batch):
        if self._gpu is None:
            return batch
        inputs, *others = (tensor.to(self._device, non_blocking=True) for tensor in batch)
        return self._prepare(inputs, *job), *others

    def __del__(self):
        self._pool.shutdown(wait=False, cancel_futures=True)  # a run that fails must not read on
