"""Images encoded anew while they are packed: none is lost, what need not change does not, pixels stay near."""

import io
import itertools
import json

import numpy as np
import pytest
from PIL import Image

from data_tools.packing.encode import FORMATS, Encoding
from tests.support.commands import pack_fails, run_pack
from tests.support.images import IMAGE_KINDS, picture, smooth
from tests.support.packs import contents, file_hashes
from xc.data.images import decode, open_image
from xc.data.pack import Pack


@pytest.mark.parametrize("kind, mode", IMAGE_KINDS)
def test_pixels_stay_near(kind, mode):
    data, sizes = smooth(kind, mode=mode), [(None, (60, 40)), (20, (30, 20)), (40, (60, 40)), (300, (60, 40))]
    for format, (side, size) in itertools.product([None, *FORMATS], sizes):
        image = open_image(data)
        coded = Encoding(side, format).apply(image, data)
        assert open_image(coded).size == size
        expected = {"raw": "PPM", None: kind if kind in ("PNG", "JPEG", "WEBP") else "PNG"}.get(format, format)
        assert open_image(coded).format == expected.upper() or coded is data
        for channels in 1, 3:
            distance = np.abs(decode(coded, 20, channels).astype(int) - decode(data, 20, channels))
            assert distance.mean() < 12, (format, side, channels)


@pytest.mark.parametrize("kind, mode", IMAGE_KINDS)
def test_raw_pixels_are_those_that_the_reader_takes(kind, mode):
    data = smooth(kind, mode=mode)
    raw = Encoding(format="raw").apply(open_image(data), data)
    grey = mode in ("L", "LA", "1", "F", "I;16")
    assert len(raw) == 60 * 40 * (1 if grey else 3) + len(b"P5\n60 40\n255\n")
    for size in 40, 60:  # the reader stretches it to a square
        for channels in (1,) if grey else (3,):
            assert np.array_equal(decode(raw, size, channels), decode(data, size, channels))
    assert Encoding(format="raw").apply(open_image(raw), raw) == raw
    for cut in 3, 12, len(raw) - 1:
        with pytest.raises(ValueError):
            open_image(raw[:cut])


def cut_out(kind, mode, side=40):
    """An image whose middle shows, with a soft edge, on colours that go on where it does not."""
    image = open_image(smooth("PNG", (side, side), "L" if mode == "LA" else "RGB"))
    x, y = np.meshgrid(*[np.linspace(-1, 1, side)] * 2)
    alpha = Image.fromarray(np.clip(500 - 700 * np.hypot(x, y), 0, 255).astype(np.uint8))
    file, options = io.BytesIO(), {}
    if mode in ("P", "PA"):
        image = image.quantize(200)
        options = {"transparency": bytes(range(0, 200, 2))} if kind == "PNG" else {"transparency": 7}
    if mode == "PA":
        image, palette = Image.merge("PA", [Image.fromarray(np.asarray(image)), alpha]), image.getpalette()
        image.putpalette(palette)
    elif mode != "P":
        image.putalpha(alpha)
    image.save(file, kind, **options, **{"lossless": True, "exact": True} if kind == "WEBP" else {})
    return file.getvalue()


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind, mode", [("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("TIFF", "RGBA"), ("TIFF", "LA"),
                                        ("TIFF", "PA"), ("GIF", "P"), ("WEBP", "RGBA")])
def test_colours_stay_where_an_image_is_transparent(kind, mode):
    data = cut_out(kind, mode)
    image = open_image(data)
    assert image.mode == mode and (mode != "P" or "transparency" in image.info)
    encodings = [(None, None), *((format, None) for format in FORMATS), ("webp", 100)]
    for side, (format, quality) in itertools.product([None, 40, 17], encodings):
        check_colours(data, open_image(data), side, format, quality)


def check_colours(data, image, side, format, quality):
    mode = image.mode
    coded = Encoding(side, format, quality).apply(image, data)
    colours, alpha = image.convert("L" if mode == "LA" else "RGB"), image.convert("RGBA").getchannel("A")
    if side is not None:
        colours, alpha = (one.resize((side, side), Image.Resampling.BICUBIC) for one in (colours, alpha))
    for channels, seen in (1, "L"), (3, "RGB"):
        pixels, expected = decode(coded, side or 40, channels), np.array(colours.convert(seen))
        distance = np.abs(pixels.astype(int) - expected.reshape(*expected.shape[:2], channels).transpose(2, 0, 1))
        lossless = open_image(coded).format not in ("JPEG", "WEBP")
        assert not distance.any() if lossless else distance.mean() < 4 and distance.max() < 40, seen
    if format not in ("jpeg", "raw"):
        assert np.array_equal(open_image(coded).convert("RGBA").getchannel("A"), alpha) and alpha.getextrema()[0] < 255


@pytest.mark.parametrize("encoding, kind, kept", [
    (Encoding(), "TIFF", True), (Encoding(side=40), "BMP", True), (Encoding(side=39), "PNG", False),
    (Encoding(format="png"), "PNG", True), (Encoding(format="png"), "BMP", False),
    (Encoding(quality=50), "JPEG", False), (Encoding(side=40, format="jpeg"), "JPEG", True)])
def test_bytes_are_kept_where_nothing_is_to_be_done(encoding, kind, kept):
    data = smooth(kind)
    assert (encoding.apply(open_image(data), data) is data) == kept


def test_quality_is_a_matter_of_size():
    data = picture(0, "PNG", (60, 60))
    sizes = [len(Encoding(None, "jpeg", quality).apply(open_image(data), data)) for quality in (10, 50, None, 100)]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


def test_nothing_is_lost_with_any_number_of_workers(tmp_path, capsys):
    for number in range(90):
        (tmp_path / "src" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        size = (30 + number, 100 - number % 50)
        (tmp_path / "src" / "ab"[number % 2] / f"{number}.png").write_bytes(picture(number, size=size))
    (tmp_path / "src" / "a" / "wide.png").write_bytes(picture(0, size=(70_000, 2)))  # more than a JPEG can have
    (tmp_path / "src" / "a" / "bad.png").write_bytes(b"bad")
    flags = ["--resize", 24, "--format", "jpeg", "--quality", 80, "--max-skipped", 2]
    run_pack(tmp_path / "src", tmp_path / "0", *flags)
    run_pack(tmp_path / "src", tmp_path / "2", *flags, "--workers", 2)
    assert file_hashes(tmp_path / "0") == file_hashes(tmp_path / "2")
    images = contents(Pack(tmp_path / "0"))
    assert len(images) == 90 and sorted(images.values()) == ["a"] * 45 + ["b"] * 45
    assert {(open_image(image).format, min(open_image(image).size)) for image in images} == {("JPEG", 24)}
    assert Pack(tmp_path / "0").verify() == 90
    assert "a/wide.png\tcannot be written as jpeg" in (tmp_path / "0" / "skipped.tsv").read_text()
    run_pack(tmp_path / "0", tmp_path / "again", "--resize", 24)  # a pack's bytes, which need no change
    assert contents(Pack(tmp_path / "again")) == images
    capsys.readouterr()
    run_pack(tmp_path / "0", tmp_path / "smaller", "--resize", 8)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["records"] == 90
    assert {min(open_image(image).size) for image in contents(Pack(tmp_path / "smaller"))} == {8}


@pytest.mark.parametrize("flags, words", [
    (["--format", "png", "--quality", 9], "--quality is for jpeg and webp"),
    (["--format", "raw", "--quality", 9], "--quality is for jpeg and webp"),
    (["--quality", 0], "not between 1 and 100"), (["--format", "gif"], "invalid choice"),
    (["--resize", 0], "not between")])
def test_flags_that_make_no_sense(tmp_path, capsys, flags, words):
    (tmp_path / "src").mkdir()
    assert words in pack_fails(capsys, tmp_path / "src", tmp_path / "pack", *flags)
