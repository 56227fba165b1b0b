"""Pictures are small whatever the image is, and counted where they are missing; records of classes equal a search."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from tests.support.packs import write_pack
from xc.data.pack import Pack
from xc.reporting import pictures as pictures_module
from xc.reporting.pictures import SIDE, Pictures, records_of, thumbnail


def encoded(pixels, kind="png", mode=None):
    file, image = io.BytesIO(), Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def noise(height, width, channels=3):
    shape = (height, width, 3) if channels == 3 else (height, width)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("height, width, size", [
    (400, 200, (48, 96)), (20, 30, (30, 20)), (1, 1000, (96, 1)), (96, 96, (96, 96))])
@pytest.mark.parametrize("mode, kind", [(None, "png"), ("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpeg")])
def test_pictures_keep_their_proportions(height, width, size, mode, kind):
    kind, data = thumbnail(encoded(noise(height, width), kind, mode))
    image = Image.open(io.BytesIO(data), formats=[kind])
    image.load()
    assert image.size == size and max(image.size) <= SIDE and len(data) < 13_000


def test_16_bits_are_not_clipped():
    deep = (np.arange(64, dtype=np.uint16) * 1000).reshape(8, 8)
    kind, data = thumbnail(encoded(deep))
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert kind == "png" and pixels.tolist() == (deep >> 8).tolist()


def test_a_picture_has_no_other_bytes_of_the_file():
    file = io.BytesIO()
    Image.fromarray(noise(300, 300)).save(file, "jpeg", comment=b"secret", icc_profile=b"secret" * 100)
    assert b"secret" not in thumbnail(file.getvalue())[1]


@pytest.fixture
def pack(tmp_path):
    labels = np.random.default_rng(1).integers(6, size=40).tolist()
    labels = [label if label != 4 else 5 for label in labels]
    images = [(encoded(noise(8, 8, 1) + np.uint8(i)) if i else b"no image", label) for i, label in enumerate(labels)]
    return Pack(write_pack(tmp_path / "pack", [f"c{i}" for i in range(6)], images))


def test_pictures_stay_within_their_bytes_and_are_counted(pack):
    unlimited = Pictures(10**6)
    uris = [unlimited.of(pack, record) for record in range(40)]
    assert uris[0] is None and unlimited.damaged == 1 and unlimited.over == 0
    for uri in uris[1:]:
        head, _, data = uri.partition(",")
        assert head == "data:image/png;base64" and Image.open(io.BytesIO(base64.b64decode(data))).size == (8, 8)
    assert 10**6 - unlimited.left == sum(map(len, uris[1:]))
    few = Pictures(len(uris[1]) + len(uris[2]))
    found = [few.of(pack, record) for record in (1, 2, 1, 0, 2)]
    assert found == [uris[1], uris[2], None, None, None] and (few.over, few.damaged, few.left) == (2, 1, 0)


def test_a_damaged_record_has_no_picture(spoiled_packs):
    pictures = Pictures(10**6)
    assert [pictures.of(Pack(spoiled_packs / "train"), record) is None for record in (6, 7, 8, 9)] == [
        False, True, True, False]
    assert pictures.damaged == 2


@pytest.mark.parametrize("block", [3, 40, 1000])
@pytest.mark.parametrize("each", [1, 3, 100])
def test_records_of_classes_equal_a_search(pack, block, each, monkeypatch):
    monkeypatch.setattr(pictures_module, "_BLOCK", block)
    labels = pack.labels(0, len(pack))
    expected = {one: np.flatnonzero(labels == one)[:each].tolist() for one in (5, 0, 4, 2)}
    assert expected[4] == [] and records_of(pack, [5, 0, 4, 2], each) == expected
    assert records_of(pack, [], 3) == {}


def test_reading_ends_where_all_are_found(pack, monkeypatch):
    monkeypatch.setattr(pictures_module, "_BLOCK", 10)
    read, labels = [], pack.labels
    monkeypatch.setattr(pack, "labels", lambda start, stop: read.append(start) or labels(start, stop))
    records_of(pack, [0, 4], 1)
    assert read == [0]
