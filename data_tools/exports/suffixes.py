"""Names of image files by their content."""

from xc.data.image_types import HEAD_BYTES, image_type

SUFFIXES = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "TIFF": "tif", "AVIF": "avif",
            "JPEG2000": "jp2"}


def suffix_of(image):
    """Suffix for a file with these bytes; ValueError where they have no format that packs may have."""
    name = image_type(image[:HEAD_BYTES])
    if name == "PPM":
        return {b"P5": "pgm", b"P6": "ppm"}.get(image[:2], "pnm")
    if name not in SUFFIXES:
        raise ValueError("not an image of a known format")
    return SUFFIXES[name]
