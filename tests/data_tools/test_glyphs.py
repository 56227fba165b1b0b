"""Glyphs: the same bytes from the same fonts, honest held-out faces, no blanks, boxes or twins, clean failures."""

import dataclasses
import io
import json
import os
import struct
from collections import defaultdict

import numpy as np
import pytest
from fontTools.ttLib import TTCollection, TTFont
from fontTools.ttLib.tables._c_m_a_p import CmapSubtable
from PIL import Image

from data_tools import glyphs
from data_tools.fonts import classes as font_classes
from data_tools.fonts import dataset
from data_tools.fonts import faces as font_faces

MATPLOTLIB_FONTS = font_faces.font_folders([], system=False)
LATIN, GREEK, CYRILLIC = range(0x21, 0x7F), range(0x391, 0x3CA), range(0x410, 0x450)
SOME = {*LATIN, *GREEK, *CYRILLIC, *range(0x2190, 0x21A0), *range(0x2800, 0x2810), 0xFFFC}
find_all_faces = font_faces.find_faces


@pytest.fixture(scope="module", autouse=True)
def few_code_points():
    """Lets faces have only SOME code points, so that a run takes seconds."""

    def find_faces(folders):
        faces, skipped = find_all_faces(folders)
        few = [tuple(code for code in face.code_points if code in SOME) for face in faces]
        return [dataclasses.replace(face, code_points=own) for face, own in zip(faces, few, strict=True)], skipped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "find_faces", find_faces)
        patch.setattr(font_faces, "JOB_GLYPHS", 90)  # so that a face is several jobs
        yield


@pytest.fixture(scope="module")
def made(few_code_points, tmp_path_factory):
    """A tree with all classes of SOME."""
    out = tmp_path_factory.mktemp("glyphs") / "out"
    assert run(out) == 0
    return out


def run(out, *options):
    try:
        glyphs.main([str(out), "--no-system-fonts", "--workers", "2", *map(str, options)])
    except SystemExit as end:
        return end.code
    return 0


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(folder, *splits):
    """{class: {face: image}}"""
    found = defaultdict(dict)
    for split in splits:
        for path in (folder / split).glob("*/*.png"):
            found[path.parent.name][path.stem] = np.asarray(Image.open(path))
    return found


def face_names(folder, split):
    return {path.stem for path in (folder / split).glob("*/*.png")}


def table(folder):
    header, *rows = [line.split("\t") for line in (folder / "classes.tsv").read_text(encoding="utf-8").splitlines()]
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def edited_font(path, edit):
    """A copy of DejaVu Sans at path after edit(font)."""
    font = TTFont(f"{MATPLOTLIB_FONTS[0]}/DejaVuSans.ttf")
    edit(font)
    font.save(path)
    return path


def box_for_b(font):
    font["glyf"]["B"], font["hmtx"]["B"] = font["glyf"][".notdef"], font["hmtx"][".notdef"]


def test_same_seed_gives_same_bytes_whatever_the_workers(tmp_path, capsys):
    (tmp_path / "a").mkdir()  # an empty folder is filled
    for name, options in (("a", ["--workers", 1]), ("b", ["--workers", 3]), ("other", ["--seed", 1])):
        assert run(tmp_path / name, "--classes", 40, "--size", 16, *options) == 0
    a, b, other = (tree(tmp_path / name) for name in ("a", "b", "other"))
    assert a == b and "README.txt" in a
    assert len(pixels(tmp_path / "a", "train")) == len(table(tmp_path / "a")) == 40
    assert set(a) != set(other)


def test_summary_counts_what_is_there(tmp_path, capsys):
    assert run(tmp_path / "out", "--size", 8, "--sheet", tmp_path / "sheet.png") == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])
    train, test = (pixels(tmp_path / "out", split) for split in ("train", "test"))
    assert counts["classes"] == len(train) and counts["tested_classes"] == len(test)
    assert counts["train_images"] == sum(map(len, train.values()))
    assert counts["test_images"] == sum(map(len, test.values()))
    assert counts["test_faces"] == len(face_names(tmp_path / "out", "test"))
    assert counts["faces"] == counts["test_faces"] + len(face_names(tmp_path / "out", "train"))
    for name, row in table(tmp_path / "out").items():
        assert (int(row["train_faces"]), int(row["test_faces"])) == (len(train[name]), len(test.get(name, ())))
    assert Image.open(tmp_path / "sheet.png").height == 10 * len(list(train)[:: -(-len(train) // dataset.SHEET_ROWS)])


def test_whole_typefaces_are_held_out(made):
    train, test = face_names(made, "train"), face_names(made, "test")
    families = {face.name: face.family for face in find_all_faces(MATPLOTLIB_FONTS)[0]}
    assert len(test) >= 4 and not {families[name] for name in train} & {families[name] for name in test}
    assert {path.name for path in (made / "test").iterdir()} <= {path.name for path in (made / "train").iterdir()}


def test_no_test_image_is_in_train_and_each_class_keeps_train_faces(made):
    train, test = pixels(made, "train"), pixels(made, "test")
    for name, faces in test.items():
        for image in faces.values():
            assert not any(np.array_equal(image, known) for known in train[name].values())
    assert min(map(len, train.values())) >= 3


def test_images_have_ink_within_the_margin(made):
    for faces in pixels(made, "train", "test").values():
        for image in faces.values():
            assert image.shape == (32, 32) and image.dtype == np.uint8
            assert image.min() < 128
            assert (image[[0, 1, -2, -1]] == 255).all() and (image[:, [0, 1, -2, -1]] == 255).all()
            rows, columns = np.flatnonzero((image < 255).any(1)), np.flatnonzero((image < 255).any(0))
            assert abs(rows[0] + rows[-1] - 31) <= 2 and abs(columns[0] + columns[-1] - 31) <= 2  # in the middle


def test_no_two_classes_look_the_same_in_every_face(made):
    classes = list(pixels(made, "train").values())
    for i, one in enumerate(classes):
        for other in classes[:i]:
            common = one.keys() & other.keys()
            assert not common or any(not np.array_equal(one[face], other[face]) for face in common)


def test_twins_share_a_class_and_sizes_tell_cases_apart(made):
    sans = font_faces.draw_glyphs((f"{MATPLOTLIB_FONTS[0]}/DejaVuSans.ttf", 0, [0x41, 0x391, 0x410], 32))
    assert font_classes.merge({"DejaVuSans": sans}, sorted(sans)) == {0x41: [0x41, 0x391, 0x410]}  # A of three scripts
    classes = table(made)
    assert classes["U+00048"]["characters"] == "H \u0397" and classes["U+00048"]["name"] == "LATIN CAPITAL LETTER H"
    assert "U+00397" not in classes
    assert {f"U+{ord(character):05X}" for character in "cCoO0xXzZ.,"} <= classes.keys()


def test_blank_characters_are_no_class(made):
    assert "U+02801" in table(made)
    assert not {"U+02800", "U+0FFFC"} & table(made).keys()  # an empty braille cell, a placeholder


def test_only_faces_that_show_characters_are_used():
    faces, skipped = find_all_faces(MATPLOTLIB_FONTS)
    assert {face.name.split("-")[0] for face in faces} == {"DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral"}
    assert len(faces) == 16 and skipped >= 8
    codes = set().union(*(face.code_points for face in faces))
    assert ord("A") in codes
    assert not codes & {0x20, 0xA0, 0xAD, 0x300, 0x378, 0xE000, 0xD800}


def test_last_resort_fonts_are_skipped(tmp_path):
    def same_box_for_all(font):
        cmap = CmapSubtable.newSubtable(13)
        cmap.platformID, cmap.platEncID, cmap.language, cmap.cmap = 3, 10, 0, dict.fromkeys(range(0x41, 0x5B), "B")
        font["cmap"].tables = [cmap]

    edited_font(tmp_path / "x.ttf", same_box_for_all)
    assert find_all_faces([tmp_path]) == ([], 1)


def test_missing_glyph_boxes_are_dropped(tmp_path):
    path = edited_font(tmp_path / "x.ttf", box_for_b)
    assert ord("B") in find_all_faces([tmp_path])[0][0].code_points
    assert font_faces.draw_glyphs((str(path), 0, [ord("A"), ord("B"), 0x2800], 32)).keys() == {ord("A")}


def test_only_glyphs_that_are_too_large_are_shrunk():
    em = font_faces.OVERSAMPLING * font_faces.inner_side(64)
    font = font_faces.open_face(f"{MATPLOTLIB_FONTS[0]}/DejaVuSans.ttf", 0, em)

    def ink_box(character):
        image = np.asarray(Image.open(io.BytesIO(font_faces.draw(font, character, 64)))) < 255
        return np.ptp(np.flatnonzero(image.any(1))) + 1, np.ptp(np.flatnonzero(image.any(0))) + 1

    assert max(ink_box(".")) < 10
    assert ink_box("x")[0] < 0.85 * ink_box("X")[0]
    assert ink_box("\N{LONG LEFTWARDS ARROW}")[1] == font_faces.inner_side(64)


def test_collections_count_by_face_and_equal_fonts_once(tmp_path):
    def other_face(font):
        box_for_b(font)
        for record in font["name"].names:
            if record.nameID in (1, 6, 16):
                record.string = "Other Face"

    plain = edited_font(tmp_path / "plain.ttf", lambda font: None)
    (tmp_path / "copy.TTF").write_bytes(plain.read_bytes())
    (tmp_path / "broken.otf").write_bytes(b"OTTO of no use")
    (tmp_path / "text.txt").write_text("no font")
    collection = TTCollection()
    collection.fonts = [TTFont(plain), TTFont(edited_font(tmp_path / "other.ttf", other_face))]
    (tmp_path / "in").mkdir()
    collection.save(tmp_path / "in" / "both.ttc")
    (tmp_path / "other.ttf").unlink()
    faces, skipped = find_all_faces([tmp_path])
    assert [face.name for face in faces] == ["DejaVuSans", "Other_Face"] and skipped == 1
    for face, has in zip(faces, [{"A", "B"}, {"A"}], strict=True):
        assert set(map(chr, font_faces.draw_glyphs((face.path, face.index, [ord("A"), ord("B")], 32)))) == has


def test_merge_joins_the_first_founder_that_agrees_in_every_common_face():
    images = {"f": {1: b"a", 2: b"a", 3: b"a", 4: b"b", 5: b"a"},
              "g": {1: b"a", 2: b"a", 3: b"c", 5: b"c"},
              "h": {6: b"a"}}
    # 3 differs from 1 in g; 5 looks like 3; 6 has no face in common with any
    assert font_classes.merge(images, [1, 2, 3, 4, 5, 6]) == {1: [1, 2], 3: [3, 5], 4: [4], 6: [6]}


def test_typefaces_join_families_and_faces_that_mostly_agree():
    def face(name, family):
        return font_faces.Face(name, family, "", 0, ())

    faces = [face("a", "A"), face("a2", "A"), face("b", "B"), face("c", "C")]
    images = {"a": {1: b"1", 2: b"2", 3: b"3"}, "a2": {1: b"4"}, "b": {1: b"1", 2: b"2", 3: b"0"},
              "c": {1: b"1", 2: b"5", 3: b"6"}}
    assert sorted(map(sorted, font_classes.typefaces(faces, images))) == [["a", "a2", "b"], ["c"]]


def test_hold_out_weighs_tested_classes_against_lost_ones():
    def drawn(name, codes):
        return {code: f"{name} {code}".encode() for code in codes}

    # With min_faces 4, a class needs 2 train faces. Holding out p tests 7 classes and loses 3, t 6 and none.
    images = {"p": drawn("p", range(10)), "q": drawn("q", range(1, 4)), "r": drawn("r", [0, 4, 5, 6, 9]),
              "s": drawn("s", [0, 9]), "t": drawn("t", [0, *range(4, 9)]), "u": drawn("u", range(4, 9))}
    groups = [{name} for name in images]
    classes = {code: [code] for code in range(10)}
    assert font_classes.hold_out(groups, classes, images, 1, 4) == {"t"}
    images["t"] = {code: images["p"][code] for code in images["t"]}  # now t repeats what train has
    assert font_classes.hold_out(groups, classes, images, 1, 4) != {"t"}
    with pytest.raises(font_faces.GlyphError, match="at most 3"):
        font_classes.hold_out(groups, classes, images, 4, 4)


@pytest.mark.parametrize("options, says", [
    (["--size", "7"], "--size 7"), (["--size", "513"], "8 to 512"), (["--size", "x"], "--size"),
    (["--min-faces", "1"], "--min-faces 1"), (["--min-faces", "17"], "--min-faces"),
    (["--classes", "1"], "--classes 1"), (["--classes", "100000"], "100000 needed"),
    (["--test-faces", "0"], "--test-faces 0"), (["--test-faces", "9"], "--test-faces 9"),
    (["--workers", "0"], "--workers 0"), (["--fonts", "nowhere"], "nowhere"),
    (["--sheet", "nowhere/sheet.png"], "--sheet"), (["--sheet", "."], "--sheet"), (["--colour"], "--colour"),
])
def test_bad_options_end_with_one_line_before_drawing(tmp_path, capsys, monkeypatch, options, says):
    monkeypatch.setattr(dataset, "draw_faces", None)
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "kept").write_text("kept")
    assert run(tmp_path) == 2
    assert run(tmp_path / "kept") == 2
    assert run(tmp_path / "no" / "parent") == 2
    assert capsys.readouterr().err.count("\n") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("failure, code", [(KeyboardInterrupt, 130), (OSError("disk full"), 2)])
def test_nothing_is_left_of_a_run_that_ends_early(tmp_path, monkeypatch, failure, code):
    def fail(*_):
        raise failure

    monkeypatch.setattr(dataset, "class_table", fail)  # the images are written by then
    assert run(tmp_path / "out", "--classes", 5) == code
    assert not list(tmp_path.iterdir())


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
    faces, skipped = font_faces.find_faces([tmp_path])
    assert [os.path.basename(face.path) for face in faces] == ["good.ttf"] and skipped == 1


def test_a_glyph_without_bounds_is_not_drawn(tmp_path):
    good = font_faces.open_face(str(a_font(tmp_path / "good.ttf")), 0, 64)
    assert font_faces.draw(good, "A", 32)
    wide = font_faces.open_face(str(a_font(tmp_path / "wide.ttf", units=16, side=32767)), 0, 64)
    assert font_faces.draw(wide, "A", 32) == b""
