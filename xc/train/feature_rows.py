"""Class rows from images: the row of a class gets the mean direction of the features of its images."""

import sys
import time

import numpy as np
import torch

from xc.comm.shard import Shard
from xc.model.head import initial_rows
from xc.run import watchdog

_LABELS = 2**18  # that are looked at at once
_ROWS = 2**16  # scaled at once
_PROGRESS_SECONDS = 30


@torch.no_grad()
def fill_rows(state, loader, classes, length, stopped, world):
    """Set the rows of some classes from the features of their images, in one pass over these.

    state     State: its backbone computes the features, its head gets the rows
    loader    of the training split
    classes   (n,) int64, ascending, the same on every rank; None: all, and the norm of the features, which has seen
              none yet, norms each batch by itself
    length    of the rows that are set
    stopped   asked before every batch, answers alike on all ranks; where it is true, the rows are unfinished
    returns   (images, classes without an image that can be used: their rows are random); None where it was stopped

    Sums are kept in the rows themselves, so they take no memory, and bfloat16 rows round them. The result is the same
    at any W, to the rounding of the features. Collective.
    """
    head, backbone = state.head, state.backbone
    places = _places(classes, head)
    for some in places.split(_ROWS):
        head.weight[some] = 0
    backbone.eval()
    backbone[1].train(classes is None)
    num_images = _add_features(backbone, head, loader, classes, stopped, world)
    backbone.train()
    if num_images is None:
        return None
    loader.bad_records()
    lacking = sum(_scale(head, some, length) for some in places.split(_ROWS))
    return num_images, int(world.shards.all_reduce(torch.tensor([lacking])))


def _places(classes, head):
    """Places in the rows of this shard of the classes."""
    if classes is None:
        return torch.arange(len(head.weight), device=head.weight.device)
    return classes[head.shard.owns(classes)].to(head.weight.device) - head.shard.first


def _add_features(backbone, head, loader, classes, stopped, world):
    """Add the directions of the features of the images of some classes to their rows; returns how many images those
    are, or None where it was stopped. Collective."""
    num_images, group, last_said = 0, world.all_ranks, time.monotonic()
    for inputs, labels in loader.in_order(_batches(loader.split, classes, loader.cfg.global_batch)):
        watchdog.heartbeat("making the class rows")
        if stopped():
            return None
        counts = group.all_gather(torch.tensor([len(labels)], device=world.device)).tolist()
        # Not every network takes an empty batch; the norm must take one, since it sums over all ranks.
        features = backbone(inputs) if len(inputs) else backbone[1](torch.zeros(0, head.feature_dim,
                                                                                device=world.device))
        features = group.all_gather(head.directions(features), counts)
        labels = group.all_gather(labels, counts)
        own = head.shard.owns(labels)
        head.weight.index_add_(0, labels[own] - head.shard.first, features[own].to(head.weight.dtype))
        num_images += len(labels)
        if world.rank == 0 and time.monotonic() - last_said > _PROGRESS_SECONDS:
            last_said = time.monotonic()
            print(f"init: {num_images:,} images are done", file=sys.stderr, flush=True)
    return num_images


def _batches(split, classes, size):
    """Yields the record numbers (size,) of some classes or of all, in order; the last batch may be shorter."""
    rest = np.empty(0, np.int64)
    for start in range(0, len(split), _LABELS):
        watchdog.heartbeat("making the class rows")
        records = np.arange(start, min(start + _LABELS, len(split)))
        if classes is not None:
            labels = torch.from_numpy(np.array(split.labels(range(start, start + len(records)))))
            places = torch.searchsorted(classes, labels).clamp(max=len(classes) - 1)
            records = records[(classes[places] == labels).numpy()]
        rest = np.concatenate([rest, records])
        whole = len(rest) // size * size
        yield from rest[:whole].reshape(-1, size)
        rest = rest[whole:]
    if len(rest):
        yield rest


def _scale(head, places, length):
    """Give rows that are sums of features their length; returns the number of rows that are 0, which get random
    numbers."""
    rows = head.weight[places].float()
    lengths = rows.norm(dim=1, keepdim=True)
    head.weight[places] = (rows * (length / lengths)).to(head.weight.dtype)
    empty = places[lengths[:, 0] == 0]
    for place in empty.tolist():
        label = head.shard.first + place
        head.weight[place] = initial_rows(Shard(label, label + 1), head.feature_dim, head.seed, head.weight.dtype)[0]
    return len(empty)
