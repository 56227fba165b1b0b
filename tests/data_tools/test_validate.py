"""Checks of images before they are packed: none refuses what decodes, the full one takes nothing else."""

import io
import json
import random
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

import data_tools.show
from data_tools.packing.validate import CHECKS, _is_plain_png, check_image, check_visible
from tests.support.commands import pack_fails, run_pack
from tests.support.images import IMAGE_KINDS, picture, png, smooth, with_checksums, write_tree
from tests.support.packs import contents, file_hashes
from tests.support.sources import skipped_rows
from xc.data.images import MAX_SCANS, decode, decode_plain_jpeg, open_header, open_image
from xc.data.pack import Pack
from xc.data.pack_split import PackSplit

MOST = 10**6  # pixels


def jpeg(size, mode, **options):
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(sum(size), "PNG", size))).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


JPEGS = [jpeg((1, 1), "L"), jpeg((9, 7), "RGB"), jpeg((40, 33), "RGB", progressive=True), jpeg((70, 21), "L"),
         jpeg((33, 40), "CMYK", quality=95), jpeg((64, 64), "RGB", subsampling=0),
         jpeg((17, 300), "RGB", optimize=True), jpeg((50, 50), "RGB", restart_marker_blocks=2)]
PLAIN = {"L", "LA", "RGB", "RGBA"}
PNGS = [picture(size, "PNG", (size, 9), mode) for size in (1, 7, 40) for mode in sorted(PLAIN | {"P", "1", "I;16"})]


def verdict(check, *args):
    """Why an image is refused; None where it is not."""
    try:
        check(*args)
    except ValueError as error:
        return str(error)
    return None


def seen(data, most):
    check_visible(open_image(data, most))


def fault(data, check):
    return verdict(check_image, data, MOST, check)


def spoilt(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        place = rng.randrange(2, len(data))
        match rng.randrange(4):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place : place + 2] = bytes([255, rng.randrange(256)])
            case 2:
                del data[place : place + rng.randrange(1, 9)]
            case 3:
                data[place:place] = rng.randbytes(rng.randrange(1, 9))
    return bytes(data)


@pytest.mark.parametrize("images", ["JPEGS", "PNGS"])
def test_an_image_passes_just_where_it_decodes(images):
    rng, verdicts, images = random.Random(0), [], globals()[images]
    for number in range(3000):
        data = spoilt(images[number % len(images)], rng)
        if images is PNGS and number % 4:
            data = with_checksums(data)
        verdicts.append(verdict(seen, data, MOST))
        assert fault(data, "full") == verdicts[-1]
    assert 300 < sum(one is None for one in verdicts) < 2900


def test_a_png_of_pixels_alone_is_known_without_pillow():
    for data in PNGS:
        assert _is_plain_png(data, MOST) == (open_image(data).mode in PLAIN), open_image(data).mode
    head, bomb = png(3, 2, 0)[:33], png(60000, 50000, 1000)
    for data in (b"", PNGS[0][:-12], png(3, 2, 9), png(3, 2, 7), png(0, 2, 2), head, head + PNGS[0][-12:], bomb,
                 PNGS[0][:8] + PNGS[0][33:], PNGS[0][:33] + PNGS[0][8:], PNGS[0][:-12] + head[8:] + PNGS[0][-12:]):
        assert not _is_plain_png(data, MOST)
    assert _is_plain_png(png(3, 2, 8), 6) and not _is_plain_png(png(3, 2, 8), 5)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind, mode", IMAGE_KINDS)
def test_what_decodes_is_never_refused(check, kind, mode):
    data = smooth(kind, mode=mode)
    for whole in (data, data + b"\0" * 7, data + b"more"):  # cameras and editors put things behind the end
        assert fault(whole, check) == verdict(open_image, whole, MOST) is None


@pytest.mark.filterwarnings("ignore")  # Pillow mentions odd metadata
@pytest.mark.parametrize("kind, mode", IMAGE_KINDS)
def test_a_cut_image_is_found(kind, mode):
    data = smooth(kind, size=(23, 11), mode=mode)
    for length in range(len(data)):
        full, header = fault(data[:length], "full"), fault(data[:length], "header")
        if full is not None:  # of a PNG and a TIFF the last bytes may be none of the picture
            assert header is not None, length
        assert length == 0 or fault(data[:length], "none") is None
    assert fault(b"", "none") == "empty"


def test_the_header_check_trusts_what_lies_between():
    for kind in "JPEG", "GIF", "WEBP":
        data = bytearray(picture(0, kind, (90, 90)))
        start, end = len(data) // 2, len(data) - 2
        data[start:end] = b"\xff\xc8" * ((end - start) // 2) + bytes((end - start) % 2)
        assert fault(data, "header") is None is not fault(data, "full"), kind
    data = bytearray(smooth("PNG"))
    data[len(data) // 2] ^= 1  # which its checksum shows
    assert fault(data, "header") == fault(data, "full") is not None


@pytest.mark.parametrize("check", CHECKS)
def test_bombs_are_refused_by_their_header(check):
    for data in png(60000, 50000, 1000), png(60000, 50000, 1000)[:50]:
        assert (fault(data, check) is None) == (check == "none")


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_has_a_bounded_number_of_scans(mode):
    data = jpeg((40, 33), mode, progressive=True)
    scans = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    many = data[:-2] + data[scans[-1] : -2] * (MAX_SCANS - len(scans))
    odd = many + b"\xff\xd9" + b"\xff\xda" * 999  # cameras put videos behind the end
    for whole in data, many + data[-2:], odd:
        assert {verdict(check_image, whole, MOST, check) for check in CHECKS} == {None}
        assert decode(whole, 33, 3).shape == (3, 33, 33)
    more = many + data[scans[-1] :]
    for check in (open_header, open_image, lambda *args: check_image(*args, "full"),
                  lambda *args: check_image(*args, "header"), lambda data, most: decode(data, 33, 3, most)):
        assert verdict(check, more, MOST) == ("a JPEG of more than 100 scans, each of which may cost as much as the "
                                              "whole image")
    assert decode_plain_jpeg(more, MOST) is decode_plain_jpeg(more, MOST, only_check=True) is None


def tiled(size, tile, order="<", version=42, more=(), kind=4):
    """A TIFF of greys in tiles that are all the same bytes; version 43: BigTIFF."""
    number, entry, count, start = ("Q", "HHQQ", "Q", 16) if version == 43 else ("I", "HHII", "H", 8)
    content = zlib.compress(bytes(tile[0] * tile[1]))
    tiles = -(-size[0] // tile[0]) * -(-size[1] // tile[1])
    places = start + len(content)
    sizes = places + 4 * tiles
    tags = [(256, 4, 1, size[0]), (257, 4, 1, size[1]), (258, 4, 1, 8), (259, 4, 1, 8), (262, 4, 1, 1), (277, 4, 1, 1),
            (322, kind, 1, tile[0]), (323, 4, 1, tile[1]), (324, 4, tiles, places if tiles > 1 else start),
            (325, 4, tiles, sizes if tiles > 1 else len(content)), *more]
    head = struct.pack(order + "2sH", b"II" if order == "<" else b"MM", version)
    head += struct.pack("<HH", 8, 0) if version == 43 else b""
    return b"".join([head, struct.pack(order + number, sizes + 4 * tiles), content,
                     struct.pack(f"{order}{tiles}I", *[start] * tiles),
                     struct.pack(f"{order}{tiles}I", *[len(content)] * tiles), struct.pack(order + count, len(tags)),
                     *(struct.pack(order + entry, *tag) for tag in tags), bytes(8)])


def test_tiles_of_a_tiff_are_pixels_too():
    """A column of pixels could have thousands of tiles of a million pixels, all of the same bytes."""
    for order, version in ("<", 42), (">", 42), ("<", 43):
        for size in (40, 33), (16, 16), (1, 4000):
            data = tiled(size, (16, 16), order, version)
            assert open_image(data, MOST).size == size
            assert {verdict(check_image, data, MOST, check) for check in CHECKS} == {None}
        bomb = tiled((1, 4000), (2**10, 16), order, version)
        assert fault(bomb, "full") == fault(bomb, "header") == (
            "1×4000 pixels in tiles of 4096000, more than 1000000")
        assert open_image(bomb, 4_096_000).size == (1, 4000)
    wide, narrow = (322, 4, 1, 2**10), (322, 4, 1, 16)
    for data in tiled((1, 4000), (2**10, 16), more=[narrow]), tiled((1, 4000), (16, 16), more=[wide]):
        assert "in tiles of 4096000" in fault(data, "header")
    for kind in 2, 5, 16:
        assert fault(tiled((40, 33), (16, 16), kind=kind), "header")


def test_none_and_header_leave_it_to_the_reader(tmp_path, capsys):
    good = {picture(i): "a" for i in range(9)}
    cut, text = picture(50, size=(40, 40))[:-900], b"hello"
    (tmp_path / "src" / "a").mkdir(parents=True)
    for i, data in enumerate([*good, cut, text, b""]):
        (tmp_path / "src" / "a" / f"{i}.png").write_bytes(data)
    for check, taken in ("full", []), ("header", []), ("none", [cut, text]):
        for workers in 0, 2:
            out = tmp_path / f"{check}{workers}"
            run_pack(tmp_path / "src", out, "--check", check, "--max-skipped", 3, "--workers", workers)
        assert file_hashes(tmp_path / f"{check}0") == file_hashes(tmp_path / f"{check}2")
        pack = Pack(tmp_path / f"{check}0")
        assert contents(pack) == good | dict.fromkeys(taken, "a") and pack.verify() == 9 + len(taken)
        assert pack.skipped == 3 - len(taken)
    images, _ = pack.read(np.arange(len(pack)))
    bad = {images.index(cut), images.index(text)}
    capsys.readouterr()
    data_tools.show.main([str(tmp_path / "none0"), "--json"])
    undecodable = json.loads(capsys.readouterr().out)["train"]["sample"]["undecodable"]
    assert [int(re.search(r"record (\d+): ", fault)[1]) for fault in undecodable] == sorted(bad)
    reader = PackSplit(pack, 3, 6, max_bad_records=2)
    assert len(reader.examples(np.arange(len(pack)), replace=False)[0]) == 9 and reader.bad_records == bad


@pytest.mark.parametrize("flags", [["--resize", 9], ["--format", "png"], ["--quality", 9]])
def test_a_check_is_of_bytes_that_are_kept(tmp_path, capsys, flags):
    (tmp_path / "src").mkdir()
    for check in "header", "none":
        error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--check", check, *flags)
        assert f"--check {check} is for images that keep their bytes" in error


@pytest.mark.parametrize("pixels, seen", [
    (np.linspace(0, 1, 20, dtype=np.float32), False), (np.linspace(0, 255, 20, dtype=np.float32), True),
    (np.linspace(-1, 1, 20, dtype=np.float32), False), (np.array([np.nan] * 20, np.float32), False),
    (np.zeros(20, np.float32), True), (np.linspace(0, 65535, 20).astype(np.uint16), True),
    (np.linspace(0, 4095, 20).astype(np.uint16), False), (np.full(20, 70, np.uint16), True),
    (np.linspace(0, 255, 20).astype(np.int32), False), (np.linspace(0, 10**6, 20).astype(np.int32), False),
    (np.linspace(0, 65535, 20).astype(np.int32), True)])
@pytest.mark.parametrize("flags", [[], ["--format", "png"]])
def test_deep_images_in_which_nothing_would_be_seen_are_skipped(tmp_path, pixels, seen, flags):
    """A reader keeps 8 bits: numbers from 0 to 1, or of 12 bits, would all be black, and large ones white."""
    write_tree(tmp_path / "src", {"a": 1})
    Image.fromarray(pixels.reshape(4, 5)).save(tmp_path / "src" / "a" / "deep.tif")
    run_pack(tmp_path / "src", tmp_path / "pack", "--max-skipped", 1, *flags)
    rows = skipped_rows(tmp_path / "pack")
    assert [path for path, _ in rows] == ([] if seen else ["a/deep.tif"])
    assert seen or "sees nothing" in rows[0][1] or "not finite" in rows[0][1]
