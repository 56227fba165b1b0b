"""Decoding of images: the pixels are those of Pillow, and what is damaged or too large is refused."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

import xc.data.images
from tests.support.images import BAD_IMAGES, IMAGE_KINDS, picture, png, smooth
from xc.data import images as pack
from xc.data.images import decode, open_header, open_image


def test_decode_shapes_and_values():
    rows = np.arange(0, 240, 10, dtype=np.uint8).reshape(4, 6)
    file = io.BytesIO()
    Image.fromarray(rows).save(file, "PNG")
    with Image.open(io.BytesIO(file.getvalue())) as image:
        square = np.asarray(image.resize((8, 8), Image.Resampling.BICUBIC))
    assert np.array_equal(decode(file.getvalue(), 8, 1), square[None])
    assert np.array_equal(decode(file.getvalue(), 8, 3), np.stack([square] * 3))
    for mode, format in [("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("LA", "PNG")]:
        for channels in (1, 3):
            image = decode(picture(0, format, (9, 5), mode), 7, channels)
            assert image.shape == (channels, 7, 7) and image.dtype == np.uint8 and image.flags.c_contiguous
    same = decode(picture(0, size=(6, 6)), 6, 3)
    assert np.array_equal(same, np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8).transpose(2, 0, 1))


def pillows(data, size, channels):
    """What decode gives, by Pillow alone."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("L" if channels == 1 else "RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, -1).transpose(2, 0, 1)


@pytest.mark.parametrize("mode, options", [("RGB", {}), ("RGB", {"subsampling": 0, "quality": 95}), ("L", {}),
                                           ("RGB", {"progressive": True}), ("RGB", {"keep_rgb": True}), ("CMYK", {}),
                                           ("RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0"
                                                            b"\x06\0\0\0\0\0\0\0"})])  # turned by a quarter
@pytest.mark.parametrize("channels", [1, 3])
def test_jpegs_decode_as_by_pillow(mode, options, channels):
    for size in (17, 64):
        file = io.BytesIO()
        smooth = Image.fromarray(np.random.default_rng(size).integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth.resize((size, size)).convert(mode).save(file, "JPEG", **options)
        assert np.array_equal(decode(file.getvalue(), size, channels), pillows(file.getvalue(), size, channels))


@pytest.mark.parametrize("format, mode", [("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGB"), ("PNG", "L")])
def test_stretched_images_are_those_of_pillow(format, mode):
    for shape in [(60, 50), (7, 500), (500, 7), (3, 4), (1, 1), (33, 32)]:
        data = picture(1, format, shape, mode)
        for size, channels in [(32, 1), (32, 3), (9, 3)]:
            apart = abs(decode(data, size, channels).astype(int) - pillows(data, size, channels))
            assert apart.max() <= 3 and apart.mean() < 0.3, (shape, size)


def test_a_damaged_jpeg_is_refused_or_is_what_pillow_makes_of_it():
    whole, refused = picture(2, "JPEG", (40, 40)), 0
    numbers = np.random.default_rng(0)
    spoilt = [whole[:length] for length in range(0, len(whole), 97)]
    for place in numbers.integers(2, len(whole), 200):
        spoilt.append(whole[:place] + bytes([numbers.integers(256)]) + whole[place + 1 :])
    for data in spoilt:
        try:
            expected = pillows(xc.data.images.open_image(data) and data, 40, 3)
        except ValueError:
            refused += 1
            with pytest.raises(ValueError):
                decode(data, 40, 3)
        else:
            assert abs(decode(data, 40, 3).astype(int) - expected).max() <= 2
    assert 10 < refused < len(spoilt) - 10


def test_a_jpeg_too_large_is_refused_by_its_header():
    data = bytearray(picture(2, "JPEG", (40, 40)))
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", 65000, 65000)
    with pytest.raises(ValueError, match="65000×65000 pixels, more than"):
        decode(bytes(data), 8, 3)
    assert decode(picture(2, "JPEG", (40, 40)), 8, 3, max_pixels=1600).shape == (3, 8, 8)
    with pytest.raises(ValueError, match="40×40 pixels, more than 1599"):
        decode(picture(2, "JPEG", (40, 40)), 8, 3, max_pixels=1599)


def test_decode_averages_when_it_shrinks():
    file = io.BytesIO()
    Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).save(file, "PNG")
    assert abs(decode(file.getvalue(), 8, 1).astype(int) - 127).max() < 20  # without antialiasing: 0 and 255


def test_decode_keeps_the_upper_bits_of_16():
    values = np.array([[0, 255, 256], [40000, 65280, 65535], [1, 2, 3]], np.uint16)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    assert np.array_equal(decode(file.getvalue(), 3, 1)[0], values >> 8)


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_decode_refuses(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="pixels" if name == "huge.png" else "image|decode"):
            decode(BAD_IMAGES[name], 8, 3)


def test_no_warning_for_large_images_that_are_allowed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="does not decode"):  # the header passes, there is just no data
            decode(png(20000, 20000, 1000), 8, 1, max_pixels=10**9)


@pytest.mark.parametrize("data", [b"P3\n1 1\n255\n1 2 3\n", b"P2 1 1 255 7", b"P1 1 1 1", b"P4 1 1 \1",
                                  b"Pf 1 1 1 abcd", b"P6 1 1 254 abc", b"P5 1 1 1 \1"])
def test_pixels_that_take_minutes_to_read_are_refused(data):
    with pytest.raises(ValueError, match="a PPM that is not one of bytes"):
        open_image(data)


@pytest.mark.parametrize("mode", ["LAB"])
def test_an_image_that_packs_also_decodes(mode):
    file = io.BytesIO()
    Image.new("RGB", (3, 3)).convert(mode).save(file, "TIFF")
    with pytest.raises(ValueError, match="does not convert"):
        pack.open_image(file.getvalue())


@pytest.mark.parametrize("kind, mode", IMAGE_KINDS)
def test_what_is_read_is_recognised(kind, mode):
    """The pixels are those of the image that was written, whatever its format, but for what the format loses."""
    data, name = smooth(kind, mode=mode), dict.fromkeys(("I;16", "F", "L", "LA", "1"), "L").get(mode, "RGB")
    original = Image.open(io.BytesIO(smooth("PNG"))).convert(name)
    found = decode(data, 40, len(name)).astype(int)
    wanted = np.asarray(original.resize((40, 40), Image.Resampling.BICUBIC), int).reshape(40, 40, -1).transpose(2, 0, 1)
    # Black and white pixels and a palette differ from the original one by one, and not on average.
    apart = abs(found.mean() - wanted.mean()) if mode == "1" else abs(found - wanted).mean()
    assert apart < (8 if mode == "P" else 3)


@pytest.mark.parametrize("kind, mode, words", [("TIFF", "LAB", "mode LAB"), ("ICO", "RGB", "ICO, which is not read"),
                                               ("DDS", "RGBA", "DDS, which is not read"),
                                               ("TGA", "RGB", "not an image of a known format"),
                                               ("PDF", "RGB", "not an image, but a PDF"),
                                               ("EPS", "RGB", "not an image, but PostScript")])
def test_what_is_not_read_is_named(kind, mode, words):
    with pytest.raises(ValueError, match=words):
        open_image(smooth(kind, mode=mode))


@pytest.mark.parametrize("data, words", [
    (b"", "empty"), (b"\0" * 99, "zeros"), (b"\n<!DOCTYPE html><html>", "an HTML page"),
    (b'<?xml version="1.0"?>', "an XML"), (b'{"error": 404}', "a JSON"), (b"\0\0\0\x18ftypisom", "a video"),
    (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC, which is not"),
    (b"\xff\x0a\x12\x13", "JPEG XL"), (b"version https://git-lfs.github.com/spec/v1\noid", "git-lfs"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'>", "SVG, which is not read"), (b"BM is how this begins" * 9, "a text"),
    (b"P5 is how this begins" * 9, "a text"), (b"P5 4 apples and 7 pears", "a text"),
    (b"\0" * 99 + b"\1", "known format"),
    (b"\0\x05\x16\x07\0\2\0\0Mac OS X", "macOS"), (b"\0\0\0\x18ftypcrx \0\0\0\1", "CR3, which is not"),
    (b"\x89PNG\r\n\x1a\n" + bytes(30), "a PNG that Pillow does not read: "),
    (b"\x07\x01" * 40, "not an image of a known format")])
def test_why_a_file_is_not_read(data, words):
    with pytest.raises(ValueError, match=words):
        open_image(data)


LABELS = {b"iCCP": b"a\0\0", b"zTXt": b"a\0\0", b"iTXt": b"XML:com.adobe.xmp\0\1\0\0\0"}


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
@pytest.mark.parametrize("num_chunks", [1, 70])
def test_metadata_of_a_png_may_be_large(kind, num_chunks):
    """More than Pillow reads; the pixels are fine."""
    bare, content = png(4, 4, 4 * 5), LABELS[kind] + zlib.compress(bytes(2**21))
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    for place in 33, -12:  # before and behind the pixels
        data = bare[:place] + chunk * num_chunks + bare[place:]
        assert np.array_equal(decode(data, 4, 1), decode(bare, 4, 1))
        with pytest.raises(ValueError, match="PNG|decode"):
            open_image(data[:40])


def entry(tag, value):
    """The bytes of a tag of a TIFF: one number of 16 bits."""
    return struct.pack("<HHIHH", tag, 3, 1, value, 0)


COLOURS, COMPRESSION, FORMAT, BITS = 262, 259, 339, 258


@pytest.mark.parametrize("mode, old, new, words", [
    ("I;16", entry(COLOURS, 1), entry(COLOURS, 0), "mode I;16 mean darkness"),
    ("F", entry(COLOURS, 1), entry(COLOURS, 0), "mode F mean darkness"),
    ("L", entry(COMPRESSION, 1), entry(FORMAT, 2), "signed numbers of 8 bits"),  # uncompressed is the default
    ("L", entry(BITS, 8), entry(BITS, 7), "a TIFF that Pillow does not read: unknown pixel mode")])
def test_numbers_that_pillow_takes_for_others_are_refused(mode, old, new, words):
    data = smooth("TIFF", mode=mode)
    assert data.count(old) == 1 and open_image(data).mode == mode
    with pytest.raises(ValueError, match=words):
        open_image(data.replace(old, new))


def test_what_is_inverted_in_a_tiff_of_8_bits_is_turned_back():
    data = smooth("TIFF", mode="L")
    assert np.array_equal(decode(data.replace(entry(COLOURS, 1), entry(COLOURS, 0)), 40, 1), 255 - decode(data, 40, 1))


@pytest.mark.parametrize("transform", ["CMYK", "YCCK"])
def test_adobes_jpegs_of_four_colours_are_recognised(transform):
    """They are stored inverted, and as YCCK by Photoshop."""
    wanted = np.asarray(Image.open(io.BytesIO(smooth("PNG"))).convert("CMYK"))
    stored = wanted
    if transform == "YCCK":  # libjpeg makes 255 - RGB of YCC; Pillow stores 255 - what it is given
        colours = np.asarray(Image.fromarray(wanted[..., :3]).convert("YCbCr"))
        stored = np.concatenate([255 - colours, wanted[..., 3:]], 2)
    file = io.BytesIO()
    Image.fromarray(stored, "CMYK").save(file, "JPEG", quality=95)
    data = bytearray(file.getvalue())
    data[data.index(b"Adobe") + 11] = {"CMYK": 0, "YCCK": 2}[transform]
    assert abs(decode(bytes(data), 40, 3).astype(int) - decode(smooth("PNG"), 40, 3)).mean() < 3


@pytest.mark.parametrize("no_jp2", [False, True])
@pytest.mark.parametrize("sides, fits", [((64, 64), True), ((65, 64), False)])
def test_a_jpeg_2000_has_a_bounded_number_of_tiles(no_jp2, sides, fits):
    """Each takes memory: 65,025 tiles of one pixel in 162 bytes would take 0.75 GB."""
    file = io.BytesIO()
    Image.new("RGB", sides).save(file, "JPEG2000", no_jp2=no_jp2)
    data = bytearray(file.getvalue())
    place = data.index(b"\xff\x4f\xff\x51") + 4 + 20
    data[place : place + 8] = struct.pack(">II", 1, 1)
    if fits:
        open_header(bytes(data))
    else:
        with pytest.raises(ValueError, match="a JPEG 2000 of more than 4096 tiles"):
            open_header(bytes(data))


def test_an_avif_in_the_brand_of_its_container_is_read():
    data = smooth("AVIF")
    other = data.replace(b"ftypavif", b"ftypmif1")
    assert data != other and np.array_equal(decode(other, 40, 3), decode(data, 40, 3))
