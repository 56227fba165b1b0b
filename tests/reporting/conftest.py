import io
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support.packs import write_pack
from tests.support.training import QUICK, call_main

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'single' </td>"
NAMES = [HOSTILE, "a $b_c^2$ {{ 7 * 7 }}", "long " * 500, "größer", "w" * 300,
         *(f"class {i}" for i in range(5, 13))]


@pytest.fixture(scope="session")
def packs(tmp_path_factory):
    """A folder with the packs train (13 classes of 6 images), val (65 images) and test (26). A tenth of val has wrong
    labels."""
    folder, random = tmp_path_factory.mktemp("report") / "packs", np.random.default_rng(0)
    patterns = random.integers(0, 256, (13, 6, 6)).repeat(4, 1).repeat(4, 2)
    folder.mkdir()
    for split, count, wrong in ("train", 6, 0), ("val", 5, 0.1), ("test", 2, 0):
        images = []
        for label in random.permutation(np.arange(13).repeat(count)).tolist():
            pixels = (patterns[label] + random.normal(0, 90, (24, 24))).clip(0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            images.append((file.getvalue(), int(random.integers(13)) if random.random() < wrong else label))
        write_pack(folder / split, NAMES, images, 10**5)
    return folder


@pytest.fixture(scope="session")
def finished(packs, tmp_path_factory):
    """The folder of a short run on the packs, with a hostile name."""
    out = tmp_path_factory.mktemp("runs") / "<b>run</b> & 'more'"
    with pytest.MonkeyPatch.context() as monkeypatch:
        flags = [*QUICK, "--lr", 0.01, "--epochs", 4, "--eval-every", 1, "--save-every", 2, "--image-size", 24]
        assert call_main(monkeypatch, 1, "--data", packs, "--out", out, *flags) == [None]
    return out


@pytest.fixture
def copy(finished, tmp_path):
    """A function that copies the run folder to a new name."""
    return lambda name: shutil.copytree(finished, tmp_path / name)
