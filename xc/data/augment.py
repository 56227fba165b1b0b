"""From decoded pixels to the input of a backbone: numbers, and in training a light distortion."""

import math

import torch
import torch.nn.functional as F

from xc.data.hashing import uniform
from xc.data.recycled import RecycledMemory

# Values that are prepared at once. On a CPU the intermediate results stay in cache, in memory that is used again.
PIECE = {"cpu": 2**20, "cuda": 2**24}

_memory = RecycledMemory()  # of batches on CPUs
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and deviation of red, green and blue


def norm_of(text, channels):
    """(means, deviations) of pixels from 0 to 1 in float32 (channels, 1, 1) each, for the flag --input-norm.

    None for `half`, which pixels have without it. ValueError for another text.
    """
    if text == "half":
        return None
    try:
        if text == "imagenet":
            rows = IMAGENET if channels == 3 else [(sum(row) / 3,) for row in IMAGENET]
        else:
            rows = [tuple(map(float, part.split(","))) for part in text.split("/")]
        mean, deviation = (row * channels if len(row) == 1 else row for row in rows)
        if (len(mean), len(deviation)) != (channels, channels) or min(deviation) <= 0:
            raise ValueError
        mean, deviation = torch.tensor([mean, deviation])[..., None, None]
        if not (mean.isfinite() & deviation.isfinite()).all():
            raise ValueError
    except ValueError:
        numbers = "one number" if channels == 1 else f"one number or {channels} with commas between them"
        raise ValueError(f"--input-norm {text} is not allowed: give half, imagenet or MEAN/STD, each of them "
                         f"{numbers}, STD above 0") from None
    return mean, deviation


def prepared(inputs, first_example=0, strength=0.0, seed=0, norm=None):
    """The input of a backbone, float32 (B, *shape), with pixels as numbers in [-1, 1], or as `norm` says.

    inputs                         (B, *shape), from `split.examples`; may be overwritten
    first_example, strength, seed  of `augment`, which distorts images but not vectors
    norm                           of `norm_of`. Images are distorted before it, so with any norm alike
    """
    outputs, is_pixels = inputs, inputs.dtype == torch.uint8
    if is_pixels and inputs.device.type == "cpu":
        outputs = _memory.empty(inputs.shape)
    elif is_pixels:
        outputs = torch.empty(inputs.shape, device=inputs.device)
    size = max(1, PIECE[inputs.device.type] // math.prod(inputs.shape[1:]))
    for output, given in zip(outputs.split(size), inputs.split(size), strict=True):
        if is_pixels:
            output.copy_(given).div_(127.5).sub_(1)
        if strength and output.dim() == 4 and len(output):
            output.copy_(augment(output, first_example, strength, seed))
        if is_pixels and norm:
            mean, deviation = (numbers.to(output) for numbers in norm)
            output.sub_(2 * mean - 1).div_(2 * deviation)
        first_example += len(output)
    return outputs


def augment(images, first_example, strength, seed):
    """Images (B, channels, size, size), each with a light random shift, scale, rotation, blur and contrast.

    first_example  position of the first image in the training sequence; on any rank of any world, the distortion of an
                   example depends on its position and the seed alone
    strength       1: up to 8 % shift, 12 % scale, 8 degrees, half-weight 3x3 blur, 30 % contrast
    """
    u = torch.from_numpy(uniform(seed, first_example, len(images), 6)).to(images) * 2 - 1  # [-1, 1)
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
    weight = (0.5 * soft).clamp(0, 1)[:, None]  # negative for half of the images, which stay sharp
    images = images + weight * (blurred / 9 - images)
    return images * (1 + 0.3 * contrast)[:, None]
