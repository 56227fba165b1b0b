"""A pack that the tests of readers share."""

import shutil
from pathlib import Path

import pytest

from tests.support.commands import run_pack
from tests.support.images import write_tree


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A pack with several records in each of several shards, and its source."""
    folder = tmp_path_factory.mktemp("whole")
    files = write_tree(folder / "src")
    run_pack(folder / "src", folder / "pack", "--shard-mb", 1e-3)
    return folder / "pack", files


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of that pack, to be changed."""
    return Path(shutil.copytree(whole[0], tmp_path / "copy"))
