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

import math
import sys
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F

from xc import pack as packs
from xc import synth, watchdog
from xc.config import UserError
from xc.keyed import GOLDEN, mix
from xc.order import ByClass, ByWeight, Natural
from xc.shard import Shard

# Values that are prepared at once. CPU: what they become on the way stays in caches, and memory is not new each time.
PIECE = {"cpu": 2**20, "cuda": 2**24}


def open_splits(cfg):
    """{"train": split, …} of what --data names: a pack, a folder of packs, or synth: and a description."""
    if cfg.data.startswith(synth.PREFIX):
        return synth.open_splits(cfg)
    return {name: Images(one, cfg.channels, cfg.image_size, cfg.max_bad_records,
                         cfg.sampler if name == "train" else "natural")
            for name, one in packs.open_splits(cfg.data).items()}


class Images:
    """The split of a pack, decoded.

    A record that cannot be used is named. Training takes the next one that can be in its place, on any rank and any
    number of threads the same one; a test does without.
    """

    def __init__(self, pack, channels, image_size, max_bad_records=0, sampler="natural"):
        self.pack, self.num_classes, self.classes_digest = pack, pack.num_classes, pack.classes_digest
        self.data_seed, self.input_shape = pack.seed, (channels, image_size, image_size)
        self.max_bad_records, self.bad_records, self._lock = max_bad_records, set(), threading.Lock()
        self.sampler = sampler
        if sampler == "weighted" and not pack.has_weights:
            raise UserError(f"--sampler weighted: {pack.path} has no weights: pack a manifest with a column weight, or "
                            "take another sampler")

    def __len__(self):
        return len(self.pack)

    @property
    def order_bytes(self):
        """Memory that the order takes while it is made, about."""
        return {"natural": 0, "weighted": 16 * len(self)}.get(self.sampler, 8 * len(self) + 56 * self.num_classes)

    def order(self, seed):
        """The order of examples by the sampler. PackError or ValueError where the pack's labels or weights are bad."""
        pack = self.pack
        if self.sampler == "natural":
            return Natural(len(self), seed)
        if self.sampler == "weighted":
            weights = pack.weights(0, len(self))
            if not weights.any():
                raise UserError(f"--sampler weighted: all weights of {pack.path} are 0: take another sampler")
            return ByWeight(weights, len(self), seed)
        class_weights = pack.class_counts > 0 if self.sampler == "balanced" else np.sqrt(pack.class_counts)
        return ByClass(pack.labels, pack.class_counts, class_weights, seed)

    def examples(self, records, replace=True):
        try:
            return self._decoded(records)
        except ValueError:
            if not self.max_bad_records:
                raise
        pairs = [self._first_good(int(record), len(self) if replace else 1) for record in records]
        return tuple(torch.cat(parts) for parts in zip(self._decoded([]), *pairs, strict=True))

    def _decoded(self, records):
        channels, size, _ = self.input_shape
        data, labels = self.pack.read(records)
        images = np.empty((len(records), *self.input_shape), np.uint8)
        for i, record in enumerate(records):
            try:
                images[i] = packs.decode(data[i], size, channels)
            except ValueError as e:
                raise ValueError(f"record {record} of {self.pack.path}: {e}: pack the data again without it, or let "
                                 "the run leave out some by --max-bad-records") from e
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _first_good(self, record, tries):
        """Image and label of the first of so many records that can be used, none where none can be."""
        for tried in range(record, record + tries):
            tried %= len(self)
            if tried not in self.bad_records:
                try:
                    return self._decoded([tried])
                except ValueError as e:
                    self._leave_out(tried, e)
        return self._decoded([])

    def _leave_out(self, record, error):
        with self._lock:
            if record in self.bad_records:
                return
            self.bad_records.add(record)
            if len(self.bad_records) > self.max_bad_records:
                raise ValueError(_too_many_bad(len(self.bad_records), self.max_bad_records, error))
        print(f"warning: left out: {error}", file=sys.stderr, flush=True)


def _too_many_bad(num_bad, most, which):
    return (f"{num_bad} records cannot be used, --max-bad-records allows {most} ({which}): check the pack with "
            "python -m data_tools.show --verify")


class Loader:
    """Batches of one rank, read or made, and augmented ahead in threads.

    A batch is a pure function of (seed, place in the sequence, rank, W): the number of threads changes nothing.
    """

    def __init__(self, split, cfg, world):
        self.split, self.cfg, self.world, self.order = split, cfg, world, split.order(cfg.seed)

    def bad_records(self):
        """Number of records that ranks have left out so far, None where there are none. UserError where they are more
        than allowed. Collective."""
        found = set().union(*self.world.everyone.all_gather_object(self.split.bad_records))
        if len(found) > self.cfg.max_bad_records:
            raise UserError(_too_many_bad(len(found), self.cfg.max_bad_records, f"records {sorted(found)}"))
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


def prepared(inputs, first_example=0, strength=0.0, seed=0):
    """What a backbone takes: float32, pixels as numbers in [-1, 1].

    inputs    (B, *shape), of `split.examples`; may be overwritten
    strength  of `augment`, which images but no vectors get; first_example and seed are its as well
    """
    outputs, is_pixels = inputs, inputs.dtype == torch.uint8
    if is_pixels and inputs.device.type == "cpu":
        outputs = torch.from_numpy(np.empty(inputs.shape, np.float32))  # numpy takes huge pages: a third of the time
    elif is_pixels:
        outputs = torch.empty(inputs.shape, device=inputs.device)
    size = max(1, PIECE[inputs.device.type] // math.prod(inputs.shape[1:]))
    for output, given in zip(outputs.split(size), inputs.split(size), strict=True):
        if is_pixels:
            output.copy_(given).div_(127.5).sub_(1)
        if strength and output.dim() == 4 and len(output):
            output.copy_(augment(output, first_example, strength, seed))
        first_example += len(output)
    return outputs


def augment(images, first_example, strength, seed):
    """Light distortion of every image: shift, scale, rotation, blur, contrast.

    images         (B, channels, size, size)
    first_example  place of the first image in the order; an example is distorted the same way on any rank of any world
    strength       1: up to 8 % shift, 12 % scale, 8 degrees, half-weight 3x3 blur, 30 % contrast
    """
    u = torch.from_numpy(_uniform(seed, first_example, len(images), 6)).to(images) * 2 - 1  # [-1, 1)
    shift_x, shift_y, zoom, angle, soft, contrast = strength * u.T[:, :, None, None]  # (B, 1, 1) each
    zoom, angle = 1 + 0.12 * zoom, math.radians(8) * angle
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    size = images.shape[-1]
    across = (2 * torch.arange(size, device=images.device) + 1) / size - 1  # centres of pixels, in half sides
    down = across[:, None]
    x, y = cos * across + (0.16 * shift_x - sin * down), sin * across + (0.16 * shift_y + cos * down)
    images = F.grid_sample(images, torch.stack([x, y], -1), padding_mode="border", align_corners=False)

    blurred = F.pad(images, (1, 1, 1, 1), mode="replicate")
    blurred = blurred[..., :-2, :] + blurred[..., 1:-1, :] + blurred[..., 2:, :]
    blurred = blurred[..., :-2] + blurred[..., 1:-1] + blurred[..., 2:]
    weight = (0.5 * soft).clamp(0, 1)[:, None]  # every other image stays sharp
    images = images + weight * (blurred / 9 - images)
    return images * (1 + 0.3 * contrast)[:, None]


def _uniform(seed, first, count, width):
    """(count, width) numbers in [0, 1) that depend on nothing but (seed, place in the order, column).

    splitmix64 of a counter; numpy's generators cannot start at each example cheaply.
    """
    with np.errstate(over="ignore"):
        x = np.arange(first * width, (first + count) * width, dtype=np.uint64) * GOLDEN
        x = mix(x + np.uint64(seed) * np.uint64(0xD1B54A32D192ED03))
    return ((x >> np.uint64(11)) * 2.0**-53).reshape(count, width)
