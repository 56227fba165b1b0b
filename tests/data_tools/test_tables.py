"""Tables of images as people have them: columns, dialects, encodings, JSON Lines, lists; errors name the place."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest

import data_tools.pack
from tests.support.commands import pack_fails, refused, run_pack
from tests.support.images import picture, write_tree
from tests.support.packs import contents
from tests.support.sources import skipped_rows, table, write_parquet
from xc.data.pack import Pack

KINDS = ["csv", "jsonl", "parquet"]


@pytest.fixture
def names(tmp_path):
    return list(write_tree(tmp_path, {"p": 3}))


def packed(tmp_path, source, *flags):
    """Class names of the images 0, 1, 2 of a source; None of one that is not packed."""
    run_pack(source, tmp_path / "pack", *flags)
    found = contents(Pack(tmp_path / "pack"))
    return [found.get(picture(number)) for number in range(3)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path, label", [
    ("file", "class"), ("file_name", "category"), ("filename", "class_name"), ("filepath", "target"), ("image", "sku"),
    ("Path", "product_id"), (" FILE_NAME ", "Label")])
def test_usual_names_of_columns_are_found_and_said(tmp_path, capsys, names, kind, path, label):
    source = table(tmp_path / f"a.{kind}", {"number": [1, 2, 3], label: ["a", "b", "a"], path: names})
    assert packed(tmp_path, source) == ["a", "b", "a"]
    said = f"columns: path = {path.strip().lower()}, label = {label.strip().lower()}"
    assert (said in capsys.readouterr().err) == ((path, label) != ("Path", "label"))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_can_be_named(tmp_path, capsys, names, kind):
    source = table(tmp_path / f"a.{kind}", {"path": ["x", "y", "z"], "label": ["1", "2", "3"], "Photo": names,
                                            "Family": ["a", "b", "c"], "odds": [1, 0.5, 2]})
    flags = "--path-column", "photo", "--label-column", "Family", "--weight-column", "odds"
    assert packed(tmp_path, source, *flags) == ["a", "b", "c"] and Pack(tmp_path / "pack").has_weights
    error = pack_fails(capsys, source, tmp_path / "new", "--label-column", "familly")
    assert "--label-column familly: no such column; it has the columns 'path', 'label', 'photo', 'family'" in error
    error = pack_fails(capsys, source, tmp_path / "new", "--label-column", "path")
    assert "one column is taken for two things" in error
    source = table(tmp_path / f"b.{kind}", {"path": names, "label": ["1", "2", "3"], "class_name": ["a", "b", "c"]})
    run_pack(source, tmp_path / "numbers")
    assert "column label gives the class, not class_name; --label-column names another" in capsys.readouterr().err


DIALECTS = {
    "semicolons": "path;label\n{0};a\n{1};b\n{2};a, c\n", "tabs": "path\tlabel\n{0}\ta\n{1}\tb\n{2}\ta, c\n",
    "bars": "path|label\n{0}|a\n{1}|b\n{2}|a, c\n", "quotes": '"path","label"\n"{0}","a"\n"{1}",b\n{2},"a, c"\n',
    "empty columns": 'path,label,,\n{0},a,,\n{1},b,,\n{2},"a, c",,\n,,,\n',
    "some quotes": 'path;label\n{0};a\n"{1}";b\n{2};"a, c"',
    "windows": "path;label\r\n{0};a\r\n\r\n{1};b\r\n{2};a, c\r\n"}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_of_csv(tmp_path, names, dialect):
    (tmp_path / "a.csv").write_bytes(DIALECTS[dialect].format(*names).encode())
    assert packed(tmp_path, tmp_path / "a.csv") == ["a", "b", "a, c"]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_a_table_without_a_header(tmp_path, capsys, names, mark):
    rows = [(name, label, split) for name, label, split in zip(names, "aba", ["train"] * 3, strict=True)]
    (tmp_path / "a.csv").write_text("\n".join(map(mark.join, rows)))
    assert "give --no-header" in pack_fails(capsys, tmp_path / "a.csv", tmp_path / "new")
    run_pack(tmp_path / "a.csv", tmp_path / "packs", "--no-header")
    assert sorted(contents(Pack(tmp_path / "packs" / "train")).values()) == ["a", "a", "b"]
    (tmp_path / "b.csv").write_text("\n".join(mark.join((label, "x", name)) for name, label, _ in rows))
    flags = "--no-header", "--path-column", 3, "--label-column", 1, "--split-column", ""
    assert packed(tmp_path, tmp_path / "b.csv", *flags) == ["a", "b", "a"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16", "utf-16-le", "shift-jis"])
@pytest.mark.parametrize("kind", ["csv", "txt"])
def test_encodings(tmp_path, names, encoding, kind):
    name = "木" if encoding == "shift-jis" else "Möbel"
    text = {"csv": "path,label\n{0},a\n{1},{3}\n{2},b\n", "txt": "{0} a\n{1} {3}\n{2} b\n"}[kind].format(*names, name)
    (tmp_path / f"a.{kind}").write_bytes(text.encode(encoding))
    flags = ["--encoding", encoding] + ["--from", "list"] * (kind == "txt")
    assert packed(tmp_path, tmp_path / f"a.{kind}", *flags) == ["a", name, "b"]


@pytest.mark.parametrize("kind, row, place", [
    ("csv", "{0},caf\xe9\n", "line 3, column 12: byte 0xe9 is not utf-8"),
    ("csv", '"{0}" x,caf\n', "line 3: not in the format CSV"),
    ("csv", "{0},a,b\n", "line 3: 3 cells, but the header has 2"),
    ("jsonl", '{{"path": "{0}", "label": "caf\xe9"}}\n', "line 3, column 34: byte 0xe9 is not utf-8"),
    ("jsonl", '{{"path": "{0}", "label": }}\n', "line 3, column 30: not JSON"),
    ("jsonl", '{{"path": "{0}"}}\n', "line 3: no field 'label', which the first line has"),
    ("jsonl", '{{"path": "{0}", "label": [1]}}\n', "line 3: field 'label' is [1], neither a text nor a number"),
    ("jsonl", "[1]\n", "line 3: not an object"),
    ("lst", "1\t{0}\n", "line 3: not a number, a label in numbers and a path"),
    ("lst", "x\t1\t{0}\n", "line 3: not a number"), ("txt", "{0}\n", "line 3: not a path, a space and a label"),
    ("csv", "/elsewhere/x.png,a\n", "line 3: path '/elsewhere/x.png' does not lie below")])
def test_errors_name_the_place(tmp_path, capsys, names, kind, row, place):
    good = {"csv": "path,label\n{0},a\n", "jsonl": '{{"path": "{0}", "label": "a"}}\n' * 2, "lst": "1\t0\t{0}\n" * 2,
            "txt": "{0} a\n" * 2}[kind]
    (tmp_path / f"a.{kind}").write_bytes((good + row).format(names[0]).encode("latin-1"))
    assert f"a.{kind}: {place}" in pack_fails(capsys, tmp_path / f"a.{kind}", tmp_path / "pack")


@pytest.mark.parametrize("name, head, words", [
    ("a.xlsx", b"PK\3\4\x14\0[Content_Types].xml", "a spreadsheet; save it as CSV"),
    ("a.xls", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "a spreadsheet; save it as CSV"),
    ("a.zip", b"PK\3\4\x14\0im/0.png", "compressed; unpack it first"), ("a.7z", b"7z\xbc\xaf\x27\x1c", "compressed"),
    ("a.h5", b"\x89HDF\r\n\x1a\n", "an HDF5 file, but no pack"), ("a.png", picture(0), "an image; name the folder"),
    ("a.db", b"SQLite format 3\0", "a database; export it as CSV")])
def test_a_file_of_another_kind_is_named(tmp_path, capsys, name, head, words):
    (tmp_path / name).write_bytes(head + bytes(600))
    assert f"{name}: {words}" in pack_fails(capsys, tmp_path / name, tmp_path / "pack")


@pytest.mark.parametrize("text", ["{0} cat\n{1} dog\n{2} cat\n", "{0}\tcat\n\n{1}   dog\r\n{2} cat"])
def test_a_list_of_paths_and_labels(tmp_path, text):
    names = ["my photo.jpg", "b/1.PNG", "2.jpeg"]
    (tmp_path / "b").mkdir()
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(number))
    (tmp_path / "val.txt").write_text(text.format(*names))
    assert packed(tmp_path, tmp_path / "val.txt") == ["cat", "dog", "cat"]


def test_a_list_of_mxnet(tmp_path, names):
    (tmp_path / "a.lst").write_text("".join(f"{i}\t{label}\t7.5\t{name}\n" for i, (name, label) in enumerate(
        zip(names, ("10.000000", "2", "1.0"), strict=True))))
    assert packed(tmp_path, tmp_path / "a.lst") == ["10", "2", "1"]
    assert Pack(tmp_path / "pack").class_names(0, 3) == ["1", "2", "10"]


@pytest.mark.parametrize("kind", KINDS)
def test_absolute_paths_below_the_root_are_taken(tmp_path, capsys, names, kind):
    (tmp_path / "linked").symlink_to(tmp_path)
    paths = [str(tmp_path / names[0]), names[1], str(tmp_path / "linked" / names[2])]
    source = table(tmp_path / f"a.{kind}", {"path": paths, "label": ["a", "b", "c"]})
    assert packed(tmp_path, source) == ["a", "b", "c"]
    (tmp_path / "lists").mkdir()
    source = source.rename(tmp_path / "lists" / source.name)
    assert "name the folder above all images by --root" in pack_fails(capsys, source, tmp_path / "new")
    for root in tmp_path, tmp_path / "linked":
        run_pack(source, tmp_path / f"of-{root.name}", "--root", root)
        assert sorted(contents(Pack(tmp_path / f"of-{root.name}")).values()) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_have_no_decimals(tmp_path, kind):
    """pandas writes 10.0 for the 10 of a column in which one was missing."""
    names = list(write_tree(tmp_path, {"p": 12}))
    labels = [float(number) for number in range(12)] if kind != "csv" else [f"{number}.0" for number in range(12)]
    run_pack(table(tmp_path / f"a.{kind}", {"path": names, "label": labels}), tmp_path / "pack")
    assert Pack(tmp_path / "pack").class_names(0, 12) == list(map(str, range(12)))
    assert contents(Pack(tmp_path / "pack")) == {picture(number): str(number) for number in range(12)}


def named_parquet(path, names, images, labels):
    """A file as the package datasets writes it: numbers as labels, their names in the schema."""
    info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}
    data = pa.table({"image": [{"bytes": picture(number), "path": None} for number in images],
                     "label": pa.array(labels, pa.int64())})
    data = data.replace_schema_metadata({"huggingface": json.dumps(info)} if names else {})
    pyarrow.parquet.write_table(data, path)
    return path


def test_names_in_the_schema_are_the_names_of_the_classes(tmp_path, capsys):
    one = named_parquet(tmp_path / "a.parquet", ["cat", "dog"], [0, 1], [0, 1])
    two = named_parquet(tmp_path / "b.parquet", ["dog", "cat", "cow"], [2, 3, 4], [0, 1, 2])
    run_pack(one, two, tmp_path / "pack")
    assert contents(Pack(tmp_path / "pack")) == {picture(number): name for number, name in enumerate(
        ("cat", "dog", "dog", "cat", "cow"))}
    assert Pack(tmp_path / "pack").class_names(0, 3) == ["cat", "cow", "dog"]
    bare = named_parquet(tmp_path / "c.parquet", None, [5], [1])
    error = refused(capsys, data_tools.pack.main, one, bare, tmp_path / "new", "--workers", 0)
    assert "a.parquet names its classes, but" in error and "c.parquet has only numbers" in error


def test_a_number_without_a_name_is_skipped_and_equal_names_stay_apart(tmp_path, capsys):
    source = named_parquet(tmp_path / "a.parquet", ["crane", "crane", "owl"], range(5), [0, 1, 2, -1, 3])
    run_pack(source, tmp_path / "pack", "--max-skipped", 2)
    assert contents(Pack(tmp_path / "pack")) == {picture(0): "crane (0)", picture(1): "crane (1)", picture(2): "owl"}
    assert [reason for _, reason in skipped_rows(tmp_path / "pack")] == [
        f"label {label} is none of the 3 classes that the schema names" for label in (-1, 3)]
    assert "several classes the name 'crane'" in capsys.readouterr().err
    run_pack(f"train={source}", f"test={named_parquet(tmp_path / 'b.parquet', ['owl'], [7], [-1])}", tmp_path / "left",
             "--without", "test", "--max-skipped", 2)
    assert len(Pack(tmp_path / "left" / "train")) == 3


def test_two_spellings_of_a_name(tmp_path, capsys, names):
    source = write_parquet(tmp_path / "a.parquet", path=names, label=["e\u0301", "\xe9", "b"])
    assert packed(tmp_path, source, "--normalize", "nfc") == ["\xe9", "\xe9", "b"]
    assert "1 images had class names in another form of Unicode than NFC, as 'é'" in capsys.readouterr().err
    run_pack(source, tmp_path / "apart")
    assert sorted(contents(Pack(tmp_path / "apart")).values()) == ["b", "e\u0301", "\xe9"]
