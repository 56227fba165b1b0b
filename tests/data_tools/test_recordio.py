"""RecordIO: parts are joined again, what is damaged is one line, what is no image of a class is counted."""


import numpy as np
import pytest

import xc.data.pack
from data_tools.sources import recordio
from tests.support.commands import pack_fails, run_pack
from tests.support.images import picture
from tests.support.packs import contents
from tests.support.sources import image_record, record_part, skipped_rows, write_rec
from xc.data.pack import Pack


def test_recordio_is_cut_at_the_magic_number_and_joined_again(tmp_path):
    random = np.random.default_rng(0)
    cases = [b"", b"x", recordio.MAGIC, recordio.MAGIC * 3, b"ab" + recordio.MAGIC]
    cases += [b"".join(random.choice([recordio.MAGIC, b"abcd", b"x"], 9)) for _ in range(50)]
    path = write_rec(tmp_path / "a.rec", cases)
    assert sum(case.count(recordio.MAGIC) for case in cases) > 50
    kinds = {path.read_bytes()[place + 7] >> 5 for place, _ in recordio.read_records(path)}
    assert kinds == {recordio.WHOLE, recordio.FIRST}
    assert [data for _, data in recordio.read_records(path, tmp_path / "a.idx")] == cases


def test_a_rec_that_is_cut_or_damaged_is_one_line(tmp_path, capsys):
    images = [image_record(1.0, picture(i)) for i in range(3)]
    whole = write_rec(tmp_path / "whole.rec", images, index=False).read_bytes()
    second = [place for place, _ in recordio.read_records(tmp_path / "whole.rec")][1]
    for length in (4, 7, 8, 100, second + 2, second + 8, len(whole) - 1):
        (tmp_path / "a.rec").write_bytes(whole[:length])
        assert "cut short" in pack_fails(capsys, tmp_path / "a.rec", tmp_path / "pack"), length
    for data in (whole[:second] + b"abcd" + whole[second + 4 :], b"abcd" + whole,
                 record_part(recordio.LAST, b"x") + whole, record_part(recordio.FIRST, b"x") + whole):
        (tmp_path / "a.rec").write_bytes(data)
        error = pack_fails(capsys, tmp_path / "a.rec", tmp_path / "pack", "--from", "recordio")
        assert "a.rec: no record at byte" in error
    (tmp_path / "a.rec").write_bytes(whole[:second] + record_part(recordio.FIRST, b"x"))
    assert "cut short" in pack_fails(capsys, tmp_path / "a.rec", tmp_path / "pack")


def test_records_that_hold_no_image_of_a_class_are_counted(tmp_path, monkeypatch):
    image = picture(0)
    bad = [image_record(label, picture(1)) for label in (-1.0, 0.5, float("nan"), float("inf"))]
    bad += [b"short", recordio.IMAGE.pack(2**32 - 1, 0.0, 0, 0) + b"x", image_record(3.0, b"hello"),
            image_record(3.0, bytes(5000)), image_record(3.0, recordio.MAGIC * 1500)]
    write_rec(tmp_path / "a.rec", [*bad, image_record(3.0, image)])
    monkeypatch.setattr(xc.data.pack, "MAX_RECORD_BYTES", 4000)
    run_pack(tmp_path / "a.rec", tmp_path / "pack", "--max-skipped", len(bad))
    assert contents(Pack(tmp_path / "pack")) == {image: "3"}
    rows = skipped_rows(tmp_path / "pack")
    assert len(rows) == len(bad) and sum(reason == "more than 4000 bytes" for _, reason in rows) == 2


def test_labels_that_float32_does_not_tell_apart_are_one_line(tmp_path, capsys):
    below, first = float(2**24 - 1), float(2**24)
    write_rec(tmp_path / "a.rec", [image_record(below, picture(0)), image_record([first], b"")])
    run_pack(tmp_path / "a.rec", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == {picture(0): str(2**24 - 1)}
    write_rec(tmp_path / "a.rec", [image_record(below, picture(0)), image_record([first], picture(1))])
    capsys.readouterr()
    error = pack_fails(capsys, tmp_path / "a.rec", tmp_path / "new")
    assert "a.rec: record 1: label 16777216, but" in error and "from another source" in error


@pytest.mark.parametrize("text", [lambda text: text + "\n\r\n \n", lambda text: text.replace("\n", "\n\n")])
def test_blank_lines_of_an_index_say_nothing(tmp_path, text):
    write_rec(tmp_path / "a.rec", [image_record(1.0, picture(i)) for i in range(3)])
    (tmp_path / "a.idx").write_text(text((tmp_path / "a.idx").read_text()))
    run_pack(tmp_path / "a.rec", tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == {picture(i): "1" for i in range(3)}


@pytest.mark.parametrize("text, words", [
    (lambda text: text + "\n\n9\t0\n", "line 6 is of byte 0, but"),
    (lambda text: text + "9\t0\n", "line 4 is of byte 0, but"),
    (lambda text: text[: text.rindex("2\t")], "has no more lines, but"),
    (lambda text: text.replace("\n1\t", "\n1\t1"), "line 2 is of byte 1"),
    (lambda text: text.replace("\t", ","), "line 1 is of no byte"),
    (lambda text: "\0" * 9999, "line 1 is of no byte"),
    (lambda text: "", "has no more lines"),
])
def test_an_index_that_is_not_that_of_the_rec_is_one_line(tmp_path, capsys, text, words):
    write_rec(tmp_path / "a.rec", [image_record(1.0, picture(i)) for i in range(3)])
    (tmp_path / "a.idx").write_text(text((tmp_path / "a.idx").read_text()))
    error = pack_fails(capsys, tmp_path / "a.rec", tmp_path / "pack")
    assert "a.idx: " in error and words in error
    (tmp_path / "a.idx").unlink()
    run_pack(tmp_path / "a.rec", tmp_path / "pack")
