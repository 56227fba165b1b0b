"""Formats of images by their first bytes, whatever a file is called."""

import re

HEAD_BYTES = 64  # of a file that image_type needs

_MAGIC = {
    "PNG": rb"\x89PNG\r\n\x1a\n", "JPEG": rb"\xff\xd8\xff", "WEBP": rb"RIFF....WEBP", "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "TIFF": rb"II\*\0|MM\0\*|II\+\0|MM\0\+|MM\*\0|II\0\*", "PPM": rb"P[1-6fF]\s+(?:#|\d+\s+(?:#|\d+\s))",
    # The brand may be that of the container alone, and the codec among the brands that it is compatible with.
    "AVIF": rb"....ftyp(?:avi[fs]|m(?:if|sf)1.{4}(?:.{4}){0,10}?avi[fs])",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "HEIC": rb"....ftyp(?:m(?:if|sf)[12]|hei[cxms]|hev[cxms])", "CR3": rb"....ftypcrx ",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "PSD": rb"8BPS\0[\1\2]", "ICO": rb"\0\0\x01\0[^\0]\0", "DDS": rb"DDS \x7c\0\0\0", "OpenEXR": rb"\x76\x2f\x31\x01",
    "SVG": rb"\s*(?:<\?xml[^>]*>\s*)?<svg[\s>]"}
# Those that images.py reads, by Pillow's names. An icon may hold an image of any size, whatever its header says.
READ = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_PATTERN = re.compile(b"|".join(b"(%s)" % pattern for pattern in _MAGIC.values()), re.DOTALL)
_NAMES = tuple(_MAGIC)

_OTHERS = ((rb"\0\x05\x16\x07", "what macOS keeps beside a file"),
           (rb"\0\0\0\x01Bud1|\xd0\xcf\x11\xe0", "a file of a file manager"),
           (rb"\s*<(!doctype html|html|head|body)", "an HTML page"), (rb"\s*<\?xml", "an XML file"),
           (rb"\s*[{\[]\s*[\"{\[}\]]", "a JSON file"), (rb"%PDF", "a PDF"), (rb"%!PS", "PostScript"),
           (rb"\x93NUMPY", "a NumPy array"), (rb"\x89HDF\r\n", "an HDF5 file"), (rb"PK\x03\x04", "a zip file"),
           (rb"\x1f\x8b", "a gzip file"), (rb"....ftyp|\x1a\x45\xdf\xa3|RIFF....AVI ", "a video"),
           (rb"version https://git-lfs", "a pointer of git-lfs; fetch the file itself"),
           (rb"[\t\n\r\x20-\x7e]+\Z", "a text"))


def image_type(head):
    """The format of an image that begins with these bytes, or more; None where it is no image."""
    match = _PATTERN.match(head)
    return _NAMES[match.lastindex - 1] if match else None


def why_unread(data):
    """Why these bytes, whose format is none of READ, are not read as an image, for a message."""
    head = data[:HEAD_BYTES]
    if (name := image_type(head)) is not None:
        return f"{name}, which is not read; convert it to PNG or JPEG"
    for pattern, what in _OTHERS:
        if re.match(pattern, head, re.DOTALL | re.IGNORECASE):
            return f"not an image, but {what}"
    if data.count(0) == len(data):
        return "not an image, but zeros" if data else "empty: no image"
    return "not an image of a known format"
