"""Tar shards: what cannot be taken is counted, what is damaged or hostile is one line."""

import codecs
import io
import tarfile
import tracemalloc

import pytest

from data_tools.packing.skipped import Skipped
from data_tools.sources import webdataset
from data_tools.sources.base import Reading
from data_tools.sources.samples import MAX_LABELS
from tests.support.commands import pack_fails, run_pack
from tests.support.images import by_class, picture, png, write_tree
from tests.support.packs import contents
from tests.support.sources import odd, samples, skipped_rows, write_tar
from xc.data.pack import Pack


def test_members_that_are_not_taken_from_a_tar_are_counted(tmp_path, capsys):
    """Each image of the tar that is not packed is named, and each label without an image."""
    image = picture(0)
    members = [
        ("/etc/x.png", image), ("/etc/x.cls", b"a"), ("../x.png", image), ("a/../../y.png", image),
        (odd("link.png", tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
        (odd("hard.png", tarfile.LNKTYPE, linkname="0.png"), b""),
        (odd("device.png", tarfile.CHRTYPE, devmajor=1, devminor=5), b""), (odd("pipe.png", tarfile.FIFOTYPE), b""),
        ("long.json", b"1" * 70_000), ("nolabel.png", image), ("noimage.cls", b"3"), ("two.png", image),
        ("two.jpg", image), ("two.cls", b"a"), ("conflict.png", image), ("conflict.cls", b"a"),
        ("conflict.json", b'{"label": "b"}'), ("names.png", image), ("names.cls", b"1"),
        ("names.json", b'{"label": 2, "xc_class_name": "b"}'), ("noname.png", image),
        ("noname.json", b'{"label": 2, "xc_class_name": 3}'), ("list.png", image), ("list.json", b"[1]"),
        ("deep.png", image), ("deep.json", b"[" * 60_000), ("broken.png", image), ("broken.json", b"{"),
        ("true.png", image), ("true.json", b'{"label": true}'), ("real.png", image), ("real.json", b'{"label": 1.5}'),
        ("empty.png", image), ("empty.cls", b" \n"), ("latin.png", image), ("latin.cls", b"caf\xe9"),
        ("notimage.png", b"hello"), ("notimage.cls", b"a"), ("huge.png", png(60000, 50000, 1000)), ("huge.cls", b"a"),
        (".hidden.png", image), (".hidden.cls", b"a"), ("notes.md", b"text"), ("README.md", b"text"),
        ("._two.png", b"of macOS")]
    good = write_tree(tmp_path / "good", {"a": 3, "ü " + "n" * 150: 2}, first=10)
    for i, (name, data) in enumerate(good.items()):
        members += [(f"ö{'x' * 180}/{i}.PNG", data), (f"ö{'x' * 180}/{i}.cls", name.rpartition("/")[0].encode()),
                    (f"ö{'x' * 180}/{i}.txt", b"a caption"), (f"ö{'x' * 180}/{i}.mask.npy", b"numbers")]
    write_tar(tmp_path / "a.tar", members)
    run_pack(tmp_path / "a.tar", tmp_path / "pack", "--max-skipped", 100)
    assert contents(Pack(tmp_path / "pack")) == by_class(good)
    names = [member if isinstance(member, str) else member.name for member, _ in members]
    unused = [name for name in names if name.endswith((".png", ".jpg")) and name != "._two.png"]
    unused += ["/etc/x.cls", "long.json", "noimage.cls", ".hidden.cls", "notes.md"]
    rows = skipped_rows(tmp_path / "pack")
    assert sorted(path for path, _ in rows) == sorted(f"{tmp_path}/a.tar: {name}" for name in unused)
    assert Pack(tmp_path / "pack").skipped == len(rows)
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "good", "pack"}
    assert "allows 0" in pack_fails(capsys, tmp_path / "a.tar", tmp_path / "pack2", "--max-skipped", "0")


def test_a_byte_order_mark_is_no_part_of_a_label(tmp_path):
    marked = [("a.cls", b"cat"), ("b.cls", codecs.BOM_UTF8 + b"cat"), ("c.json", codecs.BOM_UTF8 + b'{"label": "cat"}')]
    write_tar(tmp_path / "a.tar", [member for i, (name, data) in enumerate(marked)
                                   for member in ((f"{name[0]}.png", picture(i)), (name, data))])
    run_pack(tmp_path / "a.tar", tmp_path / "pack", "--max-skipped", 0)
    assert contents(Pack(tmp_path / "pack")) == {picture(i): "cat" for i in range(3)}


def test_a_tar_that_is_cut_anywhere_is_one_line(tmp_path, capsys):
    files = write_tree(tmp_path / "src", {"0": 2})
    whole = write_tar(tmp_path / "whole.tar", samples(files)).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for length in (0, 1, 511, 512, 700, 1024, 1536, 2048, end, (end + 511) // 512 * 512, (end + 1023) // 512 * 512):
        (tmp_path / "cut.tar").write_bytes(whole[:length])
        error = pack_fails(capsys, tmp_path / "cut.tar", tmp_path / "pack")
        assert "cut.tar: cut short or not a tar file" in error, length
    (tmp_path / "cut.tar").write_bytes(b"not a tar file" * 1000)
    assert "cut.tar: cut short or not a tar file" in pack_fails(capsys, tmp_path / "cut.tar", tmp_path / "pack")


def test_a_tar_header_cannot_fill_the_memory(tmp_path, capsys):
    for kind in webdataset.HEADERS:
        header = odd("x", kind, size=2**21).tobuf(tarfile.GNU_FORMAT)
        (tmp_path / "a.tar").write_bytes(header + b"1" * 2**21 + bytes(1024))
        assert "a header of 2097152 bytes" in pack_fails(capsys, tmp_path / "a.tar", tmp_path / "pack")


def test_a_tar_header_for_all_members_has_few_keys(tmp_path, capsys):
    """tarfile copies them for each member that has a header of its own."""
    files = write_tree(tmp_path / "src", {"0": 2})
    for count in webdataset.MAX_GLOBAL_KEYS, webdataset.MAX_GLOBAL_KEYS + 1:
        keys = {f"key{i}": "x" for i in range(count)}
        with tarfile.open(tmp_path / "a.tar", "w", pax_headers=keys) as tar:
            for name, data in samples(files):
                tar.addfile(odd(name, size=len(data)), io.BytesIO(data))
        if count == webdataset.MAX_GLOBAL_KEYS:
            run_pack(tmp_path / "a.tar", tmp_path / "few")
            assert contents(Pack(tmp_path / "few")) == by_class(files)
    assert "a.tar: cut short or not a tar file: global headers of 257 keys" in pack_fails(capsys, tmp_path / "a.tar",
                                                                                    tmp_path / "pack")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_chain_of_tar_headers_is_one_line(tmp_path, capsys, kind):
    header = odd("x", kind, size=512).tobuf(tarfile.GNU_FORMAT) + b"9 a=bcde\n".ljust(512, b"\0")
    (tmp_path / "a.tar").write_bytes(header * 2000 + bytes(1024))
    assert "a.tar: a member has too many headers" in pack_fails(capsys, tmp_path / "a.tar", tmp_path / "pack")


@pytest.mark.parametrize("name, size, reason", [
    ("a.png", 2**18, "several images"), ("a.cls", 2**16, f"more than {MAX_LABELS} files with a label")])
def test_a_sample_cannot_fill_the_memory(tmp_path, name, size, reason):
    image = picture(1)
    write_tar(tmp_path / "a.tar", [("a.jpg", image), *[(name, b"1" * size)] * 100, ("b.png", image), ("b.cls", b"1")])
    with Skipped(tmp_path / "skipped.tsv", "101") as skipped:
        tracemalloc.start()
        try:
            records = list(webdataset.records(str(tmp_path / "a.tar"), Reading(), skipped))
            assert tracemalloc.get_traced_memory()[1] < 10 * size + 2**20
        finally:
            tracemalloc.stop()
    assert [data for *_, data in records] == [image] and reason in str(skipped.tally)
    assert skipped.tally.count == (101 if name == "a.png" else 1)  # images


@pytest.mark.parametrize("size", [2**40, 2**70])
def test_a_tar_member_that_claims_more_than_the_file_is_one_line(tmp_path, capsys, size):
    """tarfile looked for the end of it without end."""
    for name in "x.png", "x.txt":
        (tmp_path / "a.tar").write_bytes(odd(name, size=size).tobuf(tarfile.GNU_FORMAT) + bytes(2048))
        assert f"ends inside {name}" in pack_fails(capsys, tmp_path / "a.tar", tmp_path / "pack")


def test_a_class_name_has_an_end(tmp_path, capsys):
    write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("a.cls", b"n" * 4097)])
    assert "has 4097 bytes, more than 4096" in pack_fails(capsys, tmp_path / "a.tar", tmp_path / "pack")
    write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("a.cls", b"n" * 4096)])
    run_pack(tmp_path / "a.tar", tmp_path / "pack")
    assert Pack(tmp_path / "pack").class_name(0) == "n" * 4096


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
            error = pack_fails(capsys, tmp_path / "a.tar", tmp_path / "pack")
            assert "a.tar: cut short or not a tar file" in error
            assert start == 0 or f"no header at byte {start}" in error


def test_tars_that_were_joined_are_refused(tmp_path, capsys):
    files = write_tree(tmp_path / "src", {"0": 2})
    one = write_tar(tmp_path / "a.tar", samples(files)).read_bytes()
    (tmp_path / "a.tar").write_bytes(one + one)
    assert "no header at byte" in pack_fails(capsys, tmp_path / "a.tar", tmp_path / "pack")
    (tmp_path / "a.tar").write_bytes(one + bytes(2**20))  # tapes are filled up
    run_pack(tmp_path / "a.tar", tmp_path / "pack")
    assert len(Pack(tmp_path / "pack")) == 2


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_is_named_so(tmp_path, capsys, mode):
    for name in "a.tar", f"a.tar.{mode}", "a":
        with tarfile.open(tmp_path / name, f"w:{mode}") as tar:
            tar.addfile(odd("0.png"), io.BytesIO())
        assert f"{name}: compressed; unpack it first" in pack_fails(capsys, tmp_path / name, tmp_path / "pack")


def test_half_a_character_in_json_is_skipped(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.png", picture(0)), ("a.json", rb'{"label": "\ud800"}'), ("b.png", picture(1)),
                                   ("b.json", rb'{"label": "\ud83d\ude00"}')])
    run_pack(tmp_path / "a.tar", tmp_path / "pack", "--max-skipped", 1)
    assert contents(Pack(tmp_path / "pack")) == {picture(1): "😀"}
    [[path, reason]] = skipped_rows(tmp_path / "pack")
    assert path.endswith("a.tar: a.png") and "surrogates" in reason
