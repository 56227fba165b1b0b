"""Strangers' files: every reader refuses in one line or accepts, whatever is in them. First what fuzzing has found."""

import functools
import io
import json
import os
import re
import struct
import sys

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

import data_tools.pack
import data_tools.show
from benchmarks import soak
from data_tools import glyphs, timeline
from tests import fuzz
from tests.launch import run
from xc import checkpoint, config, metrics, pack, synth
from xc.config import UserError
from xc.message import one_line
from xc.pack import Pack, PackError

# What was found.


def test_a_message_is_one_short_line_with_both_its_ends():
    text = one_line("begin\n" + "x" * 10**6 + "\x1b[31m\r\u2028\udc80 end")
    assert text.startswith("begin x") and text.endswith(" end") and len(text) <= 1000 and text.isprintable()
    for error in UserError, PackError:
        assert str(error("a\nb" + "x" * 10**5)).startswith("a bxxx") and len(str(error("x" * 10**5))) <= 1000


@pytest.mark.parametrize("content, words", [
    (b"@FILE", "inside of one"),  # itself: RecursionError
    (b"--data x --out 'y", "No closing quotation"),
    (b"--data x\xff --out y", "not a text in UTF-8"),
    (b"--data 'x\0' --out y", "control characters"),
    (b"--data x --out y\x1b[31m", "control characters"),
    (b"--data x --out y --seed " + b"9" * 10**5, "--seed"),
])
def test_argument_files(content, words, tmp_path):
    path = tmp_path / "some.args"
    path.write_bytes(content.replace(b"FILE", os.fsencode(path)))
    with pytest.raises(UserError, match=words) as error:
        config.parse([f"@{path}"])
    assert "\n" not in str(error.value) and len(str(error.value)) <= 1000


@pytest.mark.parametrize("value", ["null", '"5"', "[]", "1e3", "[" * 10**5 + "]" * 10**5])
def test_odd_lines_of_metrics_are_dropped(value, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": ' + value.encode() + b'}\n\xff\xfe\n{"step": 2}\n')
    metrics._open_after(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_deeply_nested_meta_json(tmp_path):
    (tmp_path / "meta.json").write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoint.read_meta(tmp_path)


@pytest.mark.parametrize("name, shape", [("u.0", ()), ("u.0", (1, 1)), ("w.0", (1,)), ("u.x", (1,)), ("u", (1,))])
def test_residuals_that_do_not_fit(name, shape, tmp_path):
    fuzz.make_runs(tmp_path)
    folder = tmp_path / "dgc/checkpoints/step-00000004"
    save_file({name: torch.ones(shape)}, next(folder.glob("residuals-*")))
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoint.load(folder, fuzz.a_state(fuzz.SETTINGS["dgc"], begun=False), fuzz.IDENTITY)


def test_a_negative_dim_of_synthetic_images():
    with pytest.raises(UserError, match="dim=-1 is not allowed"):
        synth.Spec.parse("synth:classes=5,dim=-1,images=1")


def test_a_timeline_that_is_no_text(tmp_path, capsys):
    (tmp_path / "timeline.json").write_bytes(b'{"traceEvents": ["' + b"x" * 10**6 + b'\xff"]}')
    with pytest.raises(SystemExit):
        data_tools.show.main([str(tmp_path / "timeline.json")])
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and len(text) < 1100


@pytest.mark.parametrize("key, value", [("pid", float("inf")), ("ts", 10**400), ("tid", "%s"), ("tid", None)],
                         ids=["rank", "time", "format", "none"])
def test_a_timeline_of_odd_numbers(key, value, tmp_path):
    fuzz.make_timeline(tmp_path)
    events = json.loads((tmp_path / "timeline.json").read_text())
    events["traceEvents"][2][key] = value
    (tmp_path / "timeline.json").write_text(json.dumps(events))
    with pytest.raises(timeline.TimelineError, match="is not a timeline"):
        timeline.read(tmp_path / "timeline.json")


def test_a_picture_does_not_grow_without_bound(tmp_path):
    spans = [(0, "compute", number, "a", 0.0, 1.0) for number in range(2001)]
    with pytest.raises(timeline.TimelineError, match="2001 lanes"):
        timeline.draw(spans, "step 1", tmp_path / "steps.png")


@pytest.mark.parametrize("text", ["\udc80", "$\\frac$", "a\nb", "x" * 2000])
def test_a_timeline_with_odd_names_is_drawn(text, tmp_path):
    fuzz.make_timeline(tmp_path)
    path = tmp_path / "timeline.json"
    events = json.loads(path.read_text())
    for event in events["traceEvents"]:
        event["name"] = text
        event["cat"] = text if event.get("cat") == "network" else event.get("cat")
    path.write_text(json.dumps(events))
    data_tools.show.main([str(path), "--plot", str(tmp_path / "steps.png")])
    assert Image.open(tmp_path / "steps.png").width == 12 * 130


@pytest.fixture
def a_pack(tmp_path):
    """A pack of 3 records in one shard, and a file of it as h5py opens it to write."""
    for number in range(3):
        (tmp_path / "tree" / "c").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(tmp_path / "tree" / "c" / f"{number}.png")
    data_tools.pack.main([str(tmp_path / "tree"), str(tmp_path / "pack"), "--workers", "0"])
    return tmp_path / "pack"


def test_attributes_that_are_no_scalars_of_fixed_length_are_not_read(a_pack):
    """HDF5 loops for ever on a damaged heap of texts of variable length; an array of them can outgrow the file."""
    for value in "xc-pack", np.array(["xc-pack"] * 1000, object), np.full(1000, b"xc-pack"), h5py.Empty("S7"):
        with h5py.File(a_pack / "index.h5", "r+") as index:
            del index.attrs["format"]
            index.attrs["format"] = value
        with pytest.raises(PackError, match="attribute format must be a text of fixed length, not None"):
            Pack(a_pack)


def test_a_pack_has_no_text_of_variable_length(a_pack):
    for path in a_pack.glob("*.h5"):
        with h5py.File(path) as file:
            assert {file.attrs.get_id(name).dtype.kind for name in file.attrs} == {"i", "S"}
        assert b"GCOL" not in path.read_bytes()  # the heap's signature


def test_no_more_records_than_a_file_can_hold(a_pack):
    """Who orders the records makes a permutation of them: its memory must not go by a number alone."""
    with h5py.File(a_pack / "index.h5", "r+") as index:
        index.attrs["num_records"] = np.int64(2**40)
        index["shard_records"][0] = 2**40
    with pytest.raises(PackError, match="shard_records"):
        Pack(a_pack)


@pytest.mark.parametrize("mode", ["LAB"])
def test_an_image_that_packs_also_decodes(mode):
    file = io.BytesIO()
    Image.new("RGB", (3, 3)).convert(mode).save(file, "TIFF")
    with pytest.raises(ValueError, match="does not convert"):
        pack.open_image(file.getvalue())


def a_font(path, **changes):
    """A font with a square for A; `changes` {table: raw bytes}."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from fontTools.ttLib.tables.DefaultTable import DefaultTable

    builder, pen = FontBuilder(changes.pop("units", 1000), isTTF=True), TTGlyphPen(None)
    side = changes.pop("side", 500)
    pen.moveTo((0, 0))
    for corner in (0, side), (side, side), (side, 0):
        pen.lineTo(corner)
    pen.closePath()
    glyph = pen.glyph()
    builder.setupGlyphOrder([".notdef", "A"])
    builder.setupCharacterMap({65: "A"})
    builder.setupGlyf({".notdef": glyph, "A": glyph})
    builder.setupHorizontalMetrics({name: (600, 0) for name in (".notdef", "A")})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"psName": "Some", "familyName": "Some"})
    builder.setupOS2()
    builder.setupPost()
    for name, content in changes.items():
        builder.font[name] = DefaultTable(name)
        builder.font[name].data = content
    builder.save(path)
    return path


def test_fonts_that_never_end_or_claim_all_memory(tmp_path):
    a_font(tmp_path / "good.ttf")
    os.mkfifo(tmp_path / "pipe.ttf")
    os.symlink("/dev/zero", tmp_path / "endless.ttf")
    count, length = 20_000, 60_000  # names that all lie in the same place: 1.2 GB in 300 kB
    names = b"".join(struct.pack(">6H", 3, 1, 0x409, number, length, 0) for number in range(count))
    a_font(tmp_path / "huge.ttf", name=struct.pack(">3H", 0, count, 6) + names)
    faces, skipped = glyphs.find_faces([tmp_path])
    assert [os.path.basename(face.path) for face in faces] == ["good.ttf"] and skipped == 1


def test_a_glyph_without_bounds_is_not_drawn(tmp_path):
    good = glyphs.open_face(str(a_font(tmp_path / "good.ttf")), 0, 64)
    assert glyphs.draw(good, "A", 32)
    wide = glyphs.open_face(str(a_font(tmp_path / "wide.ttf", units=16, side=32767)), 0, 64)
    assert glyphs.draw(wide, "A", 32) == b""


# Every reader, and the fuzzing itself.


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Cases of a target by its name; their files are made once."""
    return functools.cache(lambda name: fuzz.Cases(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", fuzz.TARGETS)
@settings(derandomize=True, database=None, deadline=None, max_examples=40,
          suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])
@given(random=st.randoms(use_true_random=False))
def test_a_reader_accepts_or_refuses_in_one_line(name, cases, random):
    cases(name).run(random)


def misread(folder, out):
    """A reader that does what the file in its folder says."""
    what = (folder / "what").read_text()
    if what == "write":
        (out.parent / "elsewhere").write_text("")
    if what == "delete":
        (folder / "what").unlink()
    if what == "take":
        np.ones(30 * 2**17)
    if what == "lines":
        raise ValueError("two\nlines")
    if what == "another":
        raise KeyError("x")
    if what == "claim":
        try:
            np.ones(2**62, np.uint8)
        except MemoryError as error:
            raise ValueError("refused") from error
    if what == "refuse":
        raise ValueError("refused")
    (out / "result").write_text("")


@pytest.mark.parametrize("what, outcome", [
    ("write", "outside"), ("delete", "outside"), ("take", "MB"), ("lines", "one line"), ("another", "KeyError"),
    ("claim", "memory"), ("refuse", None), ("accept", None)])
def test_what_a_reader_must_not_do_is_a_finding(what, outcome, tmp_path):
    target = fuzz.Target(None, None, misread, (ValueError,), memory_mb=20)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "what").write_text(what)
    if outcome is None:
        assert fuzz.attempt(target, tmp_path) == {"refuse": "refused", "accept": "accepted"}[what]
        return
    with pytest.raises(fuzz.Finding, match=outcome):
        fuzz.attempt(target, tmp_path)


@pytest.mark.parametrize("program, failure", [
    ("print(1)", r"^$"), ("import os; print(1, flush=True); os.abort()", "SIGABRT"),
    ("print(1, flush=True); raise SystemExit(3)", "exit code 3"),
    ("import time; print(1, flush=True); time.sleep(60)", "hangs")])
def test_a_child_that_crashes_or_hangs_is_seen(program, failure):
    lines, found = soak.watch([sys.executable, "-c", program], silence=5)
    assert lines == ["1"] and re.search(failure, found)


def test_a_soak_counts_its_cases_and_leaves_nothing(tmp_path):
    done = run(sys.executable, "benchmarks/soak.py", "fuzz", "--minutes", 0.02, "--targets", "synth", "--findings",
               tmp_path / "findings")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["findings"] == 0 and facts["cases"] == facts["accepted"] + facts["refused"] > 0
    assert not (tmp_path / "findings").exists()
