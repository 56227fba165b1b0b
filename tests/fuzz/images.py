"""Images of every format, and trees of them."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import data_tools.pack
from data_tools.packing import encode as encoding
from data_tools.packing.validate import CHECKS, check_image
from tests.fuzz.case import Finding, command
from tests.fuzz.changes import TEXTS, change_bytes, one_of
from tests.support.images import with_checksums
from xc.data import images, pack


def make_images(folder):
    """One of every kind, 9 × 7."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    color = Image.fromarray(pixels)
    grey, palette, alpha = color.convert("L"), color.convert("P"), color.convert("RGBA")
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    blobs = {"exif": exif, "icc_profile": b"profile" * 9}
    frames = {"save_all": True, "append_images": [color.rotate(90), color], "duration": 3}
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
    whole, real = Image.fromarray(pixels[..., 0].astype(np.int32)), Image.fromarray(pixels[..., 0].astype(np.float32))
    for number, (image, kind, options) in enumerate([
            (color, "png", blobs), (deep, "png", {}), (palette, "png", {"transparency": 3}), (alpha, "png", frames),
            (grey.convert("1"), "png", {}), (color, "jpeg", blobs), (grey, "jpeg", {"progressive": True}),
            (color.convert("CMYK"), "jpeg", {}), (color, "webp", blobs), (alpha, "webp", {"lossless": True}),
            (color, "webp", frames), (color, "bmp", {}), (palette, "bmp", {}), (palette, "gif", {"transparency": 1}),
            (color, "gif", frames), (color, "tiff", blobs), (deep, "tiff", {}),
            (whole, "tiff", {}), (real, "tiff", {}), (color.convert("YCbCr"), "tiff", {"compression": "jpeg"}),
            *((color, "tiff", {"compression": name})
              for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")),
            (grey.convert("1"), "tiff", {"compression": "group4"}), (color, "tiff", frames)]):
        image.save(folder / f"{number:02d}.{kind}", kind.upper(), **options)


def change_image(random, folder):
    """Change one image, and let the checksums of a PNG be right again; the others go."""
    path = one_of(random, folder)
    for other in folder.iterdir():
        if other != path:
            other.unlink()
    change_bytes(random, path)
    if path.suffix == ".png" and random.randrange(4):
        path.write_bytes(with_checksums(path.read_bytes()))


def read_images(folder, out):
    for path in sorted(folder.iterdir()):
        for channels in 1, 3:
            pixels = images.decode(path.read_bytes(), 16, channels, max_pixels=2**22)
            assert pixels.shape == (channels, 16, 16) and pixels.dtype == np.uint8
        for check in CHECKS:
            try:
                check_image(path.read_bytes(), 2**22, check)
            except ValueError as error:
                if "sees nothing" in str(error) or "not finite" in str(error):
                    continue  # deep numbers that decode to black or white
                raise Finding(f"--check {check} refuses what decodes: {error}") from error
        image = images.open_image(path.read_bytes(), max_pixels=2**22)
        for kind in encoding.FORMATS:
            images.open_image(encoding.Encoding(5, kind).apply(image, b""))


def make_tree(folder):
    for number in range(12):
        path = folder / ("test" if number % 4 == 3 else "train") / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * number, np.uint8)).save(path)


def change_tree(random, folder):
    """Odd names, links, pipes and images that are none."""
    folders = sorted(path for path in folder.rglob("*") if path.is_dir())
    for _ in range(random.randint(1, 4)):
        images = sorted(path for path in folder.rglob("*") if path.is_file())
        if not images:
            return
        path, place, kind = random.choice(images), random.choice(folders), random.randrange(9)
        name = random.choice(TEXTS).replace("\0", "").replace("/", "_")[:200] or "x"
        target = os.path.join(place, os.fsdecode(name.encode(errors="surrogateescape")) + random.choice(("", ".png")))
        with contextlib.suppress(OSError):
            if kind == 0:
                os.rename(path, target)
            elif kind == 1:
                os.rename(place, target)
            elif kind == 2:
                os.symlink(random.choice((".", "..", "/", "/etc/hostname", "/dev/zero", "nowhere", target)), target)
            elif kind == 3:
                os.mkfifo(target)
            elif kind == 4:
                Path(target).write_bytes(b"")
            elif kind == 5:
                os.makedirs(os.path.join(target, *("d",) * random.choice((1, 5, 60))), exist_ok=True)
            elif kind == 6:
                change_bytes(random, path)
            elif kind == 7:
                os.link(path, target)
            else:
                shutil.rmtree(place)


def read_tree(folder, out):
    command(data_tools.pack.main, folder, out / "packs", "--workers", 0, "--max-skipped", "50%")
    assert all(one.verify() for one in pack.open_splits(out / "packs").values())
