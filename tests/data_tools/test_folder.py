"""Trees of images: names of all kinds, links, hidden files."""

import os
import subprocess
import unicodedata

import pytest

from tests.support.commands import pack_fails, run_pack
from tests.support.images import by_class, picture, write_tree
from tests.support.packs import contents
from tests.support.sources import skipped_rows
from xc.data.pack import Pack


def test_links_and_hidden_files(tmp_path, capsys):
    write_tree(tmp_path / "outside", {"secret": 2}, first=50)
    files = write_tree(tmp_path / "src", {"a": 2})
    (tmp_path / "src" / "out").symlink_to(tmp_path / "outside")
    (tmp_path / "src" / "a" / "loop").symlink_to(tmp_path / "src")
    (tmp_path / "outside" / "secret" / "back").symlink_to(tmp_path / "src" / "out")
    (tmp_path / "src" / "gone").symlink_to(tmp_path / "nowhere")
    for hidden in ".git", ".thumbs":
        (tmp_path / "src" / hidden).mkdir()
        (tmp_path / "src" / hidden / "x.png").write_bytes(picture(60))
    (tmp_path / "src" / "a" / ".1.png").write_bytes(picture(61))
    (tmp_path / "src" / "a" / "notes.txt").write_text("x")
    (tmp_path / "src" / "a" / "0.txt").write_text("of 0.png")
    run_pack(tmp_path / "src", tmp_path / "pack", "--max-skipped", 6)
    assert contents(Pack(tmp_path / "pack")) == by_class(files) | {picture(50): "out/secret", picture(51): "out/secret"}
    reasons = dict(skipped_rows(tmp_path / "pack"))
    assert reasons.keys() == {"a/loop", "out/secret/back", "gone", ".thumbs/x.png", "a/.1.png", "a/notes.txt"}
    assert "a link" in reasons["a/loop"] and "hidden" in reasons[".thumbs/x.png"]


def test_names_of_folders_and_files_come_back(tmp_path, capfd):
    names = ["é", unicodedata.normalize("NFD", "é"), "\u202eabc", "😀/👩‍👩‍👧", "日" * 80, " ", "a b\tc", "-", "'\""]
    files = write_tree(tmp_path / "src", {name: 2 for name in names})
    bad = tmp_path / "src" / "é" / os.fsdecode(b"caf\xe9.png")  # a name, not that of a class, may be in any encoding
    bad.write_bytes(picture(99))
    out = tmp_path / os.fsdecode(b"pack\xe9")
    (tmp_path / "src" / "é" / os.fsdecode(b"bad\xe9.png")).write_bytes(b"bad")
    (tmp_path / "src" / "é" / "\u202e\x1b[31m.png").write_bytes(b"bad")
    run_pack(tmp_path / "src", out, "--max-skipped", 2)
    assert contents(Pack(out)) == by_class(files) | {picture(99): "é"}
    assert b"bad\xe9.png\t" in (out / "skipped.tsv").read_bytes()
    said = capfd.readouterr().err
    assert "skipped 2 images" in said and "\x1b" not in said and said.count("\n") == 2  # and two spellings of é


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
            assert words in pack_fails(capsys, tmp_path / "src", tmp_path / "pack")
        else:
            run_pack(tmp_path / "src", tmp_path / "pack")
            assert contents(Pack(tmp_path / "pack")).keys() == {*files.values(), picture(7)}
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "src"], check=True)
