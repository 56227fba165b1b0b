"""Decoding of encoded images: the accepted formats, and pixels as arrays.

Images are untrusted: the number of pixels is checked before anything is decoded. torch is imported only when `decode`
has to resize, since packing uses this file and importing torch takes seconds.
"""

import io
import itertools
import math
import re
import struct

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from xc.data.image_types import HEAD_BYTES, READ, image_type, why_unread

MAX_PIXELS = 200_000_000  # of an image that a reader decodes: 600 MB as RGB
# Of a JPEG. Progressive files have about 10, and libtiff allows 100 as well. A scan of a few bytes can cost as much as
# decoding the whole image. The pattern is the start of the header of a scan: libjpeg fails at any other, and compressed
# data cannot contain it.
MAX_SCANS = 100
SCAN = re.compile(rb"\xff\xda\0[\x08\x0a\x0c\x0e][\1-\4]")
# What Pillow decodes to and `decode` converts. LAB and premultiplied transparency are not among them.
MODES = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "F", "I", "I;16", "I;16B", "I;16L", "I;16N"}
PNG_CHUNK = struct.Struct(">I4s")  # length and kind
PNG_METADATA = {b"iCCP", b"tEXt", b"zTXt", b"iTXt", b"eXIf"}
COLOURS, TILE_WIDTH, TILE_HEIGHT, SAMPLE_FORMAT = 262, 322, 323, 339  # tags of a TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # values of COLOURS and SAMPLE_FORMAT
# Of a JPEG 2000. Each takes 12 kB, however few its pixels. The pattern is the start of its codestream.
MAX_TILES = 2**12
CODESTREAM = re.compile(rb"\xff\x4f\xff\x51(.{4})(.{32})(..)", re.DOTALL)
INTEGERS = {1: 1, 3: 2, 4: 4}  # bytes of the types of its numbers


def open_header(data, max_pixels=MAX_PIXELS):
    """The Pillow image in data (bytes), not decoded yet; ValueError as for open_image."""
    name = image_type(data[:HEAD_BYTES])
    if name not in READ:
        raise ValueError(why_unread(data))
    if name == "AVIF":
        from PIL import AvifImagePlugin  # here, because it loads a large library

        AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else every process that decodes would take all cores
    try:
        image = Image.open(io.BytesIO(data), formats=[name])
    except Exception as error:  # plugins raise all kinds of exceptions for a bad header
        if name == "PNG" and (bare := _without_metadata(data)) is not None:
            return open_header(bare, max_pixels)
        raise ValueError(f"a {name} that Pillow does not read{_reason(error, data, name)}") from error
    if image.format == "PPM" and (data[:2] not in (b"P5", b"P6") or image.tile[0][0] != "raw"):
        # Pillow reads the other kinds in Python, number by number: a hostile one takes minutes.
        raise ValueError("a PPM that is not one of bytes with the maximum 255, or of 16 bits")
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width}×{image.height} pixels, more than {max_pixels}")
    if image.format in ("JPEG", "MPO") and _has_many_scans(data):
        raise ValueError(f"a JPEG of more than {MAX_SCANS} scans, each of which may cost as much as the whole image")
    if image.format == "TIFF" and (pixels := _tiled_pixels(data, image)) > max_pixels:
        raise ValueError(f"{image.width}×{image.height} pixels in tiles of {pixels}, more than {max_pixels}")
    if image.format == "TIFF":
        _check_numbers(image)
    if image.format == "JPEG2000" and _most_tiles(data) > MAX_TILES:
        raise ValueError(f"a JPEG 2000 of more than {MAX_TILES} tiles, each of which takes memory")
    return image


def _reason(error, data, name):
    """": " and why Pillow does not open these bytes. It keeps the reason of a plugin to itself."""
    if isinstance(error, UnidentifiedImageError):
        try:
            Image.OPEN[name][0](io.BytesIO(data), "")
        except Exception as own:
            error = own
    return "" if isinstance(error, UnidentifiedImageError) or not str(error) else f": {error}"


def _check_numbers(tiff):
    """ValueError where Pillow takes the numbers of a TIFF for others than they are."""
    if tiff.mode.startswith(("I", "F")) and tiff.tag_v2.get(COLOURS) == WHITE_IS_ZERO:
        raise ValueError(f"a TIFF whose numbers of mode {tiff.mode} mean darkness (WhiteIsZero), which Pillow would "
                         "read as light; convert it to 8 bits")
    if tiff.mode in ("L", "LA", "RGB") and SIGNED in tiff.tag_v2.get(SAMPLE_FORMAT, ()):
        raise ValueError("a TIFF of signed numbers of 8 bits, which Pillow would read as unsigned; convert it")


def _most_tiles(jpeg2000):
    """The largest number of tiles that a codestream in these bytes announces."""
    most = 0
    for head, sides, num_components in CODESTREAM.findall(jpeg2000):
        length, [components] = int.from_bytes(head[:2], "big"), struct.unpack(">H", num_components)
        if length != 38 + 3 * components:
            continue  # bytes of something else
        right, bottom, _, _, width, height, left, top = struct.unpack(">8I", sides)
        if width and height:
            most = max(most, -(-(right - left) // width) * -(-(bottom - top) // height))
    return most


def _without_metadata(png):
    """A PNG without its texts, colour profile and other metadata, which may be larger than Pillow reads.

    None where it has none of them, or is cut short.
    """
    parts, place, kind = [png[:8]], 8, b""
    while kind != b"IEND":
        if place + 12 > len(png):
            return None
        length, kind = PNG_CHUNK.unpack_from(png, place)
        end = place + 12 + length
        if kind not in PNG_METADATA:
            parts.append(png[place:end])
        place = end
    bare = b"".join(parts)
    return bare if len(bare) < place <= len(png) else None


def _has_many_scans(jpeg):
    return any(itertools.islice(SCAN.finditer(jpeg), MAX_SCANS, None))


def _tiled_pixels(tiff, image):
    """Number of pixels in the tiles of a TIFF; libtiff decodes whole tiles, however far they reach beyond the image.

    ValueError where the table of tags is damaged. If a tag comes twice, Pillow uses the last and libtiff the first;
    here the larger one counts.
    """
    order, is_big = "<" if tiff[:2] == b"II" else ">", b"+" in tiff[2:4]
    count, entry = (struct.Struct(order + one) for one in (("Q", "HHQ8s") if is_big else ("H", "HHI4s")))
    sides = {TILE_WIDTH: 1, TILE_HEIGHT: 1}
    try:
        start = image.tag_v2.offset + count.size
        [num_entries] = count.unpack_from(tiff, start - count.size)
        for tag, kind, _, value in entry.iter_unpack(tiff[start : start + num_entries * entry.size]):
            if tag in sides:
                number = int.from_bytes(value[: INTEGERS[kind]], "little" if order == "<" else "big")
                sides[tag] = max(sides[tag], number)
    except (struct.error, KeyError) as error:
        raise ValueError("a TIFF with a damaged table of tags") from error
    return math.prod(-(-side // tile) * tile for side, tile in zip(image.size, sides.values(), strict=True))


def open_image(data, max_pixels=MAX_PIXELS, only_check=False):
    """The decoded Pillow image in data (bytes).

    only_check  the pixels are not needed: a JPEG is read completely, but decoded at an eighth of its width and height

    ValueError where it is not a complete image of the formats READ, or its header announces more than max_pixels
    pixels; the header is checked before anything is decoded. Of an animation, the first frame is taken.
    """
    image = open_header(data, max_pixels)
    try:
        if only_check and image.format == "JPEG":
            image.draft("L", (image.width // 8 or 1, image.height // 8 or 1))
        image.load()
    except Exception as error:
        if image.format == "PNG" and (bare := _without_metadata(data)) is not None:
            return open_image(bare, max_pixels)
        raise ValueError(f"does not decode: {error}") from error
    if image.mode not in MODES:
        raise ValueError(f"its colours are of mode {image.mode}, which does not convert to RGB")
    return image


def decode(data, size, channels, max_pixels=MAX_PIXELS):
    """(channels, size, size) uint8: the image in data (bytes), resized to a square with antialiasing.

    size      in pixels
    channels  1 (grey) or 3 (RGB); transparency is dropped, 16-bit grey keeps its upper 8 bits

    The pixels are those of Pillow; after bicubic resizing they differ from Pillow's by 1, seldom 3, of 255. ValueError
    as for open_image.
    """
    assert channels in (1, 3), channels
    pixels = _decode_jpeg(data, channels, max_pixels)
    if pixels is None:
        image = open_image(data, max_pixels)
        if image.mode.startswith("I"):  # Pillow would clip 16 bits at 255
            image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
        pixels = _pixels(image, channels)
    if pixels.shape[:2] != (size, size):
        return _resize(pixels, size)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _decode_jpeg(data, channels, max_pixels):
    """(height, width, channels) uint8 of a JPEG without errors; None for any other image."""
    pixels = decode_plain_jpeg(data, max_pixels)
    if pixels is None or pixels.shape[2] == channels:
        return pixels
    return _pixels(Image.fromarray(pixels.squeeze(2) if channels == 3 else pixels), channels)


def decode_plain_jpeg(data, max_pixels, only_check=False):
    """(height, width, 1 or 3) uint8 of a grey or colour JPEG without errors; None for any other image.

    only_check  the pixels are not needed: all is read, but decoded in grey at an eighth of the width and height

    Calls libjpeg-turbo directly: Pillow's overhead takes longer than decoding a small image.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels or colours not in ("Gray", "YCbCr") or _has_many_scans(data):
            return None
        if only_check:
            return simplejpeg.decode_jpeg(data, "GRAY", min_height=-(-height // 8), min_width=-(-width // 8))
        return simplejpeg.decode_jpeg(data, "GRAY" if colours == "Gray" else "RGB")
    except ValueError:  # also where libjpeg only warns: then Pillow decides, and its error says more
        return None


def _pixels(image, channels):
    """(height, width, channels) uint8 of a Pillow image."""
    return np.array(image.convert("L" if channels == 1 else "RGB")).reshape(image.height, image.width, channels)


def _resize(pixels, size):
    """(height, width, channels) uint8 -> (channels, size, size), in a quarter of Pillow's time."""
    import torch  # takes seconds, and packing does not resize here

    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    if len(pixels) > size > pixels.shape[1]:  # torch resizes the rows first: a tall, narrow image would become huge
        image = torch.nn.functional.interpolate(image, (size, pixels.shape[1]), mode="bicubic", antialias=True)
    return torch.nn.functional.interpolate(image, (size, size), mode="bicubic", antialias=True)[0].numpy()
