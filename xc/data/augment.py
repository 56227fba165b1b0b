"""From decoded pixels to what a backbone takes: numbers, and a light distortion in training."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from xc.data.hashing import GOLDEN, mix

# Values that are prepared at once. CPU: what they become on the way stays in caches, and memory is not new each time.
PIECE = {"cpu": 2**20, "cuda": 2**24}


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
