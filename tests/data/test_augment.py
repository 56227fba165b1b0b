"""Augmentation is light and a function of the example."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xc.comm.world import World
from xc.config import Config
from xc.data.augment import augment, norm_of, prepared
from xc.data.hashing import uniform
from xc.data.loader import Loader, open_splits


def test_augmentation_is_light_seeded_and_can_be_off(tiny_packs):
    def inputs(**settings):
        cfg = Config(data=str(tiny_packs), out="x", **settings)
        [[[found, _]]] = [Loader(open_splits(cfg)["train"], cfg, World()).train(26, 39, 13).take(1)]
        return found

    assert not torch.equal(inputs(), inputs(augment=0.0)) and not torch.equal(inputs(), inputs(seed=1))
    images = torch.randn(50, 1, 32, 32)
    torch.testing.assert_close(augment(images, 0, 1e-6, 0), images, atol=1e-3, rtol=0)
    again = augment(images[20:], 20, 1.0, 3)
    torch.testing.assert_close(augment(images, 0, 1.0, 3)[20:], again)


@pytest.mark.parametrize("shape", [(5, 3, 9, 9), (0, 1, 4, 4), (4, 6)])
def test_pixels_become_numbers_from_minus_one_to_one(shape):
    pixels = torch.randint(256, shape, dtype=torch.uint8)
    assert torch.equal(prepared(pixels), pixels.float() / 127.5 - 1)
    numbers = torch.randn(shape)
    assert torch.equal(prepared(numbers.clone()), numbers)
    if len(shape) == 4:
        assert torch.equal(prepared(numbers.clone(), 11, 0.5, 3), augment(numbers, 11, 0.5, 3))
    else:
        assert torch.equal(prepared(numbers.clone(), 11, 0.5, 3), numbers)  # vectors are not distorted


@pytest.mark.parametrize("shape", [(5, 1, 32, 32), (3, 3, 9, 9), (0, 1, 8, 8)])
def test_augmentation_is_an_affine_map_a_blur_and_a_factor(shape):
    images = torch.randn(shape)
    u = torch.from_numpy(uniform(9, 100, len(images), 6)).float() * 2 - 1
    turn, zoom = math.radians(8) * u[:, 3], 1 + 0.12 * u[:, 2]
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    theta = torch.stack([cos, -sin, 0.16 * u[:, 0], sin, cos, 0.16 * u[:, 1]], 1).reshape(-1, 2, 3)
    moved = images
    if len(images):
        grid = F.affine_grid(theta, shape, align_corners=False)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    weight, factor = (0.5 * u[:, 4]).clamp(0, 1), 1 + 0.3 * u[:, 5]
    expected = (moved + weight[:, None, None, None] * (soft - moved)) * factor[:, None, None, None]
    torch.testing.assert_close(augment(images, 100, 1.0, 9), expected, atol=1e-4, rtol=0)


def test_uniform_numbers():
    u = uniform(3, 0, 20000, 6)
    assert u.min() >= 0 and u.max() < 1
    assert np.allclose(u.mean(0), 0.5, atol=0.01) and np.allclose(u.var(0), 1 / 12, atol=0.003)
    assert np.abs(np.corrcoef(u.T) - np.eye(6)).max() < 0.03  # columns
    assert abs(np.corrcoef(u[1:, 0], u[:-1, 0])[0, 1]) < 0.03  # neighbours
    assert abs(np.corrcoef(u[:, 0], uniform(4, 0, 20000, 6)[:, 0])[0, 1]) < 0.03  # seeds


@pytest.mark.parametrize("text, channels, mean, deviation", [
    ("imagenet", 3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), ("imagenet", 1, [0.449], [0.226]),
    ("0.1/0.3", 3, [0.1] * 3, [0.3] * 3), ("0.1,0.2,0/1,2,3", 3, [0.1, 0.2, 0], [1, 2, 3])])
def test_pixels_are_normed_as_said(text, channels, mean, deviation):
    """With the distortion that they have without it."""
    pixels = torch.randint(256, (5, channels, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, deviation = (torch.tensor(numbers)[:, None, None] for numbers in (mean, deviation))
    norm = norm_of(text, channels)
    torch.testing.assert_close(prepared(pixels.clone(), norm=norm), (pixels / 255 - mean) / deviation)
    distorted = (prepared(pixels.clone(), 11, 1.0, 3) + 1) / 2
    torch.testing.assert_close(prepared(pixels.clone(), 11, 1.0, 3, norm), (distorted - mean) / deviation)
    vectors = torch.randn(4, 6)
    assert torch.equal(prepared(vectors.clone(), norm=norm), vectors)


def test_half_is_what_pixels_have_without_a_norm():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert norm_of("half", 1) is None
    assert torch.equal(prepared(pixels.clone()), prepared(pixels.clone(), norm=norm_of("0.5/0.5", 1)))
    torch.testing.assert_close(prepared(pixels.clone()), (pixels / 255 - 0.5) / 0.5)


@pytest.mark.parametrize("text, channels", [
    ("", 3), ("caffe", 3), ("0.5", 3), ("0.5/0", 3), ("0.5/-1", 1), ("nan/1", 1), ("0.5/inf", 1), ("1,2/1,2", 3),
    ("1,2,3/1,2,3", 1), ("1/2/3", 3), ("1,/1", 3)])
def test_another_norm_is_one_line(text, channels):
    with pytest.raises(ValueError, match="is not allowed: give half, imagenet or MEAN/STD") as error:
        norm_of(text, channels)
    assert "\n" not in str(error.value)
