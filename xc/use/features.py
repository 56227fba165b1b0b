"""From images to features: every rank decodes and computes its part, and all ranks get all features in order."""

from collections import deque
from itertools import islice

import numpy as np
import torch

from xc.comm.shard import Shard
from xc.data.augment import norm_of, prepared
from xc.data.images import decode
from xc.data.loader import BatchQueue
from xc.errors import UserError, one_line


@torch.no_grad()
def features_of(images, trained, world, *, batch, threads, progress):
    """Yields (list of Images, features (n, D) of those of them that have no reason), alike on every rank. Collective.

    images    iterator of Images (source.py); an image that cannot be used gets a reason
    batch     images that a rank computes at once
    threads   that read and decode on each rank
    progress  called with every number of images that are done

    UserError where the source cannot be read on, or ranks see different images in it.
    """
    chunks, group = deque(), world.all_ranks
    norm = norm_of(trained.cfg.input_norm, trained.cfg.channels)
    queue = BatchQueue(_parts(images, batch, world, chunks), _Decoder(trained.cfg),
                       lambda inputs, *_: prepared(inputs, norm=norm), threads, world.device)
    while True:
        with world.raise_on_all_ranks():
            taken = queue.take(1)
        chunk, begin = chunks.popleft() if taken else ([], 0)
        own = Shard.of(len(chunk), world.size, world.rank)
        reasons = {i: chunk[i].reason for i in range(own.first, own.last) if chunk[i].reason is not None}
        told = group.all_gather_object((len(chunk), reasons))
        if len({count for count, _ in told}) > 1:
            raise UserError(f"the ranks see different images from number {begin} on: give all hosts the same files")
        if not taken:
            return
        for _, of_rank in told:
            for i, reason in of_rank.items():
                chunk[i].reason = reason
        shards = [Shard.of(len(chunk), world.size, rank) for rank in range(world.size)]
        counts = [len(shard) - len(of_rank) for shard, (_, of_rank) in zip(shards, told, strict=True)]
        [[inputs]] = taken
        # Not every network takes an empty batch.
        features = trained.backbone(inputs) if len(inputs) else torch.zeros(0, trained.cfg.feature_dim,
                                                                            device=world.device)
        features = group.all_gather(features, counts)
        yield chunk, _finite(features, [image for image in chunk if image.reason is None])
        progress(len(chunk))


def _parts(images, batch, world, chunks):
    """Yields the arguments of a load for each batch: (Images of this rank,).

    chunks  gets (Images of all ranks, number of the first) of each batch
    """
    begin = 0
    while chunk := list(islice(images, batch * world.size)):
        own = Shard.of(len(chunk), world.size, world.rank)
        for image in chunk[: own.first] + chunk[own.last :]:
            image.load = None  # another rank loads it; its bytes need no memory here
        chunks.append((chunk, begin))
        begin += len(chunk)
        yield (chunk[own.first : own.last],)


class _Decoder:
    """Loads Images: pixels (n, channels, size, size) uint8 of those that can be used; the others get a reason."""

    def __init__(self, cfg):
        self._size, self._channels = cfg.image_size, cfg.channels

    def __call__(self, images):
        pixels, good = np.empty((len(images), self._channels, self._size, self._size), np.uint8), 0
        for image in images:
            if image.load is None:  # the source has given a reason
                continue
            try:
                pixels[good] = decode(image.load(), self._size, self._channels)
                good += 1
            except (OSError, ValueError) as error:
                image.reason = one_line(getattr(error, "strerror", None) or str(error))
            image.load = None
        return (torch.from_numpy(pixels[:good]),)


def _finite(features, images):
    """The features of the Images that have finite ones; the other Images get a reason."""
    finite = features.isfinite().all(1)
    if finite.all():
        return features
    for image, good in zip(images, finite.tolist(), strict=True):
        if not good:
            image.reason = "its features are not finite"
    return features[finite]


def passes(batches, images_per_pass):
    """Joins what `features_of` yields until there are so many images: the class rows are read once for each pass."""
    images, parts = [], []
    for chunk, features in batches:
        images += chunk
        parts.append(features)
        if len(images) >= images_per_pass:
            yield images, torch.cat(parts)
            images, parts = [], []
    if images:
        yield images, torch.cat(parts)
