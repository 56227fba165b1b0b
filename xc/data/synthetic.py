"""Synthetic classes for tests of scale: any number of them, computed from (seed, class id), nothing stored.

    --data synth:classes=1000000,dim=128       all keys: `Spec`

A class is a point in R^dim, its prototype; an example is the prototype plus Gaussian noise. The prototypes form a
hierarchy: `branching` classes make a cluster, `branching` clusters make a cluster of the next level, and so on. A
prototype is the sum of a Gaussian vector for the class and one for each of its clusters; lower levels have smaller
vectors. So the classes of one cluster (siblings) are near each other, and a classifier confuses them. Class ids tell
nothing about clusters.

Everything is a hash of numbers: the same in any batch, on any rank, in any thread, at a cost that does not grow with
the number of classes. With equal priors and isotropic noise the nearest prototype is the best guess, so the best
possible accuracy is known: `best_accuracy`.

For images the prototype is a coarse grid of greys, enlarged, and the noise is added to the pixels.
"""

import dataclasses
import functools
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from xc.data.class_names import Numbers
from xc.data.hashing import GOLDEN, keys_of, mix, shuffled
from xc.errors import UserError

PREFIX = "synth:"
MAX_CLASSES, MAX_IMAGE_CLASSES = 10**8, 10**5
_CLUSTERS, _TRAIN, _TEST, _VAL, _DRAWN, _LEVELS = 1, 2, 4, 6, 8, 16  # streams of numbers; a split has two


@dataclass(frozen=True)
class Spec:
    """The keys that may follow `synth:`, as key=value, separated by commas."""

    classes: int
    dim: int = 64  # width of the vectors; for images, points of the coarse grid (a square number)
    levels: int = 3  # of the hierarchy, classes included; 1: no clusters
    branching: int = 10  # classes of a cluster, clusters of a cluster
    spread: float = 0.7  # standard deviation within a cluster, as a multiple of that one level higher
    noise: float = 0.6  # standard deviation of the noise; that of the prototypes is 1
    examples: int = 10  # training examples per class and epoch; every epoch has new ones
    drawn: int = 0  # classes that have examples, scattered over all; the others are rows that compete; 0: all
    test: int = 10000  # test examples; 0: no test split
    val: int = 0  # validation examples; 0: no val split
    seed: int = 0  # of the data; --seed fixes the order of the examples
    images: int = 0  # 1: small images of --image-size and --channels

    @classmethod
    def parse(cls, text):
        """The Spec in "synth:classes=1000,dim=64"; UserError for anything wrong with it."""
        types, values = {f.name: f.type for f in dataclasses.fields(cls)}, {}
        for pair in text.removeprefix(PREFIX).split(","):
            key, _, value = pair.partition("=")
            if key not in types:
                raise UserError(f"--data {text}: {key!r} is not known: give key=value of {', '.join(types)}")
            if key in values:
                raise UserError(f"--data {text}: {key} is given twice")
            try:
                values[key] = types[key](value)
            except ValueError:
                raise UserError(f"--data {text}: {pair} is not a number of type {types[key].__name__}") from None
        if "classes" not in values:
            raise UserError(f"--data {text}: give classes=, the number of classes")
        spec = cls(**values)
        for key, ok, allowed in [
            ("classes", 1 <= spec.classes <= MAX_CLASSES, f"1 to {MAX_CLASSES}"),
            ("images", spec.images in (0, 1), "0 or 1"),
            ("classes", not spec.images or spec.classes <= MAX_IMAGE_CLASSES, f"with images, 1 to {MAX_IMAGE_CLASSES}"),
            ("dim", 1 <= spec.dim <= 4096, "1 to 4096"),
            ("dim", not spec.images or math.isqrt(max(0, spec.dim)) ** 2 == spec.dim, "with images, a square number"),
            ("levels", 1 <= spec.levels <= 16, "1 to 16"),
            ("branching", 2 <= spec.branching <= MAX_CLASSES, f"2 to {MAX_CLASSES}"),
            ("spread", 0 < spec.spread <= 1, "above 0, at most 1"),
            ("noise", 0 <= spec.noise <= 1000, "0 to 1000"),
            ("examples", 1 <= spec.examples <= 10**6, "1 to 1000000"),
            ("drawn", 0 <= spec.drawn <= spec.classes, f"0 to classes, {spec.classes}"),
            ("test", 0 <= spec.test <= 10**9, "0 to 1000000000"),
            ("val", 0 <= spec.val <= 10**9, "0 to 1000000000"),
            ("seed", 0 <= spec.seed < 2**32, "0 to 2**32 - 1"),
        ]:
            if not ok:
                raise UserError(f"--data {text}: {key}={getattr(spec, key)} is not allowed: {allowed}")
        return spec


def open_splits(cfg):
    """{"train": SyntheticSplit, "val": …, "test": …} of a Config whose `data` starts with synth:; UserError."""
    spec = Spec.parse(cfg.data)
    if cfg.sampler != "natural":
        raise UserError(f"--sampler {cfg.sampler} is for packs, the classes of --data {cfg.data} are balanced: leave "
                        "it out")
    shape = (cfg.channels, cfg.image_size, cfg.image_size) if spec.images else (spec.dim,)
    splits = {"train": SyntheticSplit(spec, shape, spec.examples * (spec.drawn or spec.classes), _TRAIN),
              "val": SyntheticSplit(spec, shape, spec.val, _VAL), "test": SyntheticSplit(spec, shape, spec.test, _TEST)}
    return {name: split for name, split in splits.items() if len(split)}


class SyntheticSplit:
    """An endless sequence of examples in random order; `len` of them make an epoch. See loader.py for splits.

    Each class that is drawn comes once in every num_drawn examples, in another order each time, so these classes are
    balanced and a batch is nearly a random sample. No noise is used twice.

    input_shape  (dim,) or (channels, size, size)
    num_drawn    classes that have examples
    """

    bad_records = frozenset()

    def __init__(self, spec, input_shape, num_records, stream):
        self.spec, self.num_classes, self.input_shape = spec, spec.classes, input_shape
        self.num_drawn, self._num_records, self._stream = spec.drawn or spec.classes, num_records, stream
        classes = {k: v for k, v in dataclasses.asdict(spec).items() if k not in ("examples", "drawn", "test", "val")}
        self.data_seed = spec.seed
        self.classes_digest = hashlib.sha256(repr(classes).encode()).hexdigest()
        self.names = Numbers(spec.classes, self.classes_digest)

    def __len__(self):
        return self._num_records

    def class_counts(self, first, last):
        """(last − first,) int64: examples of an epoch of the classes first … last − 1."""
        passes, rest = divmod(len(self), self.num_drawn)
        counts = np.full(last - first, 0 if self.spec.drawn else passes, np.int64)
        if self.spec.drawn:
            counts[self._drawn_ids[slice(*np.searchsorted(self._drawn_ids, (first, last)))] - first] = passes
        labels = self.labels(passes * self.num_drawn + np.arange(rest))  # each class once at most
        counts[labels[(first <= labels) & (labels < last)] - first] += 1
        return counts

    @functools.cached_property
    def _drawn_ids(self):
        """(num_drawn,) int64: the classes that are drawn, ascending."""
        return np.sort(self.class_of(np.arange(self.num_drawn)))

    def class_of(self, indices):
        """(n,) int64: the classes with these numbers among those that are drawn."""
        if not self.spec.drawn:
            return indices
        return shuffled(indices, self.num_classes, keys_of(self.spec.seed, _DRAWN, np.zeros_like(indices)))

    def order(self, seed):
        """The order of the examples for the Loader: the seed chooses the place to start."""
        return _Consecutive(int(mix(np.array([seed], np.uint64))[0] >> np.uint64(30)) * self.num_drawn)

    def examples(self, records, replace=True):
        """float32 inputs (n, *input_shape) and int64 labels (n,), as tensors. records: (n,) any numbers from 0 up."""
        labels = self.labels(records)
        noise = gaussians(keys_of(self.spec.seed, self._stream + 1, records), math.prod(self.input_shape))
        noise = torch.from_numpy(noise).view(-1, *self.input_shape)
        return self.means(labels).add_(noise, alpha=self.spec.noise), torch.from_numpy(labels)

    def labels(self, records):
        """(n,) int64 class ids of the records (n,)."""
        passes, indices = np.divmod(np.asarray(records), self.num_drawn)
        return self.class_of(shuffled(indices, self.num_drawn, keys_of(self.spec.seed, self._stream, passes)))

    def means(self, ids):
        """float32 tensor (n, *input_shape): examples of the classes without noise."""
        if not self.spec.images:
            return torch.from_numpy(self.prototypes(ids))
        channels, size, _ = self.input_shape
        side = math.isqrt(self.spec.dim)
        grids = torch.from_numpy(self.prototypes(ids, channels * self.spec.dim)).view(-1, channels, side, side)
        return F.interpolate(grids, (size, size), mode="bilinear", align_corners=False)

    def prototypes(self, ids, width=None):
        """(n, dim) float32, a function of (seed, id) alone; the standard deviation over the classes is 1."""
        width = width or self.spec.dim
        deviations = self.spec.spread ** np.arange(self.spec.levels)[::-1]
        deviations /= np.linalg.norm(deviations)
        total = np.zeros((len(ids), width), np.float32)
        for level, deviation in enumerate(deviations):
            keys = keys_of(self.spec.seed, _LEVELS + level, self.clusters(ids, level))
            total += gaussians(keys, width) * np.float32(deviation)
        return total

    def clusters(self, ids, level=1):
        """(n,) int64: the cluster of each class at a level. Siblings share one at level 1; at level 0 no classes do."""
        ids = np.asarray(ids)
        indices = shuffled(ids, self.num_classes, keys_of(self.spec.seed, _CLUSTERS, np.zeros_like(ids)))
        return indices // min(self.spec.branching**level, MAX_CLASSES)


class _Consecutive:
    """Consecutive record numbers: the records are in random order already."""

    def __init__(self, start):
        self.start = start

    def records(self, first, count):
        return self.start + np.arange(first, first + count)


def best_accuracy(split, num_examples, block=2048):
    """Accuracy of the best possible classifier on the first examples of a SyntheticSplit, and its standard error.

    The classifier takes the nearest prototype of all classes that are drawn, with a multiplication for each of them,
    each example and each number of a prototype.
    """
    inputs, labels = split.examples(np.arange(num_examples))
    inputs = inputs.flatten(1)
    best, guess = inputs.new_full((num_examples,), -torch.inf), torch.zeros_like(labels)
    for first in range(0, split.num_drawn, block):
        ids = split.class_of(np.arange(first, min(first + block, split.num_drawn)))
        means = split.means(ids).flatten(1)
        score, index = torch.addmm(-means.square().sum(1) / 2, inputs, means.T).max(1)
        guess = torch.where(score > best, torch.from_numpy(ids)[index], guess)
        best = torch.maximum(score, best)
    accuracy = (guess == labels).double().mean().item()
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / num_examples)


def gaussians(keys, width):
    """(n, width) float32 standard normal numbers (Box and Muller 1958); row i depends on keys[i] alone."""
    x = mix(keys[:, None] + GOLDEN * np.arange(1, (width + 1) // 2 + 1, dtype=np.uint64))
    u = x.view(np.uint32).astype(np.float32) * np.float32(2**-32)
    radius = np.sqrt(-2 * np.log(u[:, ::2] + np.float32(2**-33)))
    angle = u[:, 1::2] * np.float32(2 * math.pi)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :width]
