"""Makes a set of small colour pictures that are photographs in kind: two textured objects before a random scene.

    python benchmarks/photo_like.py data/photo_like [--classes 800] [--train 20] [--test 10] [--seed 0]
    python -m data_tools.pack data/photo_like data/photo_like.pack

A class is a pair of objects out of a quarter as many, each of which is in several classes. An object has an outline (a
random Fourier series of the radius), a pattern (stripes, checks, rings or spots of a frequency) and two colours. What
differs between the pictures of a class: place, size, turn and tilt of each object and which of them is in front; the
background (a cloud of two colours), light (strength, colour, a gradient, a shade of the objects), a bar in the way, the
sharpness, and noise. Train and test are drawn alike. The images are PNGs of 32 x 32 pixels, FOLDER/train/CLASS/*.png
and FOLDER/test/CLASS/*.png. Each follows from the seed, its class and its number alone.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from PIL import Image

SIZE, FINE = 32, 64  # pixels of a side: of a picture, and as it is drawn
_ACROSS = (2 * np.arange(FINE) + 1) / FINE - 1
GRID = np.stack(np.meshgrid(_ACROSS, _ACROSS))  # (2, FINE, FINE) x and y from -1 to 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--classes", type=int, default=800)
    parser.add_argument("--train", type=int, default=20, help="pictures of a class")
    parser.add_argument("--test", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    objects = [random_object(np.random.default_rng([args.seed, 1, i])) for i in range(max(2, args.classes // 4))]
    for number, pair in enumerate(random_pairs(args.classes, len(objects), args.seed)):
        for i in range(args.train + args.test):
            folder = args.folder / ("train" if i < args.train else "test") / f"scene{number:04d}"
            folder.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng([args.seed, 2, number, i])
            Image.fromarray(picture([objects[k] for k in pair], rng)).save(folder / f"{i:03d}.png")


def random_pairs(classes, objects, seed):
    """Different pairs of objects, one for each class."""
    pairs = [(a, b) for a in range(objects) for b in range(a)]
    chosen = np.random.default_rng([seed, 0]).choice(len(pairs), classes, replace=False)
    return [pairs[k] for k in chosen]


def random_object(rng):
    """What all pictures of an object share."""
    return {"waves": rng.normal(0, 0.16, (2, 5)) / np.arange(1, 6) ** 0.5, "pattern": int(rng.integers(4)),
            "frequency": rng.uniform(4, 11), "angle": rng.uniform(0, np.pi), "colours": rng.uniform(0.05, 0.95, (2, 3))}


def picture(things, rng):
    """One picture, uint8 (SIZE, SIZE, 3), of the objects of a class."""
    image = cloud(rng)[..., None] * (rng.uniform(0, 1, 3) - (start := rng.uniform(0, 1, 3))) + start
    side, height = rng.uniform(0.25, 0.5), rng.uniform(-0.35, 0.35)
    places = [(-side, height), (side, -height)]
    order = [0, 1] if rng.random() < 0.5 else [1, 0]
    for k in order:
        inside, colour = seen(things[k], places[k], rng)
        image += inside[..., None] * (colour - image)
    if rng.random() < 0.5:  # a bar in the way
        turn = rng.uniform(0, np.pi)
        across = GRID[0] * np.cos(turn) + GRID[1] * np.sin(turn) - rng.uniform(-0.8, 0.8)
        image[np.abs(across) < rng.uniform(0.05, 0.15)] = rng.uniform(0, 1, 3)
    light = 1 + rng.uniform(-0.3, 0.3, 2) @ GRID.reshape(2, -1)
    image *= light.reshape(FINE, FINE, 1) * rng.uniform(0.5, 1.2) * rng.uniform(0.8, 1.2, 3)
    image = image.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    if rng.random() < 0.5:  # out of focus
        wide = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        image = (wide[:-2, 1:-1] + wide[2:, 1:-1] + wide[1:-1, :-2] + wide[1:-1, 2:] + image) / 5
    image += rng.normal(0, rng.uniform(0.01, 0.06), image.shape)
    return (255 * image.clip(0, 1)).round().astype(np.uint8)


def seen(thing, place, rng):
    """(mask (FINE, FINE), colours (FINE, FINE, 3)) of an object from a random viewpoint."""
    size, turn, tilt = rng.uniform(0.35, 0.65), rng.uniform(-0.6, 0.6), rng.uniform(0.65, 1)
    x, y = (GRID - (np.array(place) + rng.uniform(-0.15, 0.15, 2))[:, None, None]) / size
    x, y = (x * np.cos(turn) - y * np.sin(turn)) / tilt, x * np.sin(turn) + y * np.cos(turn)
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    waves = np.arange(1, 6)[:, None, None] * angle
    of_cosines, of_sines = thing["waves"]
    outline = 0.85 + np.tensordot(of_cosines, np.cos(waves), 1) + np.tensordot(of_sines, np.sin(waves), 1)
    along = x * np.cos(thing["angle"]) + y * np.sin(thing["angle"])
    other = y * np.cos(thing["angle"]) - x * np.sin(thing["angle"])
    f = thing["frequency"]
    wave = (np.sin(f * along), np.sin(f * along) * np.sin(f * other), np.sin(f * radius),
            np.maximum(np.sin(f * along), np.sin(f * other)) - 0.5)[thing["pattern"]]
    first, second = thing["colours"]
    colour = second + (1 / (1 + np.exp(-6 * wave)))[..., None] * (first - second)
    shade = 1 - rng.uniform(0, 0.5) * np.clip(x * rng.choice([-1, 1]) + y, -1, 1)
    return (radius < outline).astype(float), colour * shade[..., None]


def cloud(rng):
    """Smooth noise (FINE, FINE) from 0 to 1: waves with amplitudes that fall with their frequency."""
    total = np.zeros((FINE, FINE))
    for _ in range(12):
        frequency, turn = rng.uniform(1, 14), rng.uniform(0, 2 * np.pi)
        total += np.sin(frequency * (GRID[0] * np.cos(turn) + GRID[1] * np.sin(turn)) + rng.uniform(0, 7)) / frequency
    return (total - total.min()) / np.ptp(total)


if __name__ == "__main__":
    main()
