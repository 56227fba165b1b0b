"""Images that cannot be used are skipped, listed and counted, up to a limit."""

import contextlib
import io
import json
import os
import pathlib
import socket
import tempfile
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

import xc.data.images
import xc.data.pack
from data_tools.packing.workers import KEPT, check_images
from tests.support.commands import pack_fails, peak_kib_of, run_pack
from tests.support.images import BAD_IMAGES, by_class, picture, png, write_tree
from tests.support.packs import contents
from tests.support.sources import skipped_rows, write_parquet
from xc.data.pack import Pack, PackError


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_listed_and_counted(tmp_path, capsys, workers):
    files = write_tree(tmp_path / "src", {"a": 3})
    files["a/odd.png"] = png(2, 2, 6, (b"acTL", bytes(8)))  # an animation of no frames: Pillow warns and decodes
    (tmp_path / "src" / "a" / "odd.png").write_bytes(files["a/odd.png"])
    with pytest.warns(UserWarning):
        xc.data.images.open_image(files["a/odd.png"])
    (tmp_path / "src" / "lost").mkdir()
    for name, data in BAD_IMAGES.items():
        (tmp_path / "src" / "lost" / name).write_bytes(data)
    (tmp_path / "src" / "lost" / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(tmp_path / "src" / "lost" / "pipe.png")
    (tmp_path / "src" / "lost" / "tab\tline\n.png").write_bytes(b"bad")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run_pack(tmp_path / "src", tmp_path / "pack", "--max-skipped", len(BAD_IMAGES) + 3, "--workers", workers)
    pack = Pack(tmp_path / "pack")
    assert contents(pack) == by_class(files)
    assert pack.class_names(0, 2) == ["a", "lost"] and pack.class_counts.tolist() == [4, 0]
    assert pack.skipped == len(BAD_IMAGES) + 3
    header, *rows = [line.split("\t") for line in (tmp_path / "pack" / "skipped.tsv").read_text().splitlines()]
    assert header == ["path", "reason"]
    names = [*BAD_IMAGES, "gone.png", "pipe.png", r"tab\tline\n.png"]
    assert {path for path, _ in rows} == {f"lost/{name}" for name in names}
    assert dict(rows)["lost/huge.png"].startswith("60000×50000 pixels")
    text = capsys.readouterr()
    assert "1 classes lost all their images" in text.err and "lost/" in text.err and "Warning" not in text.err
    assert json.loads(text.out.splitlines()[-1])["skipped"] == len(BAD_IMAGES) + 3


@pytest.mark.parametrize("allowed, fits", [("1", False), ("2", True), ("1%", False), ("10%", True), ("9.9%", False)])
def test_limit_of_skipped_images(tmp_path, capsys, allowed, fits):
    write_tree(tmp_path / "src", {"a": 18})
    for i in range(2):
        (tmp_path / "src" / "a" / f"bad{i}.png").write_bytes(b"bad")
    if fits:
        run_pack(tmp_path / "src", tmp_path / "pack", "--max-skipped", allowed)
        assert len(Pack(tmp_path / "pack")) == 18
    else:
        error = pack_fails(capsys, tmp_path / "src", tmp_path / "pack", "--max-skipped", allowed)
        assert "a/bad" in error and "--max-skipped" in error


def test_max_pixels(tmp_path):
    write_tree(tmp_path / "src", {"a": 1})  # 30 pixels
    (tmp_path / "src" / "a" / "large.png").write_bytes(picture(9, size=(31, 1)))
    run_pack(tmp_path / "src", tmp_path / "pack", "--max-pixels", 30, "--max-skipped", 1)
    assert len(Pack(tmp_path / "pack")) == 1 and "31×1 pixels" in (tmp_path / "pack" / "skipped.tsv").read_text()


def test_max_record_bytes(tmp_path, monkeypatch):
    files = write_tree(tmp_path / "src", {"a": 2})
    (tmp_path / "src" / "a" / "long.png").write_bytes(picture(9) + bytes(10**4))
    run_pack(tmp_path / "src", tmp_path / "all")
    monkeypatch.setattr(xc.data.pack, "MAX_RECORD_BYTES", 10**4)
    run_pack(tmp_path / "src", tmp_path / "pack", "--max-skipped", 1)
    assert contents(Pack(tmp_path / "pack")) == by_class(files)
    with pytest.raises(PackError, match=r"record \d: more than 10000 bytes"):
        Pack(tmp_path / "all").verify()


def test_unreadable_files_are_skipped(tmp_path):
    files = write_tree(tmp_path / "src", {"a": 3})
    folder = tmp_path / "src" / "a"
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket.png"))
    links = {"gone": "nowhere", "loop": "loop.png", "null": "/dev/null", "zero": "/dev/zero", "kmsg": "/proc/kmsg",
             "environ": "/proc/self/environ", "mem": "/proc/self/mem",
             "sys": "/sys/kernel/mm/transparent_hugepage/enabled"}
    for name, target in links.items():
        (folder / f"{name}.png").symlink_to(target)
    (folder / "huge.png").touch()
    os.truncate(folder / "huge.png", 2**40)
    for check in "full", "none":
        for workers in 0, 1:
            out = tmp_path / f"{check}{workers}"
            run_pack(tmp_path / "src", out, "--max-skipped", 99, "--check", check, "--workers", workers)
            assert contents(Pack(out)) == by_class(files)
            rows = dict(skipped_rows(out))
            assert rows.keys() == {f"a/{name}.png" for name in ["pipe", "socket", "huge", *links]}
            assert "being changed" in rows["a/environ.png"] and "more than" in rows["a/huge.png"]


@contextlib.contextmanager
def without_rights():
    """Root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_file_that_may_not_be_read_is_skipped_and_a_folder_is_one_line(capsys):
    """A folder may be a class or a thousand: too much to be left out."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        folder.chmod(0o777)
        files = write_tree(folder / "src", {"a": 3, "b": 2})
        (folder / "src" / "a" / "0.png").chmod(0)
        with without_rights():
            run_pack(folder / "src", folder / "pack", "--max-skipped", 1)
        del files["a/0.png"]
        assert contents(Pack(folder / "pack")) == by_class(files)
        assert skipped_rows(folder / "pack") == [["a/0.png", "Permission denied"]]
        assert "skipped 1 images" in capsys.readouterr().err
        (folder / "src" / "b").chmod(0)
        with without_rights():
            error = pack_fails(capsys, folder / "src", folder / "new")
        assert "Permission denied" in error and "src/b" in error
        (folder / "src" / "b").chmod(0o700)


def test_files_that_vanish_or_shrink_are_skipped(tmp_path):
    files = write_tree(tmp_path / "src", {"a": 4})
    paths = [tmp_path / "src" / name for name in files]
    paths[1].unlink()
    os.truncate(paths[2], 50)
    os.truncate(paths[3], 0)
    results = check_images([(str(path), None) for path in paths], 10**6, KEPT, "full")
    assert results[0] == (picture(0), zlib.crc32(picture(0)))
    assert [data for data, _ in results[1:]] == [None] * 3 and results[1][1] == "No such file or directory"


def bombs():
    """{name: bytes} of images that take more than 200 MB each when they are read as a whole."""
    zeros = zlib.compress(bytes(2**28))
    return {"pixels.png": png(60000, 50000, 1000), "text.png": png(2, 2, 6, (b"zTXt", b"k\0\0" + zeros)),
            "profile.png": png(2, 2, 6, (b"iCCP", b"k\0\0" + zeros)), "data.png": png(2, 2, 2**28)}


def films():
    """{name: bytes} of images of many frames, 16 MB each."""
    frames, found = [Image.fromarray(np.full((4000, 4000), i, np.uint8)) for i in range(12)], {}
    for kind, options in ("GIF", {}), ("TIFF", {"compression": "tiff_adobe_deflate"}):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
        found[f"film.{kind.lower()}"] = file.getvalue()
    return found


@pytest.mark.parametrize("make", [bombs, pytest.param(films, marks=pytest.mark.long)])
def test_bombs_take_no_memory(tmp_path, make):
    """Of many frames only the first is looked at, and texts are read to a limit."""
    files, bad = write_tree(tmp_path / "src", {"a": 3}), make()
    for name, data in bad.items():
        (tmp_path / "src" / "a" / name).write_bytes(data)
    flags = ["--workers", 0, "--max-skipped", len(bad)]
    peak = peak_kib_of("data_tools.pack", tmp_path / "src", tmp_path / "pack", *flags)
    assert peak < 200_000  # of which Python and its libraries take 60,000
    found = contents(Pack(tmp_path / "pack"))
    assert by_class(files).items() <= found.items()
    assert len(found) + Pack(tmp_path / "pack").skipped == 3 + len(bad)


def test_no_record_is_larger_than_a_reader_takes(tmp_path, monkeypatch):
    """Whether it came so or was made so."""
    monkeypatch.setattr("xc.data.pack.MAX_RECORD_BYTES", 3000)
    small, large = picture(0), picture(1, size=(40, 40))
    write_parquet(tmp_path / "a.parquet", image=[small, large], label=["k", "k"])
    run_pack(tmp_path / "a.parquet", tmp_path / "came", "--max-skipped", "1")
    write_tree(tmp_path / "tree", {"k": 2})
    (tmp_path / "tree" / "k" / "large.png").write_bytes(png(60, 60, 60 * 61))
    run_pack(tmp_path / "tree", tmp_path / "made", "--max-skipped", "1", "--format", "raw")
    for name, number in ("came", 1), ("made", 2):
        [[_, reason]] = skipped_rows(tmp_path / name)
        assert "bytes, more than 3000" in reason and Pack(tmp_path / name).verify() == number
