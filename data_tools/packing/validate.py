"""Checks of an image before its bytes are packed: --check of data_tools.pack."""

import struct
import zlib

import numpy as np

from xc.data.images import PNG_CHUNK, decode_plain_jpeg, open_header, open_image

PNG = b"\x89PNG\r\n\x1a\n"
PNG_HEADER = struct.Struct(">IIBBBBB")
PNG_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type: grey, RGB, and both with transparency
CHECKS = ("full", "header", "none")
DARK = 16  # of 255: an image that is nowhere brighter is not recognised


def check_image(data, max_pixels, check):
    """ValueError where the image in data (bytes) cannot be packed.

    full    It decodes, so a reader can decode it, too.
    header  Its type is known, its size is allowed, and it ends as its format says: JPEG, WebP and GIF at their end mark
            or length, PNG with all checksums right. This finds truncated files and other kinds of files. It does not
            find damage inside a JPEG, WebP or GIF, nor too few pixels. Formats without such an end are decoded.
    none    It is not empty.

    Where a reader then meets an image that does not decode, its checksum is right, and the error names the record.
    """
    if check == "none":
        if not data:
            raise ValueError("empty")
    elif check == "full":
        if not _is_plain_png(data, max_pixels) and decode_plain_jpeg(data, max_pixels, only_check=True) is None:
            check_visible(open_image(data, max_pixels, only_check=True))
    elif not _ends_well(open_header(data, max_pixels), data):
        check_visible(open_image(data, max_pixels, only_check=True))


def check_visible(image):
    """ValueError where a reader, which keeps 8 bits, would see nothing in a decoded Pillow image.

    It takes the numbers of deep images for 16 bits, and those of floating-point images for 0 … 255.
    """
    if not image.mode.startswith(("I", "F")):
        return
    pixels = np.asarray(image)
    if image.mode == "F" and not np.isfinite(pixels).all():
        raise ValueError("floating-point numbers that are not finite")
    least, most = float(pixels.min()), float(pixels.max())
    white = 255 if image.mode == "F" else 65535
    if least == most and 0 <= most <= white:
        return  # one colour, as it is
    if least < 0 or most > white or most < DARK * (white + 1) / 256:
        raise ValueError(f"numbers from {least:g} to {most:g}, of which a reader that takes 0 for black and {white} "
                         "for white sees nothing; convert it to 8 bits")


def _is_plain_png(data, max_pixels):
    """Whether these bytes are an 8-bit PNG with nothing but pixels that decodes; False where this cannot tell.

    It takes a quarter of Pillow's time for small images.
    """
    if data[:8] != PNG:
        return False
    place, kind, header, pixels = 8, None, None, []
    try:
        while kind != b"IEND":
            length, kind = PNG_CHUNK.unpack_from(data, place)
            end = place + PNG_CHUNK.size + length
            content = data[place + PNG_CHUNK.size : end]
            if zlib.crc32(data[place + 4 : end]).to_bytes(4, "big") != data[end : end + 4]:
                return False
            if header is None:
                if kind != b"IHDR":
                    return False
                header = PNG_HEADER.unpack(content)
            elif kind == b"IDAT":
                pixels.append(content)
            elif kind != b"IEND":
                return False
            place = end + 4
        width, height, bits, colour, compression, filtering, interlacing = header
        if bits != 8 or (compression, filtering, interlacing) != (0, 0, 0) or not 0 < width * height <= max_pixels:
            return False
        row_bytes = 1 + width * PNG_CHANNELS[colour]
        stream = zlib.decompressobj()
        rows = stream.decompress(b"".join(pixels), row_bytes * height + 1)
    except (struct.error, KeyError, zlib.error):
        return False
    return stream.eof and len(rows) == row_bytes * height and max(rows[::row_bytes]) < 5  # kinds of filters


def _ends_well(image, data):
    """Whether a Pillow image of these bytes ends as its format says; False where that is not known."""
    match image.format:
        case "PNG":
            try:
                image.verify()
            except Exception:  # the error of decoding is clearer
                return False
            return True
        case "JPEG":
            return data.endswith(b"\xff\xd9")
        case "WEBP":
            return int.from_bytes(data[4:8], "little") + 8 == len(data)
        case "GIF":
            return data.endswith(b";")
    return False
