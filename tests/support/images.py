"""Images, trees of them, and bytes that are none."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

CLASSES = {"b": 5, "a/x": 11, "a/y": 1, "c 10": 7, "ü": 4}  # name: number of images


def picture(seed, format="PNG", size=(6, 5), mode="RGB"):
    """The bytes of an image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, format)
    return file.getvalue()


def write_tree(folder, classes=CLASSES, first=0, reverse=False):
    """Write so many images of each class, all different; returns {path: bytes}."""
    names = [f"{name}/{i}.png" for name, count in classes.items() for i in range(count)]
    files = {name: picture(first + i) for i, name in enumerate(names)}
    for name, data in sorted(files.items(), reverse=reverse):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return files


def by_class(files):
    """{bytes: class name} of {path: bytes}."""
    return {data: name.rpartition("/")[0] for name, data in files.items()}


def png(width, height, num_bytes, *more):
    """A grey PNG that has so many bytes of pixels, whatever its size says, and `more` chunks (kind, data)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
            + b"".join(chunk(*part) for part in more) + chunk(b"IDAT", zlib.compress(bytes(num_bytes)))
            + chunk(b"IEND", b""))


BAD_IMAGES = {
    "cut.png": picture(1, size=(40, 40))[:-900], "cut.jpg": picture(2, "JPEG", (40, 40))[:-500], "empty.png": b"",
    "text.gif": b"hello", "cut.bmp": picture(3, "BMP", (40, 40))[:-500], "huge.png": png(60000, 50000, 1000),
    "cut.webp": picture(4, "WEBP", (40, 40))[:-300], "cut.tif": picture(5, "TIFF", (40, 40))[:-500]}


def smooth(format, size=(60, 40), mode="RGB"):
    """The bytes of an image whose colours change slowly."""
    x, y = np.meshgrid(np.linspace(0, 200, size[0]), np.linspace(0, 200, size[1]))
    file = io.BytesIO()
    image = Image.fromarray(np.stack([x, y, 220 - x], 2).astype(np.uint8))
    if mode == "I;16":  # convert would leave the numbers below 256
        image = Image.fromarray(np.asarray(image.convert("L"), np.uint16) * 257)
    elif mode in ("RGBa", "La"):
        image = image.convert(mode[:-1] + "A").convert(mode)
    else:
        image = image.convert(mode)
    image.save(file, format)
    return file.getvalue()


IMAGE_KINDS = [
    ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "L"), ("PNG", "LA"), ("PNG", "1"), ("JPEG", "RGB"),
    ("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGB"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("GIF", "P"), ("TIFF", "F"),
    ("AVIF", "RGB"), ("JPEG2000", "RGB"), ("JPEG2000", "LA"), ("TIFF", "CMYK"),
    ("TIFF", "I;16")]


def with_checksums(png):
    """A PNG whose chunks have the checksums of their contents."""
    result, place = bytearray(png[:8]), 8
    while place + 12 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        chunk = png[place + 4 : place + 8 + length]
        result += png[place : place + 4] + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        place += 12 + length
    return bytes(result + png[place:])
