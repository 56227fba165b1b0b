"""A pack as a split: records decoded to pixels, in the order of a sampler."""

import sys
import threading

import numpy as np
import torch

from xc.data.images import decode
from xc.data.sampler import ByClass, ByWeight, Natural
from xc.errors import UserError


class PackSplit:
    """The split of a pack, decoded; see loader.py for what a split offers.

    A record that cannot be used is reported. Training uses the next good record instead, the same one on any rank with
    any number of threads; a test leaves it out.
    """

    def __init__(self, pack, channels, image_size, max_bad_records=0, sampler="natural"):
        """UserError where sampler is weighted and the pack has no weights."""
        self.pack, self.names = pack, pack.names
        self.num_classes, self.classes_digest = pack.num_classes, pack.classes_digest
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
        """About how many bytes of memory `order` needs."""
        return {"natural": 0, "weighted": 16 * len(self)}.get(self.sampler, 8 * len(self) + 56 * self.num_classes)

    def class_counts(self, first, last):
        """(last − first,) int64: records of the classes first … last − 1. PackError where they are damaged."""
        return self.pack.counts(first, last)

    def labels(self, records):
        """(n,) int64 class ids of neighbouring records, a range. PackError where they are damaged."""
        return self.pack.labels(records.start, records.stop)

    def order(self, seed):
        """The order of the examples by the sampler. PackError or ValueError where labels or weights are damaged."""
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
        """uint8 images (n, channels, size, size) and labels (n,) of record numbers, as tensors.

        replace  whether other records replace those that cannot be used

        ValueError where more records than max_bad_records cannot be used.
        """
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
                images[i] = decode(data[i], size, channels)
            except ValueError as e:
                raise ValueError(f"record {record} of {self.pack.path}: {e}: pack the data again without it, or let "
                                 "the run leave out some by --max-bad-records") from e
        return torch.from_numpy(images), torch.from_numpy(labels)

    def _first_good(self, record, tries):
        """Image and label of the first usable record among `tries` from `record` on; empty tensors if there is none."""
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
                raise ValueError(too_many_bad(len(self.bad_records), self.max_bad_records, error))
        print(f"warning: left out: {error}", file=sys.stderr, flush=True)


def too_many_bad(num_bad, max_bad, which):
    """The message of a run that found too many bad records."""
    return (f"{num_bad} records cannot be used, --max-bad-records allows {max_bad} ({which}): check the pack with "
            "python -m data_tools.show --verify")
