"""Encodes images again: smaller, in another format, or with another quality."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

FORMATS = ("jpeg", "png", "webp", "raw")
RAW = "ppm"  # the header and the pixels, nothing else: Netpbm's binary formats, P5 of grey and P6 of RGB


@dataclass(frozen=True)
class Encoding:
    """How images are encoded; images keep their bytes if all is None.

    side     most pixels of the shorter side
    format   one of FORMATS; raw: uncompressed pixels, always encoded again; None: the image's own, else png
    quality  1 … 100, for jpeg and webp
    """

    side: int | None = None
    format: str | None = None
    quality: int | None = None

    def apply(self, image, data):
        """The bytes of a decoded Pillow image; `data` itself where nothing changes.

        Anything that the reader of packs ignores is dropped: metadata, further frames, the lower 8 of 16 bits, and in
        jpeg and raw transparency. ValueError where the format cannot hold the image.
        """
        shorter = min(image.size)
        smaller = self.side is not None and shorter > self.side
        kept = {"MPO": "jpeg"}.get(image.format, image.format.lower())  # MPO: a JPEG with further pictures after it
        format = self.format or (kept if kept in FORMATS else "png")
        if not smaller and self.quality is None and self.format in (None, kept):
            return data
        image = _plain(image, with_alpha=format not in ("jpeg", "raw"))
        if smaller:
            sides = [max(1, round(side * self.side / shorter)) for side in image.size]
            image = _resized(image, sides)
        file = io.BytesIO()
        try:
            if format in ("png", "raw"):
                image.save(file, RAW if format == "raw" else format)
            else:
                image.save(file, format, quality=self.quality or 90, exact=True)  # exact: hidden colours, too
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot be written as {format}: {error}") from error
        return file.getvalue()


def _resized(image, sides):
    # Pillow would weight colours by their opacity and make hidden ones black, but the reader drops transparency.
    if image.mode in ("LA", "RGBA"):
        return Image.merge(image.mode, [_resized(band, sides) for band in image.split()])
    return image.resize(sides, Image.Resampling.BICUBIC)


def _plain(image, with_alpha):
    """The image in 8-bit grey or RGB, with transparency if with_alpha."""
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if with_alpha and (image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info):
        return image.convert("LA" if image.mode == "LA" else "RGBA")
    return image.convert("L" if image.mode in ("1", "L", "LA", "F") else "RGB")
