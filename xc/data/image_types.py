"""Formats of images by their first bytes, whatever a file is called."""

import re

HEAD_BYTES = 64  # of a file that image_type needs

# The formats that images.py reads, as Pillow names them.
READ = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MAGIC = ((rb"\x89PNG\r\n\x1a\n", "PNG"), (rb"\xff\xd8\xff", "JPEG"), (rb"RIFF....WEBP", "WEBP"),
          (rb"BM....\0\0\0\0....[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", "BMP"), (rb"GIF8[79]a", "GIF"),
          (rb"II\*\0|MM\0\*|II\+\0|MM\0\+|MM\*\0|II\0\*", "TIFF"), (rb"P[1-6]\s\s*(#|\d)", "PPM"),
          (rb"....ftyp(avif|avis)", "AVIF"), (rb"....ftyp(mif1|msf1|heic|heix|hevc|hevx|heim|heis)", "HEIC"),
          (rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51", "JPEG 2000"),
          (rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
          (rb"8BPS\0[\1\2]", "PSD"), (rb"\0\0[\1\2]\0[^\0]\0", "ICO"), (rb"DDS \x7c\0\0\0", "DDS"))
_PATTERNS = [(re.compile(pattern, re.DOTALL), name) for pattern, name in _MAGIC]


def image_type(head):
    """The format of an image that begins with these bytes, or more; None where it is no image."""
    for pattern, name in _PATTERNS:
        if pattern.match(head):
            return name
    return None
