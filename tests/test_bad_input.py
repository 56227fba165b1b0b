"""Bad input to packing: one clear line and nothing left, or skipped and counted; never a broken pack."""

import contextlib
import io
import os
import pathlib
import socket
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import unicodedata
import zlib
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

import xc.pack
from data_tools.checking import KEPT, check_images
from data_tools.listing import zeros_file
from data_tools.sources import KINDS
from tests.test_faults import small_disk
from tests.test_pack import ROOT, by_class, contents, fails, file_hashes, picture, png, run, write_tree
from tests.test_sources import image_record, odd, samples, skipped_rows, write_parquet, write_rec, write_tar
from xc.pack import Pack

# Tar files.


def test_a_tar_header_with_a_wrong_checksum_hides_nothing(tmp_path, capsys):
    """tarfile takes it for the end of the file."""
    files = write_tree(tmp_path / "src", {"0": 3})
    whole = write_tar(tmp_path / "a.tar", samples(files)).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        starts = [member.offset for member in tar]
    assert len(starts) == 6
    for start in starts:
        for place in start, start + 130, start + 150:  # in the name, the size and the checksum
            damaged = bytearray(whole)
            damaged[place] ^= 1
            (tmp_path / "a.tar").write_bytes(damaged)
            error = fails(capsys, tmp_path / "a.tar", tmp_path / "pack")
            assert "a.tar: cut short or not a tar file" in error
            assert start == 0 or f"no header at byte {start}" in error


def test_tars_that_were_joined_are_refused(tmp_path, capsys):
    files = write_tree(tmp_path / "src", {"0": 2})
    one = write_tar(tmp_path / "a.tar", samples(files)).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + one)
    assert "no header at byte" in fails(capsys, tmp_path / "a.tar", tmp_path / "pack")
    (tmp_path / "a.tar").write_bytes(one + bytes(2**20))  # tapes are filled up
    run(tmp_path / "a.tar", tmp_path / "pack")
    assert len(Pack(tmp_path / "pack")) == 2


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_named_so(tmp_path, capsys, mode):
    for name in "a.tar", f"a.tar.{mode}", "a":
        with tarfile.open(tmp_path / name, f"w:{mode}") as tar:
            tar.addfile(odd("0.png"), io.BytesIO())
        assert f"{name}: compressed; unpack it first" in fails(capsys, tmp_path / name, tmp_path / "pack")


# Manifests.


@pytest.mark.parametrize("text, words", [
    (b"path,label\nx\0.png,1\n", "must be relative and stay below"),
    ("path,label\nx.png,1\n".encode("utf-16"), "not a CSV or TSV file in UTF-8"),
    ("path,label\nx.png,1\n".encode("utf-16-le"), "must name the columns"),
    (b"path,label," + b"x" * 2**20 + b"\nx.png,1,\n", "the first line has more than"),
    (b"path,label\n" + b"x" * 2**21 + b",1\n", "longer than"),
    (b'path,label\n"' + b"x\n" * 2**20 + b'",1\n', "field larger than"),
    (b"path,label\n" + b'"x\n",' * 2**19 + b"1\n", "longer than"),
    (b"path,label\n" + b"x" * 5000 + b",1\n", "line 2: path of 5000 bytes"),
    (b"path,label\n" + b"x" * 70_000 + b",1\n", "line 2: path of 70000 bytes"),
    (b"path,label\nx.png," + b"n" * 5000 + b"\n", "has 5000 bytes, more than 4096"),
    (b'path,label\nx.png,"a"b\n', "not a CSV"),
    (b"label\npath\n", "must name the columns"),
    (b"path,label\nx.png,1,2\n", "line 2: 3 cells"),
    (b"\xff\xd8\xff\xe0" + bytes(9000), "not a CSV or TSV file in UTF-8"),
])
def test_a_bad_manifest_is_one_line(tmp_path, capsys, text, words):
    (tmp_path / "list.csv").write_bytes(text)
    (tmp_path / "x.png").write_bytes(picture(0))
    assert words in fails(capsys, tmp_path / "list.csv", tmp_path / "pack")


def test_empty_lines_are_no_row(tmp_path):
    (tmp_path / "x.png").write_bytes(picture(0))
    (tmp_path / "list.csv").write_text("path,label\n" + "\n" * 2**21 + "x.png,1\n")
    run(tmp_path / "list.csv", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == {picture(0): "1"}


def test_a_path_that_is_too_long_is_one_line_in_parquet_too(tmp_path, capsys):
    write_parquet(tmp_path / "a.parquet", path=["x" * 70_000], label=["a"])
    assert "row 1: path of 70000 bytes" in fails(capsys, tmp_path / "a.parquet", tmp_path / "pack")


def test_labels_keep_what_is_odd_about_them(tmp_path):
    labels = ["a\0b", 'say "a"', "a\nb", "\u202eabc", "😀", "é", unicodedata.normalize("NFD", "é"), "n" * 4096, ".."]
    names = list(files := write_tree(tmp_path, {"k": len(labels)}))
    write_parquet(tmp_path / "a.parquet", path=names, label=labels)
    run(tmp_path / "a.parquet", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == dict(zip(files.values(), labels, strict=True))
    assert Pack(tmp_path / "pack").verify() == len(labels)


# Names of files and folders.


def test_names_of_folders_and_files_come_back(tmp_path, capfd):
    names = ["é", unicodedata.normalize("NFD", "é"), "\u202eabc", "😀/👩‍👩‍👧", "日" * 80, " ", "a b\tc", "-", "'\""]
    files = write_tree(tmp_path / "src", {name: 2 for name in names})
    bad = tmp_path / "src" / "é" / os.fsdecode(b"caf\xe9.png")  # a name, not that of a class, may be in any encoding
    bad.write_bytes(picture(99))
    out = tmp_path / os.fsdecode(b"pack\xe9")
    (tmp_path / "src" / "é" / os.fsdecode(b"bad\xe9.png")).write_bytes(b"bad")
    (tmp_path / "src" / "é" / "\u202e\x1b[31m.png").write_bytes(b"bad")
    run(tmp_path / "src", out, "--max-skipped", 2)
    assert contents(Pack(out)) == by_class(files) | {picture(99): "é"}
    assert b"bad\xe9.png\t" in (out / "skipped.tsv").read_bytes()
    said = capfd.readouterr().err
    assert "skipped 2 images" in said and "\x1b" not in said and said.count("\n") == 1


def test_results_are_printed_whatever_the_names(tmp_path):
    write_tree(tmp_path / "src", {"a": 9})
    out = os.fsencode(tmp_path) + b"/pack\xe9"
    for tool, source, to, *flags in (("pack", tmp_path / "src", out), ("split", out, out + b"2", "--test", "0.3"),
                                     ("export", out, out + b"3", "--to", "folder")):
        done = subprocess.run([sys.executable, "-m", f"data_tools.{tool}", source, to, *flags], cwd=ROOT, timeout=60,
                              capture_output=True, env=os.environ | {"PYTHONIOENCODING": "utf-8:strict"})
        assert done.returncode == 0 and rb"pack\udce9" in done.stdout, done.stderr


def deep(folder, num_bytes):
    """A folder whose path has more bytes than a path may have; and back."""
    here, name = os.getcwd(), "d" * 200
    os.chdir(folder)
    for _ in range(num_bytes // 200):
        os.mkdir(name)
        os.chdir(name)
    with open("x.png", "wb") as file:
        file.write(picture(7))
    os.chdir(here)


@pytest.mark.parametrize("num_bytes, words", [(3600, None), (4200, "File name too long")])
def test_a_path_near_the_longest(tmp_path, capsys, num_bytes, words):
    files = write_tree(tmp_path / "src", {"a": 2})
    deep(tmp_path / "src", num_bytes)
    try:
        if words:
            assert words in fails(capsys, tmp_path / "src", tmp_path / "pack")
        else:
            run(tmp_path / "src", tmp_path / "pack")
            assert contents(Pack(tmp_path / "pack")).keys() == {*files.values(), picture(7)}
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "src"], check=True)


def test_half_a_character_in_json_is_skipped(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("a.json", rb'{"label": "\ud800"}'), ("b.png", picture(1)),
                                   ("b.json", rb'{"label": "\ud83d\ude00"}')])
    run(tmp_path / "a.tar", tmp_path / "pack", "--max-skipped", 1)
    assert contents(Pack(tmp_path / "pack")) == {picture(1): "😀"}
    [[path, reason]] = skipped_rows(tmp_path / "pack")
    assert path.endswith("a.tar: a") and "surrogates" in reason


# What is empty, no plain file, or changes meanwhile.


@pytest.mark.parametrize("name, words", [("a.tar", "cut short or not a tar file"), ("a.csv", "must name the columns"),
                                         ("a.rec", "must name the columns"), ("a", "must name the columns"),
                                         ("a.parquet", "must name the columns")])
def test_an_empty_source_is_one_line(tmp_path, capsys, name, words):
    (tmp_path / name).touch()
    assert words in fails(capsys, tmp_path / name, tmp_path / "pack")
    for kind in KINDS:
        fails(capsys, tmp_path / name, tmp_path / "pack", "--from", kind)


def test_what_cannot_be_read_is_skipped(tmp_path):
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
            run(tmp_path / "src", out, "--max-skipped", 99, "--check", check, "--workers", workers)
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
            run(folder / "src", folder / "pack", "--max-skipped", 1)
        del files["a/0.png"]
        assert contents(Pack(folder / "pack")) == by_class(files)
        assert skipped_rows(folder / "pack") == [["a/0.png", "Permission denied"]]
        assert "skipped 1 images" in capsys.readouterr().err
        (folder / "src" / "b").chmod(0)
        with without_rights():
            error = fails(capsys, folder / "src", folder / "new")
        assert "Permission denied" in error and "src/b" in error
        (folder / "src" / "b").chmod(0o700)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_a_source_that_is_no_file_is_one_line(tmp_path, capsys, make):
    """Opening a pipe would wait for its writer."""
    (tmp_path / "tars").mkdir()
    (tmp_path / "list.csv").write_text("path,label\n")
    for name in "a", "tars/train-0.tar", "a.rec":
        make(tmp_path / name)
        source = tmp_path / name.partition("/")[0]
        assert f"{name}: neither a file nor a folder" in fails(capsys, source, tmp_path / "pack")
    write_rec(tmp_path / "b.rec", [image_record(1.0, picture(0))], index=False)
    make(tmp_path / "b.idx")
    assert "b.idx: neither a file nor a folder" in fails(capsys, tmp_path / "b.rec", tmp_path / "pack")


def test_files_that_vanish_or_shrink_are_skipped(tmp_path):
    files = write_tree(tmp_path / "src", {"a": 4})
    paths = [tmp_path / "src" / name for name in files]
    paths[1].unlink()
    os.truncate(paths[2], 50)
    os.truncate(paths[3], 0)
    results = check_images([(str(path), None) for path in paths], 10**6, KEPT, "full")
    assert results[0] == (picture(0), zlib.crc32(picture(0)))
    assert [data for data, _ in results[1:]] == [None] * 3 and results[1][1] == "No such file or directory"


# Bombs.


def bomb(kind):
    """An image whose reading as a whole would take gigabytes."""
    if kind == "pixels":
        return png(60000, 50000, 1000)
    if kind == "text":
        return png(2, 2, 6, (b"zTXt", b"k\0\0" + zlib.compress(bytes(2**30))))
    if kind == "profile":
        return png(2, 2, 6, (b"iCCP", b"k\0\0" + zlib.compress(bytes(2**30))))
    if kind == "data":
        return png(2, 2, 2**30)
    frames, file = [Image.fromarray(np.full((4000, 4000), i, np.uint8)) for i in range(12)], io.BytesIO()
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["pixels", "text", "profile", "data", "GIF", "TIFF"])
def test_a_bomb_takes_no_memory(tmp_path, kind):
    """Of many frames only the first is looked at, and texts are read to a limit."""
    files = write_tree(tmp_path / "src", {"a": 3})
    (tmp_path / "src" / "a" / "bomb.png").write_bytes(bomb(kind))
    code = ("import re, sys; from data_tools.pack import main; main(sys.argv[1:]); "
            "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "src", tmp_path / "pack", "--workers", "0",
                           "--max-skipped", "1"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert int(done.stdout.splitlines()[-1]) < 200_000  # KiB, of which a frame takes 16,000
    found = contents(Pack(tmp_path / "pack"))
    assert by_class(files).items() <= found.items() and len(found) + Pack(tmp_path / "pack").skipped == 4


PEAK = "import re; print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])"


def parquet_bomb(path, **columns):
    """A file of some kilobytes with rows that repeat one value."""
    table = {name: pa.DictionaryArray.from_arrays(np.zeros(200, np.int32), pa.array([value]))
             for name, value in columns.items()}
    pyarrow.parquet.write_table(pa.table(table), path, compression="zstd", dictionary_pagesize_limit=2**30)
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("kind", ["coded", "dictionary", "plain", "delta", "many"])
def test_rows_of_parquet_take_little_memory_however_large_they_are(tmp_path, kind):
    """Each kind is 100 images of 4 MB in some kilobytes."""
    path, image = tmp_path / "a.parquet", bytes(2**22)
    images = pa.DictionaryArray.from_arrays(np.zeros(100, np.int32), pa.array([image]))
    if kind in ("plain", "delta"):
        images = pa.array([image] * 100)
    elif kind == "many":
        images = pa.array([bytes([number]) * 2**22 for number in range(100)])
    encoding = {"use_dictionary": kind in ("coded", "dictionary", "many"), "store_schema": kind == "coded",
                "column_encoding": "DELTA_BYTE_ARRAY" if kind == "delta" else None, "write_batch_size": 1}
    pyarrow.parquet.write_table(pa.table({"image": images, "label": pa.array(["a"] * 100)}), path, compression="zstd",
                                dictionary_pagesize_limit=2**30 if kind in ("coded", "dictionary") else 1, **encoding)
    del images
    assert path.stat().st_size < 500_000
    code = ("import sys; from data_tools.sources import parquet_source; "
            "print(sum(len(image) for *_, image in parquet_source(sys.argv[1], None)) >> 20); " + PEAK)
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, timeout=60, stdout=subprocess.PIPE, text=True,
                          check=True)
    assert int(done.stdout.splitlines()[0]) == 400
    assert int(done.stdout.splitlines()[1]) < 250_000  # KiB, of which Python and its libraries take 60,000


def test_a_long_text_in_parquet_is_one_line_before_it_is_copied(tmp_path, capsys):
    parquet_bomb(tmp_path / "a.parquet", image=picture(0), label="n" * 2**25)
    tracemalloc.start()
    try:
        error = fails(capsys, tmp_path / "a.parquet", tmp_path / "pack")
        assert "row 1: label of 33554432 bytes, more than 4096" in error
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_images_that_are_too_large_are_skipped_in_parquet_too(tmp_path, monkeypatch):
    monkeypatch.setattr(xc.pack, "MAX_RECORD_BYTES", 4000)
    for kind in "plain", "struct":
        images = [picture(0), bytes(4001), picture(1), bytes(5000)]
        if kind == "struct":
            images = [{"bytes": image, "path": "x"} for image in images]
        source = write_parquet(tmp_path / f"{kind}.parquet", image=images, label=["a", "a", "b", "b"])
        run(source, tmp_path / kind, "--max-skipped", 2)
        assert contents(Pack(tmp_path / kind)) == {picture(0): "a", picture(1): "b"}
        assert [reason for _, reason in skipped_rows(tmp_path / kind)] == [
            f"{size} bytes, more than 4000" for size in (4001, 5000)]


def test_a_row_that_does_not_fit_into_memory_is_one_line(tmp_path):
    parquet_bomb(tmp_path / "a.parquet", image=bytes(2**27), label="a")
    code = ("import re, resource, sys, pyarrow.parquet; from data_tools.pack import main; "
            "size = int(re.search(r'VmSize:\\s*(\\d+)', open('/proc/self/status').read())[1]) * 1024 + 2**27; "
            "resource.setrlimit(resource.RLIMIT_AS, (size, size)); main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.parquet", tmp_path / "pack", "--workers", "0"],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "a.parquet: some of its rows do not fit into memory" in done.stderr


# A disk that fills up.


def test_a_disk_that_fills_up_in_any_phase_is_one_line(tmp_path):
    classes = {f"{i:04d}" + "n" * 100: 1 for i in range(700)}
    files = write_tree(tmp_path / "src", classes)
    numbered = {f"{int(name[:4])}/0.png": data for name, data in files.items()}
    write_tar(tmp_path / "a.tar", samples(numbered))
    flags = ["--workers", "0", "--memory-mb", "0.02", "--shard-mb", "0.05"]
    run(tmp_path / "a.tar", tmp_path / "unbroken", *flags)
    with small_disk(tmp_path / "disk", 64) as disk:
        refused, kilobytes, before = Counter(), 8, sorted(os.listdir(tmp_path))
        while True:
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", disk], check=True)
            done = subprocess.run([sys.executable, "-m", "data_tools.pack", tmp_path / "a.tar", disk / "pack", *flags],
                                  cwd=ROOT, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                break
            *others, error = done.stderr.splitlines()
            assert done.returncode == 2 and "No space left on device" in error, (kilobytes, done.stderr)
            assert all(line.startswith("going on behind ") for line in others)
            kept = os.listdir(disk)  # when all images are listed, and from then on
            assert error.endswith("the same command goes on from there" if kept else "nothing was kept")
            assert kept == [".pack.partial-pack"] or not (kept or refused[True])
            assert sorted(os.listdir(tmp_path)) == before
            refused[bool(kept)] += 1
            kilobytes = kilobytes * 5 // 4
        assert refused[False] > 8 and refused[True] > 1 and os.listdir(disk) == ["pack"]
        assert file_hashes(disk / "pack") == file_hashes(tmp_path / "unbroken")


def test_counts_find_no_space_before_they_are_counted(tmp_path):
    """A page of a file that the disk has no room for would kill the process when it is touched."""
    with small_disk(tmp_path / "disk", 64) as disk:
        with pytest.raises(OSError, match="No space left"):
            zeros_file(disk / "counts", 10**6)
        assert not zeros_file(disk / "few", 1000).any()


def test_no_record_is_larger_than_a_reader_takes(tmp_path, monkeypatch):
    """Whether it came so or was made so."""
    monkeypatch.setattr("xc.pack.MAX_RECORD_BYTES", 3000)
    small, large = picture(0), picture(1, size=(40, 40))
    write_parquet(tmp_path / "a.parquet", image=[small, large], label=["k", "k"])
    run(tmp_path / "a.parquet", tmp_path / "came", "--max-skipped", "1")
    write_tree(tmp_path / "tree", {"k": 2})
    (tmp_path / "tree" / "k" / "large.png").write_bytes(png(60, 60, 60 * 61))
    run(tmp_path / "tree", tmp_path / "made", "--max-skipped", "1", "--format", "raw")
    for name, number in ("came", 1), ("made", 2):
        [[_, reason]] = skipped_rows(tmp_path / name)
        assert "bytes, more than 3000" in reason and Pack(tmp_path / name).verify() == number


def test_any_number_of_sources(tmp_path):
    sources = [write_parquet(tmp_path / f"{number:03}-{'n' * 150}.parquet", image=[picture(number)], label=["k"])
               for number in range(450)]  # their names are more than HDF5 takes for an attribute
    run(*sources, tmp_path / "pack")
    assert Pack(tmp_path / "pack").verify() == 450 and Pack(tmp_path / "pack").source.endswith(" and 445 more")
