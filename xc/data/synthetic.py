"""Data for scale: classes made on the fly from (seed, class id), nothing stored, any number of them.

    --data synth:classes=1000000,dim=128       all keys: `Spec`

A class is a point in R^dim, its prototype; an example is the prototype plus Gaussian noise. Prototypes lie in a
hierarchy: `branching` classes make a cluster, `branching` clusters one of the next level and so on. A prototype is the
sum of one Gaussian vector for the class and one for each cluster it is in, the smaller the lower the level, so classes
of one cluster (siblings) are near each other and are what a classifier confuses. Class ids say nothing about clusters.

Everything is a hash of numbers: the same in any batch, on any rank, in any thread, at a cost that does not grow with
the number of classes. With equal priors and isotropic noise the nearest prototype is the best guess there is, so the
best possible accuracy is known: `best_accuracy`.

As images, the prototype is a coarse grid of greys, enlarged, and the noise is one of pixels.
"""

import dataclasses
import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from xc.data.hashing import GOLDEN, keys_of, mix, shuffled
from xc.errors import UserError

PREFIX = "synth:"
MAX_CLASSES, MAX_IMAGE_CLASSES = 10**8, 10**5
_PLACES, _TRAIN, _TEST, _LEVELS = 1, 2, 4, 16  # streams of numbers; a split has two, for labels and for noise


@dataclass(frozen=True)
class Spec:
    """What `synth:` may be followed by: key=value, separated by commas."""

    classes: int
    dim: int = 64  # width of the vectors; for images, points of the coarse grid (a square number)
    levels: int = 3  # of the hierarchy, classes included; 1: no clusters
    branching: int = 10  # classes of a cluster, clusters of a cluster
    spread: float = 0.7  # deviation within a cluster, as a multiple of that one level higher
    noise: float = 0.6  # deviation of an example's numbers; the prototypes' is 1
    examples: int = 10  # training examples of a class that make an epoch; every epoch has new ones
    test: int = 10000  # test examples; 0: no test split
    seed: int = 0  # of the data; the order of a run's examples follows --seed
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
            ("test", 0 <= spec.test <= 10**9, "0 to 1000000000"),
            ("seed", 0 <= spec.seed < 2**32, "0 to 2**32 - 1"),
        ]:
            if not ok:
                raise UserError(f"--data {text}: {key}={getattr(spec, key)} is not allowed: {allowed}")
        return spec


def open_splits(cfg):
    """{"train": Split, "test": Split} of a Config whose `data` begins with synth:"""
    spec = Spec.parse(cfg.data)
    if cfg.sampler != "natural":
        raise UserError(f"--sampler {cfg.sampler} is for packs, the classes of --data {cfg.data} are balanced: leave "
                        "it out")
    shape = (cfg.channels, cfg.image_size, cfg.image_size) if spec.images else (spec.dim,)
    splits = {"train": Split(spec, shape, spec.examples * spec.classes, _TRAIN),
              "test": Split(spec, shape, spec.test, _TEST)}
    return {name: split for name, split in splits.items() if len(split)}


class Split:
    """An endless sequence of examples in random order; `len` of them make an epoch.

    Every num_classes examples have each class once, in another order each time, so classes are balanced and a batch
    is as good as drawn at random. No noise ever comes twice.

    input_shape  (dim,) or (channels, size, size)
    """

    bad_records = frozenset()

    def __init__(self, spec, input_shape, num_records, stream):
        self.spec, self.num_classes, self.input_shape = spec, spec.classes, input_shape
        self._num_records, self._stream = num_records, stream
        classes = {k: v for k, v in dataclasses.asdict(spec).items() if k not in ("examples", "test")}
        self.data_seed = spec.seed
        self.classes_digest = hashlib.sha256(repr(classes).encode()).hexdigest()

    def __len__(self):
        return self._num_records

    def order(self, seed):
        """The sequence as `data.Loader` asks for it: a seed is a place to begin."""
        return _Consecutive(int(mix(np.array([seed], np.uint64))[0] >> np.uint64(30)) * self.num_classes)

    def examples(self, records, replace=True):
        """Inputs (n, *input_shape) float32 and labels (n,) int64, as tensors; records (n,) may be any from 0 up."""
        labels = self.labels(records)
        noise = gaussians(keys_of(self.spec.seed, self._stream + 1, records), math.prod(self.input_shape))
        noise = torch.from_numpy(noise).view(-1, *self.input_shape)
        return self.means(labels).add_(noise, alpha=self.spec.noise), torch.from_numpy(labels)

    def labels(self, records):
        rounds, places = np.divmod(np.asarray(records), self.num_classes)
        return shuffled(places, self.num_classes, keys_of(self.spec.seed, self._stream, rounds))

    def means(self, ids):
        """(n, *input_shape) float32 tensor: the classes' examples without noise."""
        if not self.spec.images:
            return torch.from_numpy(self.prototypes(ids))
        channels, size, _ = self.input_shape
        side = math.isqrt(self.spec.dim)
        grids = torch.from_numpy(self.prototypes(ids, channels * self.spec.dim)).view(-1, channels, side, side)
        return F.interpolate(grids, (size, size), mode="bilinear", align_corners=False)

    def prototypes(self, ids, width=None):
        """(n, dim) float32 of deviation 1 over the classes; a function of (seed, id) alone."""
        width = width or self.spec.dim
        deviations = self.spec.spread ** np.arange(self.spec.levels)[::-1]
        deviations /= np.linalg.norm(deviations)
        total = np.zeros((len(ids), width), np.float32)
        for level, deviation in enumerate(deviations):
            keys = keys_of(self.spec.seed, _LEVELS + level, self.clusters(ids, level))
            total += gaussians(keys, width) * np.float32(deviation)
        return total

    def clusters(self, ids, level=1):
        """(n,) int64: the cluster of each class at that level; siblings have one at level 1. Level 0: the class."""
        ids = np.asarray(ids)
        places = shuffled(ids, self.num_classes, keys_of(self.spec.seed, _PLACES, np.zeros_like(ids)))
        return places // min(self.spec.branching**level, MAX_CLASSES)


class _Consecutive:
    """Record numbers one after the other: they are in random order already, at any number of classes."""

    def __init__(self, start):
        self.start = start

    def records(self, first, count):
        return self.start + np.arange(first, first + count)


def best_accuracy(split, num_examples, block=2048):
    """Accuracy of the best possible classifier on the split's first examples, and its standard error.

    It takes the nearest of all prototypes: num_examples * C * dim multiplications.
    """
    inputs, labels = split.examples(np.arange(num_examples))
    inputs = inputs.flatten(1)
    best, guess = inputs.new_full((num_examples,), -torch.inf), torch.zeros_like(labels)
    for first in range(0, split.num_classes, block):
        means = split.means(np.arange(first, min(first + block, split.num_classes))).flatten(1)
        score, place = torch.addmm(-means.square().sum(1) / 2, inputs, means.T).max(1)
        guess = torch.where(score > best, place + first, guess)
        best = torch.maximum(score, best)
    accuracy = (guess == labels).double().mean().item()
    return accuracy, math.sqrt(accuracy * (1 - accuracy) / num_examples)


def gaussians(keys, width):
    """(n, width) float32 standard normal numbers; row i depends on keys[i] alone. Box and Muller 1958."""
    x = mix(keys[:, None] + GOLDEN * np.arange(1, (width + 1) // 2 + 1, dtype=np.uint64))
    u = x.view(np.uint32).astype(np.float32) * np.float32(2**-32)
    radius = np.sqrt(-2 * np.log(u[:, ::2] + np.float32(2**-33)))
    angle = u[:, 1::2] * np.float32(2 * math.pi)
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], 1)[:, :width]
