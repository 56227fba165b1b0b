"""Names of image files by their content."""

import re

SUFFIXES = ((rb"\x89PNG\r\n\x1a\n", "png"), (rb"\xff\xd8\xff", "jpg"), (rb"RIFF....WEBP", "webp"), (rb"BM", "bmp"),
            (rb"GIF8[79]a", "gif"), (rb"II[*+]\0|MM\0[*+]|MM\*\0|II\0\*", "tif"), (rb"P5\s", "pgm"),
            (rb"P6\s", "ppm"))


def suffix_of(image):
    """Suffix for a file with these bytes; ValueError where they have no format that packs may have."""
    for pattern, suffix in SUFFIXES:
        if re.match(pattern, image, re.DOTALL):
            return suffix
    raise ValueError("not an image of a known format")
