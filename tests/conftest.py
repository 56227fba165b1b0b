import os
import shutil
import sys
import zlib

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.launch import run

torch.set_num_threads(1)
_CORES_OF_RANKS = 4  # of the two to four ranks of a test that starts some
_MOST_WORKERS = 16


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """-n auto: a process per core that this one may use, which in a job of a cluster are not all."""
    return min(len(os.sched_getaffinity(0)), _MOST_WORKERS)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Tests one by one to whichever process is free, but files that start ranks only so many at once as there are cores
    for them, and one Slurm. (xdist's own --dist loadgroup does nothing with this pytest.)"""
    from xdist.scheduler import LoadScopeScheduling

    lanes = max(1, len(os.sched_getaffinity(0)) // _CORES_OF_RANKS)

    class Scheduler(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            if "tests/mpi/" in file or "test_every_command_runs" in nodeid:
                return f"ranks {zlib.crc32(file.encode()) % lanes}"
            return "slurm" if file.endswith("slurm/test_jobs.py") else nodeid

    return Scheduler(config, log)


def pytest_collection_modifyitems(items):
    """What fails in milliseconds comes before what starts ranks."""
    items.sort(key=lambda item: item.get_closest_marker("mpi") is not None)


@pytest.fixture(scope="session")
def tiny_packs(tmp_path_factory):
    """A folder with the packs train (10 classes, 120 images) and test (30 images) of noisy random patterns."""
    folder = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    for label in range(10):
        pattern = random.integers(0, 256, (8, 8)).repeat(4, 0).repeat(4, 1)
        for split, count in ("train", 12), ("test", 3):
            (folder / "tree" / split / f"class{label}").mkdir(parents=True)
            for i in range(count):
                image = (pattern + random.normal(0, 30, pattern.shape)).clip(0, 255).astype(np.uint8)
                Image.fromarray(image).save(folder / "tree" / split / f"class{label}" / f"{i}.png")
    run(sys.executable, "-m", "data_tools.pack", folder / "tree", folder / "packs")
    return folder / "packs"


@pytest.fixture
def spoiled_packs(tiny_packs, tmp_path):
    """A copy of tiny_packs in which three training records do not have their checksum, and one its image."""
    shutil.copytree(tiny_packs, tmp_path / "packs")
    with h5py.File(tmp_path / "packs" / "train" / "shard-00000.h5", "r+") as file:
        for record in 7, 8, 119:
            file["bytes"][file["offsets"][record] + 20] ^= 255
    return tmp_path / "packs"
