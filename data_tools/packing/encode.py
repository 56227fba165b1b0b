"""Images encoded anew: smaller, or in another format."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

FORMATS = ("jpeg", "png", "webp", "raw")
RAW = "ppm"  # the header and the pixels, nothing else: Netpbm's binary formats, P5 of grey and P6 of RGB


@dataclass(frozen=True)
class Encoding:
    """side  pixels that the shorter side has at most; format  one of FORMATS, None: that of the image, png where it is
    none of them; quality  1 … 100, of jpeg and webp. None of all: images stay as they are.

    raw  uncompressed pixels, written anew whatever they were
    """

    side: int | None = None
    format: str | None = None
    quality: int | None = None

    def apply(self, image, data):
        """The bytes of a decoded Pillow image, which are `data` where nothing is to be done.

        What the reader of packs would drop goes: metadata, further frames, the lower bits of 16, and of jpeg and raw
        transparency. ValueError where the format does not take the image.
        """
        shorter = min(image.size)
        smaller = self.side is not None and shorter > self.side
        kept = {"MPO": "jpeg"}.get(image.format, image.format.lower())  # MPO: a JPEG with further pictures behind it
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
                image.save(file, format, quality=self.quality or 90, exact=True)  # exact: also what is transparent
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot be written as {format}: {error}") from error
        return file.getvalue()


def _resized(image, sides):
    # Pillow would weigh colours by what shows of them and make black what is hidden, but the reader drops transparency.
    if image.mode in ("LA", "RGBA"):
        return Image.merge(image.mode, [_resized(band, sides) for band in image.split()])
    return image.resize(sides, Image.Resampling.BICUBIC)


def _plain(image, with_alpha):
    """The image in 8 bits of grey or RGB, or these with transparency."""
    if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if with_alpha and (image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info):
        return image.convert("LA" if image.mode == "LA" else "RGBA")
    return image.convert("L" if image.mode in ("1", "L", "LA", "F") else "RGB")
