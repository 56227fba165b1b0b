"""data_tools.checkpoint: what is rewritten holds the same numbers, what is broken is named, nothing half is left."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from data_tools.checkpoint import main
from tests.support.checkpoints import C, D, assert_holds_what_was_saved, everything, save, state_of
from tests.support.commands import call, names_in, peak_kib_of, refused
from tests.support.worlds import run_ranks
from xc.checkpoint import layout as checkpoint
from xc.comm.world import World


@pytest.fixture
def made(tmp_path):
    """A function that saves a checkpoint of some ranks and returns its folder."""
    def make(ranks=3, width=0, **options):
        run_ranks(ranks, lambda w: save(w, tmp_path / "run", **options), width)
        return checkpoint.folders(tmp_path / "run" / "checkpoints")[-1]

    return make


@pytest.mark.parametrize("ranks, width", [(1, 0), (3, 0), (4, 2), (12, 0)])
def test_merge_concatenates_the_shards(ranks, width, made, tmp_path, capsys):
    folder, out = made(ranks, width), tmp_path / "out.safetensors"
    call(main, "merge", folder, out)
    state = state_of(World(), 1)
    found = load_file(out)
    rows = [load_file(path)["weight"] for path in sorted(folder.glob("rows-*"))]
    assert torch.equal(found["weight"], torch.cat(rows)) and torch.equal(found["weight"], state.head.weight)
    backbone = {name.removeprefix("backbone."): t for name, t in found.items() if name.startswith("backbone.")}
    assert len(backbone) == len(found) - 1 and backbone.keys() == state.backbone.state_dict().keys()
    state_of(World(), 2).backbone.load_state_dict(backbone)
    assert all(torch.equal(t, backbone[name]) and t.dtype == backbone[name].dtype
               for name, t in state.backbone.state_dict().items())
    with safe_open(out, "pt") as file:
        assert file.metadata()["step"] == "3" and file.metadata()["rows_are"] == "classes"
    assert names_in(tmp_path) == ["out.safetensors", "run"]
    assert f"weight F32 ({C}, {D}), whose rows are classes" in capsys.readouterr().out


@pytest.mark.parametrize("ranks, files, head", [
    (3, 1, "full"), (2, 7, "full"), (1, 2, "knn"), (4, 3, "knn"), (2, 7, "selective"), (3, 1, "selective")])
def test_reshard_writes_what_that_many_ranks_write(ranks, files, head, made, tmp_path):
    folder, out = made(ranks, head=head), tmp_path / "out"
    call(main, "reshard", folder, out, "--files", files)
    checkpoint.check(out)
    assert_holds_what_was_saved(out, 4, 2, head)
    run_ranks(files, lambda w: save(w, tmp_path / "same", head=head))
    (same,) = checkpoint.folders(tmp_path / "same" / "checkpoints")
    assert names_in(out) == names_in(same)
    for path in same.glob("*.safetensors"):
        found, expected = load_file(out / path.name), load_file(path)
        assert found.keys() == expected.keys(), path.name
        assert all(torch.equal(found[key], expected[key]) and found[key].dtype == expected[key].dtype
                   for key in expected), path.name


@pytest.mark.parametrize("num_classes, block", [(61, 16), (61, 2**20)])
def test_edges_of_the_graph_are_resharded_in_pieces(num_classes, block, made, tmp_path, monkeypatch):
    monkeypatch.setattr("xc.knn.graph_file._EDGES", block)
    monkeypatch.setattr("xc.checkpoint.tensor_file.PIECE", 2 * block)
    folder = made(3, head="knn", num_classes=num_classes)
    call(main, "reshard", folder, tmp_path / "out", "--files", 5)
    for readers in 1, 2, 5:
        assert_holds_what_was_saved(tmp_path / "out", readers, readers, "knn", num_classes)


@pytest.mark.parametrize("text, classes", [
    ("5-9,3", [5, 6, 7, 8, 9, 3]), ("0", [0]), ("0-9", list(range(10))), ("9,0-1", [9, 0, 1]),
    ("7,@ids,2", [7, 4, 5, 0, 2])])
@pytest.mark.parametrize("ranks", [1, 4])
def test_a_slice_is_indexing(text, classes, ranks, made, tmp_path):
    (tmp_path / "ids").write_text("4-5\n\n 0,\n")
    folder, out = made(ranks), tmp_path / "out.safetensors"
    call(main, "slice", folder, out, "--classes", text.replace("@", f"@{tmp_path}/"))
    found = load_file(out)
    assert found.keys() == {"classes", "weight"} and found["classes"].tolist() == classes
    assert torch.equal(found["weight"], state_of(World(), 1).head.weight[classes])


@pytest.mark.parametrize("text, message", [
    ("3,5-9,7", "class 7 twice"), ("0-4,4", "class 4 twice"), ("10", "has the classes 0 to 9"), ("8-10", "0 to 9"),
    ("9-8", "'9-8'"), ("-1", "'-1'"), ("a", "'a'"), ("", "''"), ("0-999999999999999999", "0 to 9"),
    ("1,@nowhere", "nowhere"), ("9" * 30, "neither a class id")])
def test_a_slice_of_missing_classes_is_refused(text, message, made, tmp_path, capsys):
    line = refused(capsys, main, "slice", made(), tmp_path / "out.safetensors", "--classes", text)
    assert message in line and names_in(tmp_path) == ["run"]


def test_rows_that_are_not_classes_are_not_sliced(made, tmp_path, capsys):
    folder = made()
    checkpoint.write_meta(folder, checkpoint.read_meta(folder) | {"rows_are": "buckets of 2 hashes"})
    line = refused(capsys, main, "slice", folder, tmp_path / "out.safetensors", "--classes", "1")
    assert "buckets of 2 hashes, none is the row of one class" in line


def damage(path, how):
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        data = bytearray(path.read_bytes())
        data[-3] ^= 16
        path.write_bytes(data)


@pytest.mark.parametrize("how", ["bit", "cut", "gone"])
def test_every_damaged_file_is_named(how, made, tmp_path, capsys):
    made(step=1)
    folder = made(step=2)
    with pytest.raises(SystemExit) as end:
        call(main, "verify", folder.parent.parent)
    assert end.value.code == 0 and capsys.readouterr().out.count(": valid, 5 files") == 2
    names = ["backbone.safetensors", "rows-000000000004-000000000007.safetensors"]
    for name in names:
        damage(folder / name, how)
    for what, whole in (folder, 0), (folder.parent, 1), (folder.parent.parent, 1):
        with pytest.raises(SystemExit) as end:
            call(main, "verify", what)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out.count(": valid") == whole
        assert len(err.splitlines()) == 2
        assert all(name in line and "is damaged" in line for name, line in zip(names, err.splitlines(), strict=True))
    for command in ("merge", "out.safetensors"), ("reshard", "out", "--files", 2):
        line = refused(capsys, main, command[0], folder, tmp_path / command[1], *command[2:])
        assert names[0] in line and names_in(tmp_path) == ["run"]
    if how != "bit":  # which info does not look for, and a slice neither: they read next to nothing
        refused(capsys, main, "slice", folder, tmp_path / "out.safetensors", "--classes", "1")
        call(main, "info", folder.parent.parent)
        assert capsys.readouterr().out.splitlines()[1].count("is damaged") == 2


def test_info_describes_a_checkpoint(made, tmp_path, capsys):
    made(step=1, top1=0.25)
    made(step=2, top1=0.5)
    folder = made(2, step=3, keep_checkpoints=3)
    call(main, "info", folder, "--json")
    facts = json.loads(capsys.readouterr().out)
    state = everything(state_of(World(), 1))
    assert {name: facts[name] for name in ("step", "examples", "epoch", "top1", "num_classes", "feature_dim")} == {
        "step": 3, "examples": 21, "epoch": None, "top1": None, "num_classes": C, "feature_dim": D}
    assert facts["rows_are"] == "classes" and facts["row_dtype"] == "float32" and facts["head_momentum"] is True
    assert facts["row_width"] == state["weight"].shape[1] and facts["residuals_of_ranks"] == 0
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert facts["files"] == sizes and len(sizes) == 4 and facts["damaged"] == []
    for where in folder.parent, folder.parent.parent:
        call(main, "info", where, "--json")
        listed = json.loads(capsys.readouterr().out)
        assert [(one["step"], one["best"], one["top1"]) for one in listed] == [
            (1, False, 0.25), (2, True, 0.5), (3, False, None)]
    (folder / "meta.json").write_text("{")
    call(main, "info", tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert "top-1 0.5000" in lines[1] and "the best evaluated" in lines[1] and "is not a checkpoint" in lines[2]
    assert "is not a checkpoint" in refused(capsys, main, "info", folder)


def test_info_gives_epochs_where_the_data_are_known(made, capsys):
    folder = made()
    meta = json.loads((folder / "meta.json").read_text())
    checkpoint.write_meta(folder, meta | {"num_records": 14})
    call(main, "info", folder)
    assert "step 3, 21 examples, epoch 1.50" in capsys.readouterr().out


def rewrite(folder, name, tensors):
    """Another file of that name, by which the checkpoint is whole."""
    save_file(tensors, folder / name)
    own(folder, name)


def own(folder, name):
    meta = json.loads((folder / "meta.json").read_text())
    path = folder / name
    meta["files"][name] = {"bytes": path.stat().st_size, "crc32": checkpoint.crc32(path)}
    checkpoint.write_meta(folder, meta)


FIRST = "rows-000000000000-000000000004.safetensors"


def spoil(folder, what):
    meta = json.loads((folder / "meta.json").read_text())

    def changed(**values):
        checkpoint.write_meta(folder, meta | values)

    match what:
        case "path":
            changed(files=meta["files"] | {"../../other.safetensors": {"bytes": 1, "crc32": 1}})
        case "range":
            changed(rows=["rows--00000000001-000000000004.safetensors", *meta["rows"][1:]])
        case "not among the files":
            changed(files={name: facts for name, facts in meta["files"].items() if name != FIRST})
        case "deep":
            (folder / "meta.json").write_text("[" * 10**6)
        case "numbers":
            changed(examples=10**4000)
        case "sizes":
            changed(files=meta["files"] | {FIRST: {"bytes": 10**4000, "crc32": 1}})
        case "type":
            changed(row_dtype=["float32"])
        case "escape":
            changed(rows_are="\x1b[2J")
        case "large meta":
            with open(folder / "meta.json", "a") as file:
                file.truncate(2**30)
        case "header":
            (folder / FIRST).write_bytes((2**40).to_bytes(8, "little") + b"{}")
            own(folder, FIRST)
        case "no header":
            (folder / FIRST).write_bytes(b"")
            own(folder, FIRST)
        case "shape":
            rewrite(folder, FIRST, {"weight": torch.zeros(5, D), "momentum": torch.zeros(4, D)})
        case "width":
            rewrite(folder, FIRST, {"weight": torch.zeros(4, D + 1), "momentum": torch.zeros(4, D)})
        case "dtype":
            rewrite(folder, FIRST, {"weight": torch.zeros(4, D).half(), "momentum": torch.zeros(4, D)})
        case "scalar":
            rewrite(folder, FIRST, {"weight": torch.zeros(()), "momentum": torch.zeros(4, D)})
        case "some momentum":
            rewrite(folder, FIRST, {"weight": torch.zeros(4, D)})
        case "no weight":
            rewrite(folder, FIRST, {"momentum": torch.zeros(4, D)})


@pytest.mark.parametrize("what", [
    "path", "range", "not among the files", "deep", "numbers", "sizes", "type", "escape", "large meta", "header",
    "no header", "shape", "width", "dtype", "scalar", "some momentum", "no weight"])
def test_a_hostile_checkpoint_is_one_line(what, made, tmp_path, capsys):
    folder = made()
    spoil(folder, what)
    lines = [refused(capsys, main, "merge", folder, tmp_path / "out.safetensors"),
             refused(capsys, main, "reshard", folder, tmp_path / "out", "--files", 2),
             refused(capsys, main, "slice", folder, tmp_path / "out.safetensors", "--classes", "1"),
             refused(capsys, main, "info", folder)]
    assert all("checkpoint" in line and len(line) < 600 and line.isprintable() for line in lines)
    assert names_in(tmp_path) == ["run"]


@pytest.mark.parametrize("name, table", [
    ("offsets", torch.full((C + 1,), 2**30, dtype=torch.int32)), ("offsets", torch.arange(C + 1, 0, -1).int()),
    ("offsets", torch.zeros(C, dtype=torch.int32)), ("neighbors", None), ("places", None),
    ("shape", torch.tensor([0, 4, C, 2**62, 0])), ("shape", torch.tensor([1, 4, C, 3, 0])),
    ("shape", torch.tensor([0, 4])), ("places", torch.zeros(1, 1, dtype=torch.uint8)),
    ("lows", torch.full((1,), 255, dtype=torch.uint8))])
def test_a_hostile_graph_is_one_line(name, table, made, tmp_path, capsys):
    folder = made(head="knn")
    file = FIRST.replace("rows", "neighbors")
    tables = load_file(folder / file)
    rewrite(folder, file, tables | {name: tables[name] + 100 if table is None else table})
    assert file in refused(capsys, main, "reshard", folder, tmp_path / "out", "--files", 2)
    assert names_in(tmp_path) == ["run"]


def test_nothing_is_replaced_without_force(made, tmp_path, capsys):
    folder, file, other = made(), tmp_path / "out.safetensors", tmp_path / "other"
    call(main, "merge", folder, file)
    call(main, "reshard", folder, other, "--files", 2)
    before = file.read_bytes(), names_in(other)
    assert "exists" in refused(capsys, main, "merge", folder, file)
    assert "exists" in refused(capsys, main, "slice", folder, file, "--classes", "1")
    assert "exists" in refused(capsys, main, "reshard", folder, other, "--files", 3)
    assert (file.read_bytes(), names_in(other)) == before
    call(main, "slice", folder, file, "--classes", "1", "--force")
    call(main, "reshard", folder, other, "--files", 3, "--force")
    assert load_file(file).keys() == {"classes", "weight"} and len(list(other.glob("rows-*"))) == 3
    checkpoint.check(other)
    # --force replaces what such a command wrote, nothing else, and never what it reads
    (tmp_path / "precious").mkdir()
    error = refused(capsys, main, "reshard", folder, tmp_path / "precious", "--files", 3, "--force")
    assert "not a checkpoint" in error
    assert "inside the checkpoint" in refused(capsys, main, "reshard", folder, folder, "--files", 3, "--force")
    assert "lies inside" in refused(capsys, main, "merge", folder, folder / "backbone.safetensors", "--force")
    (tmp_path / "x.safetensors").mkdir()
    assert "not a file" in refused(capsys, main, "merge", folder, tmp_path / "x.safetensors", "--force")
    assert "ends in .safetensors" in refused(capsys, main, "merge", folder, tmp_path / "out")
    assert "no such folder" in refused(capsys, main, "merge", folder, tmp_path / "no" / "out.safetensors")
    error = refused(capsys, main, "merge", tmp_path / "run", tmp_path / "new.safetensors")
    assert "is a run with 1 checkpoints" in error
    assert "more than the 10 class rows" in refused(capsys, main, "reshard", folder, tmp_path / "new", "--files", 11)
    checkpoint.check(folder)
    assert names_in(tmp_path) == ["other", "out.safetensors", "precious", "run", "x.safetensors"]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of one rank with 160 MB of rows and momentum."""
    run = tmp_path_factory.mktemp("large")
    save(World(), run, num_classes=5_000_000)
    (folder,) = checkpoint.folders(run / "checkpoints")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("command, out", [(["merge"], "out.safetensors"), (["reshard", "--files", 3], "out"),
                                          (["slice", "--classes", "0-4999998"], "out.safetensors")])
def test_memory_does_not_go_by_the_size_of_the_rows(command, out, large, tmp_path):
    size = sum(path.stat().st_size for path in large.iterdir()) / 2**10
    least = peak_kib_of("data_tools.checkpoint", "info", large)
    assert size > 150_000
    assert peak_kib_of("data_tools.checkpoint", command[0], large, tmp_path / out, *command[1:]) < least + 40_000
