"""Sources and packs that several tests share."""

import pytest

import data_tools.packing.image_file
from tests.support.commands import run_pack
from tests.support.pack_jobs import FLAGS, LARGE_EXTENT, ordered_records, write_source


@pytest.fixture(scope="module", params=["folder", "webdataset", "large"])
def source(request, tmp_path_factory):
    """A source, and the pack that one process makes of it without interruption.

    folder: images are files; webdataset: images come as bytes; large: some of these images get extents of
    their own.
    """
    folder = tmp_path_factory.mktemp("source")
    write_source(request.param, folder / "src")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "large":
            patch.setattr(data_tools.packing.image_file, "MOST_EXTENT", LARGE_EXTENT)
        run_pack(folder / "src", folder / "pack", *FLAGS)
        assert [len(images) for images in ordered_records(folder / "pack").values()] == [69, 24]
        yield folder / "src", folder / "pack"
