"""From made-up images to a model that reads them: every command that a newcomer runs."""

import sys

import pytest

from tests.support.launch import horovodrun, last_json, run

pytestmark = pytest.mark.mpi


def test_two_ranks_learn_to_read(tmp_path):
    """A slice of the glyphs, in typefaces never seen: a guess is right once in 150 times."""
    run(sys.executable, "-m", "data_tools.glyphs", tmp_path / "glyphs", "--no-system-fonts", "--classes", 150)
    run(sys.executable, "-m", "data_tools.pack", tmp_path / "glyphs", tmp_path / "packs")
    process = horovodrun(2, "train.py", "--data", tmp_path / "packs", "--out", tmp_path / "run", "--epochs", 15,
                         "--global-batch", 64, "--eval-every", 5, "--device", "cpu", seconds=500)
    result = last_json(process)
    assert set(result) >= {"top1", "top5", "images_per_second", "peak_rss_mb", "steps", "seconds", "run"}
    assert result["top1"] > 0.6 and result["top5"] > 0.85 and result["images_per_second"] > 0, result
