"""Exports: graphs equal to prediction, rows and names of the checkpoint, the lines of the docs, bad input."""

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, safe_open

from tests.support.disks import small_disk
from tests.support.docs import blocks
from tests.support.launch import ROOT, error_lines, mpirun
from tests.support.packs import write_pack
from tests.support.untrained import STEP, write_run
from tests.support.worlds import run_ranks
from xc import embed, export, predict
from xc.checkpoint import layout, tensor_file
from xc.comm.world import World
from xc.data.augment import norm_of, prepared
from xc.data.images import decode
from xc.data.pack import Pack
from xc.errors import UserError
from xc.model import start_weights
from xc.use import bundle, graph, graph_files
from xc.use import trained as trained_module
from xc.use.agreement import samples_of

CHECKPOINT = f"step-{STEP:08d}"
RUNS = {
    "grey": dict(feature_dim=24, input_norm="0.3/0.2", seed=1),
    "colour": dict(backbone="resnet18", channels=3, image_size=24, feature_dim=9, input_norm="imagenet",
                   logits="inner", row_dtype="bfloat16", amp="bf16", seed=2)}


@pytest.fixture(scope="module", params=RUNS)
def exported(request, tiny_packs, tmp_path_factory):
    """cfg, run, packs, and the folder `out` of an export of a run whose rows three ranks wrote."""
    folder = tmp_path_factory.mktemp(request.param)
    cfg = write_run(folder / "run", tiny_packs, ranks=3, **RUNS[request.param])
    assert len(list((folder / "run" / "checkpoints" / CHECKPOINT).glob("rows-*"))) == 3
    export.main([str(folder / "run"), "--out", str(folder / "out")])
    return SimpleNamespace(cfg=cfg, run=folder / "run", packs=tiny_packs, out=folder / "out")


@pytest.fixture(scope="module")
def small(tiny_packs, tmp_path_factory):
    """A run folder."""
    folder = tmp_path_factory.mktemp("small") / "run"
    write_run(folder, tiny_packs, feature_dim=8)
    return folder


def predicted(run, src, folder, module=predict):
    """(class names, probabilities), best first, of every image of a source by xc.predict; all of the ten classes."""
    folder.mkdir(exist_ok=True)
    out = folder / f"{len(list(folder.iterdir()))}.csv"
    module.main([str(run), str(src), "--out", str(out), "--top", "10"])
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    return [([row["class"] for row in rows[i : i + 10]], [float(row["probability"]) for row in rows[i : i + 10]])
            for i in range(0, len(rows), 10)]


def in_float32(run, folder):
    """A copy of a run whose backbone computes in float32."""
    copy = folder / "float32"
    shutil.copytree(run, copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"amp": "off"}))
    return copy


def names_of(out):
    return [json.loads(line) for line in (out / "classes.jsonl").read_text(encoding="utf-8").splitlines()]


def outputs_of(kind, out, pixels):
    """[features, probabilities] of pixels by one of the files."""
    if kind == "onnx":
        return onnxruntime.InferenceSession(out / "model.onnx").run(None, {"pixels": pixels})
    found = torch.export.load(out / "model.pt2").module()(torch.from_numpy(pixels))
    return [output.numpy() for output in found.values()]


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_graphs_compute_what_predict_and_embed_do(kind, exported, tmp_path):
    test, cfg = Pack(exported.packs / "test"), exported.cfg
    run = in_float32(exported.run, tmp_path)
    images = test.read(np.arange(len(test)))[0]
    pixels = np.stack([decode(image, cfg.image_size, cfg.channels) for image in images])
    embed.main([str(run), str(exported.packs / "test"), "--out", str(tmp_path / "features.npy")])
    expected, start, names = predicted(run, exported.packs / "test", tmp_path / "csv"), 0, names_of(exported.out)
    for size in 1, 3, 5, 21:
        features, probabilities = outputs_of(kind, exported.out, pixels[start : start + size])
        of_batch = np.load(tmp_path / "features.npy")[start : start + size]
        assert np.allclose(features, of_batch, rtol=1e-4, atol=1e-5 * abs(of_batch).max())
        for row, (classes, shares) in zip(probabilities, expected[start : start + size], strict=True):
            assert [names[i] for i in np.argsort(-row, kind="stable")] == classes
            assert np.sort(row)[::-1] == pytest.approx(shares, rel=1e-3, abs=1e-6)
        start += size
    assert start == len(images)


def test_rows_names_and_weights_are_those_of_the_checkpoint(exported):
    checkpoint = exported.run / "checkpoints" / CHECKPOINT
    rows = torch.cat([load_file(path)["weight"] for path in sorted(checkpoint.glob("rows-*"))]).float()
    found = load_file(exported.out / "classes.safetensors")
    assert list(found) == ["rows"]
    assert torch.equal(found["rows"], F.normalize(rows) if exported.cfg.logits == "cosine" else rows)
    with safe_open(exported.out / "classes.safetensors", "pt") as file:
        assert file.metadata()["classes_digest"] == Pack(exported.packs / "train").classes_digest
    assert names_of(exported.out) == Pack(exported.packs / "train").class_names(0, 10)
    weights, saved = load_file(exported.out / "backbone.safetensors"), load_file(checkpoint / "backbone.safetensors")
    assert len(weights) == len(saved)
    for name, tensor in saved.items():
        own = name.replace("1.", "feature_norm.", 1) if name.startswith("1.") else name.removeprefix("0.")
        assert torch.equal(weights[own], tensor)
    network = trained_module.open_run(exported.run, "", World()).backbone
    matched, left_out, new = start_weights.load(network, exported.out / "backbone.safetensors")
    assert f"matched {len(saved) - 2} tensors" in matched and "left out 2 tensors" in left_out and "new 0" in new


def test_model_json_describes_the_files(exported):
    model, cfg = json.loads((exported.out / "model.json").read_text()), exported.cfg
    assert {path.name for path in exported.out.iterdir()} == {"model.json", *model["files"]}
    assert len(model["files"]) == 5
    for name, facts in model["files"].items():
        data = (exported.out / name).read_bytes()
        assert facts == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert model["checkpoint"] == {"name": CHECKPOINT, "step": STEP, "examples": 36, "top1": 0.25,
                                   "evaluated_on": "test"}
    at_the_end = {"step": 9, "split": "test", "scored_step": STEP}  # of these weights, which were the best
    assert model["metrics"] == [{"step": STEP, "split": "test", "top1": 0.25}, at_the_end]
    assert model["classes"]["digest"] == Pack(exported.packs / "train").classes_digest
    assert model["input"]["shape"] == ["N", cfg.channels, cfg.image_size, cfg.image_size]
    pixels = torch.arange(256, dtype=torch.uint8)[None, None].repeat(1, cfg.channels, 1)[..., None]
    mean, std = (torch.tensor(model["input"][name])[:, None, None] for name in ("mean", "std"))
    inputs = prepared(pixels.clone(), norm=norm_of(cfg.input_norm, cfg.channels))
    torch.testing.assert_close((pixels / 255 - mean) / std, inputs, rtol=1e-5, atol=1e-5)
    assert model["outputs"].keys() == {"features", "probabilities"}
    verified = model["verified"]
    assert verified["images"] == {"random": 10, "from the pack": 10}
    for name in "model.onnx", "model.pt2":
        assert verified[name].keys() == {"features", "probabilities"}
        for values in verified[name].values():
            assert 0 <= values["difference"] <= 1e-4 * values["of"]
    inside = json.loads(onnxruntime.InferenceSession(exported.out / "model.onnx").get_modelmeta()
                        .custom_metadata_map["model.json"])
    assert inside == {name: model[name] for name in inside} and inside["input"]["mean"]


LINES = [block.text for block in blocks(ROOT / "docs/use-elsewhere.md") if block.language == "python"]
ALONE = """
import sys
sys.modules["xc"] = sys.modules["data_tools"] = None  # an import of them fails
texts, folder, *paths = sys.argv[1:]
for path in paths:
    sys.argv = ["", folder, path]
    exec(compile(open(texts).read(), texts, "exec"), {"__name__": "__main__"})
    print("end")
"""


def printed(lines, out, paths, folder):
    """[(class names, probabilities)] that lines of the docs print for images, in a process without this library."""
    (folder / "lines.py").write_text(lines)
    text = subprocess.run([sys.executable, "-c", ALONE, folder / "lines.py", out, *paths], cwd=folder, text=True,
                          check=True, stdout=subprocess.PIPE).stdout
    rows = [[line.split("\t") for line in part.splitlines()] for part in text.split("end\n")[:-1]]
    return [([name for name, _ in of_image], [float(share) for _, share in of_image]) for of_image in rows]


def test_the_lines_of_the_docs_predict_the_same(exported, tmp_path):
    """Without resizing to the digits that are printed; torch resizes as the run does, Pillow nearly so."""
    with_onnx, with_torch, many_classes = LINES
    images, size, random = tmp_path / "images", exported.cfg.image_size, np.random.default_rng(3)
    images.mkdir()
    coarse = random.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    for name, shape in ("0.png", (size, size)), ("1.png", (90, 50)), ("2.jpg", (61, 77)), ("3.png", (11, 40)):
        Image.fromarray(coarse).resize(shape).save(images / name)
    Image.fromarray(coarse).resize((size, size)).convert("L").save(images / "4.png")
    Image.fromarray(coarse).resize((50, 40)).convert("RGBA").save(images / "5.png")
    paths = sorted(images.iterdir())
    expected = predicted(in_float32(exported.run, tmp_path), images, tmp_path / "csv")
    as_shares = "shares = np.exp(logits - logits.max())\nshares /= shares.sum()"
    same = "assert np.allclose(shares, probabilities, atol=1e-5)"
    for lines, closely in ((with_torch, [0, 1, 2, 4, 5]),
                           ("\n".join([with_onnx, many_classes, as_shares, same]), [0, 4])):
        found = printed(lines, exported.out, paths, tmp_path)
        assert len(found) == len(expected) == 6
        for i, ((names, shares), (classes, probabilities)) in enumerate(zip(found, expected, strict=True)):
            assert shares == pytest.approx(probabilities[:5], abs=2e-5 if i in closely else 0.03)
            assert i not in closely or names == classes[:5]


def test_features_alone_need_no_names(small, tmp_path, capsys):
    run = shutil.copytree(small, tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(settings | {"data": str(tmp_path / "gone")}))
    export.main([str(run), "--out", str(tmp_path / "out"), "--features-only", "--formats", "onnx"])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.json", "model.onnx"}
    model = json.loads((tmp_path / "out" / "model.json").read_text())
    assert model["outputs"].keys() == {"features"} and model["verified"]["images"] == {"random": 10}
    assert model["classes"].keys() == {"count", "digest"}
    assert "note: no image of the run is compared" in capsys.readouterr().err
    [features] = outputs_of("onnx", tmp_path / "out", np.zeros((3, 1, 32, 32), np.uint8))
    assert np.linalg.norm(features, axis=1) == pytest.approx([1] * 3, abs=1e-5)


def test_names_with_any_characters_are_lines(tmp_path):
    names = ["a\nb", "c\r\u2028d", '"e"\\', "日本", "f\tg"]
    bundle.write_names(tmp_path / "names", Pack(write_pack(tmp_path / "pack", names, [(b"x", 0)])))
    with open(tmp_path / "names", encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == names


def test_old_names_of_weights_load(tiny_packs, tmp_path):
    write_run(tmp_path / "run", tiny_packs, **RUNS["colour"])
    folder = tmp_path / "run" / "checkpoints" / CHECKPOINT
    backbone = trained_module.open_run(tmp_path / "run", "", World()).backbone
    old = {new: old for old, new in backbone[0].old_names().items()}
    tensors = {}
    for name, tensor in load_file(folder / "backbone.safetensors").items():
        of, _, leaf = name.removeprefix("0.").rpartition(".")
        tensors[f"0.{old[of]}.{leaf}" if of in old else name] = tensor_file.pieces_of(tensor)
    assert any(name.startswith("0.layers.") for name in tensors)
    meta = layout.read_meta(folder)
    meta["files"]["backbone.safetensors"] = tensor_file.write(folder / "new", tensors)
    (folder / "new").replace(folder / "backbone.safetensors")  # the tensors are mapped from the other file
    layout.write_meta(folder, meta)
    again = trained_module.open_run(tmp_path / "run", "", World()).backbone.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in backbone.state_dict().items())


def test_small_packs_and_damaged_records_are_compared(small, spoiled_packs, tmp_path):
    trained = trained_module.open_run(small, "", World())
    images = Pack(spoiled_packs / "train").read(np.arange(7))[0]
    write_pack(tmp_path / "small", ["a"], [(image, 0) for image in (images[0], b"none", images[1])])
    for path, count in (spoiled_packs / "train", 10), (tmp_path / "small", 2):
        random, real = samples_of(graph.Graph(trained), trained, Pack(path))
        assert (random.what, real.what, len(random.pixels), len(real.pixels)) == ("random", "from the pack", 10, count)
        assert torch.equal(real.pixels[0], torch.from_numpy(decode(images[0], 32, 1)))
        assert real.outputs["features"].shape == (count, 8) and real.outputs.keys() == {"features"}


def refused(tmp_path, *arguments):
    """The one line with which xc.export refuses; nothing is left behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        export.main([*map(str, arguments)])
    assert sorted(tmp_path.rglob("*")) == before and "\n" not in str(error.value)
    return str(error.value)


def test_bad_input_is_one_line_and_nothing_is_written(small, tiny_packs, tmp_path, monkeypatch):
    out, there = tmp_path / "out", tmp_path / "there"
    there.mkdir()
    run, pack = shutil.copytree(small, tmp_path / "run"), shutil.copytree(tiny_packs / "test", tmp_path / "pack")
    with h5py.File(pack / "index.h5", "r+") as file:
        file.attrs["classes_digest"] = np.bytes_("0" * 64)
    shutil.rmtree(run / "checkpoints")
    vectors = shutil.copytree(small, tmp_path / "vectors")
    settings = json.loads((small / "config.json").read_text())
    (vectors / "config.json").write_text(json.dumps(settings | {"data": "synth:classes=10"}))
    checkpoint = small / "checkpoints" / CHECKPOINT
    for arguments, line in [
            ([small, "--out", there], f"{there} exists; remove it or give another name"),
            ([small, "--out", out / "x"], f"{out}: no such folder, or not writable; make it first, x goes there"),
            ([there, "--out", out], f"{there} is not the folder of a run (config.json: [Errno 2] No such file or "
             f"directory: '{there}/config.json'): name the --out of train.py"),
            ([run, "--out", out], f"{run} has no checkpoint: let it train until one is saved, or name another run"),
            ([small, "--out", out, "--checkpoint", "x"], f"--checkpoint x: {small} has no such checkpoint, but "
             f"{CHECKPOINT}"),
            ([vectors, "--out", out], f"{vectors} was trained on vectors (synth:classes=10), and takes no images: name "
             "a run of images"),
            ([small, "--out", out, "--classes", pack], f"{pack} has 10 classes that are not the 10 of {checkpoint}: "
             "name the pack of the run by --classes"),
            ([small, "--out", out, "--classes", there, "--features-only", "--formats", "onnx"], "the names of the "
             f"classes cannot be read ({there}: not a pack: it holds neither index.h5 nor a folder train with one): "
             "name the pack of the run by --classes"),
            ([small, "--out", out, "--features-only", "--formats", "safetensors"], "--features-only is about graphs, "
             "of which --formats safetensors has none: leave it out"),
            ([small, "--out", out, "--tolerance", "2"], "argument --tolerance: 2 is not between 0 and 1; see python -m "
             "xc.export --help"),
            ([small, "--out", out, "--tolerance", "0"], None)]:
        text = refused(tmp_path, *arguments)
        assert text == line or line is None and re.fullmatch(
            r"model\.onnx: its \w+ differ from PyTorch's by \S+ of \S+ on images that are random, and 0 of it is "
            r"allowed: leave its format out of --formats, or raise --tolerance", text), text
    formats = "argument --formats: invalid choice: 'keras' (choose from "
    assert refused(tmp_path, small, "--out", out, "--formats", "keras").startswith(formats)


def test_a_damaged_checkpoint_is_one_line(small, tmp_path):
    run = shutil.copytree(small, tmp_path / "run")
    [rows] = (run / "checkpoints" / CHECKPOINT).glob("rows-*")
    data = bytearray(rows.read_bytes())
    data[-1] ^= 1
    rows.write_bytes(data)
    assert refused(tmp_path, run, "--out", tmp_path / "out") == (
        f"checkpoint file {rows} is damaged: its checksum does not match")
    # Features alone need no row, so no byte of 100 million of them is read.
    export.main([str(run), "--out", str(tmp_path / "out"), "--features-only", "--formats", "pt2"])


def test_an_absent_package_is_one_line(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert refused(tmp_path, small, "--out", tmp_path / "out") == (
        "model.onnx needs the packages onnx, onnxscript, onnxruntime (import of onnxruntime halted; None in "
        "sys.modules): pip install -r requirements.txt, or leave its format out of --formats")
    export.main([str(small), "--out", str(tmp_path / "out"), "--formats", "safetensors"])


def test_rows_too_many_for_a_graph_are_one_line(small, tmp_path, monkeypatch):
    backbone = sum(tensor.nbytes for tensor in load_file(small / "checkpoints" / CHECKPOINT / "backbone.safetensors")
                   .values())
    monkeypatch.setattr(graph, "MOST_BYTES", backbone + 4 * 10 * 8 - 1)
    assert refused(tmp_path, small, "--out", tmp_path / "out") == (
        "the 10 class rows take 0.0 GB, and a graph holds 0.0: add --features-only; --formats safetensors writes the "
        "rows")
    monkeypatch.setattr(graph, "MOST_BYTES", backbone - 1)
    assert refused(tmp_path, small, "--out", tmp_path / "out", "--features-only") == (
        "the backbone takes 0.0 GB, and a graph holds 0.0: take --formats safetensors")


class _Bessel(torch.nn.Module):
    """An operator that ONNX lacks."""

    def forward(self, x):
        return torch.special.bessel_j0(x)


class _Branch(torch.nn.Module):
    """A branch that depends on numbers, which a graph cannot hold."""

    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("part, line", [
    (_Bessel(), "the backbone cannot be written as ONNX (No ONNX function found for <OpOverload(op='prims.bessel_j0', "
     "overload='default')>. Failure message: No decompositions registered for the real-valued input): leave onnx out "
     "of --formats"),
    (_Branch(), "torch.export cannot capture the backbone (")])
def test_a_backbone_that_no_graph_holds_is_one_line(part, line, small, tmp_path, monkeypatch):
    build = trained_module.backbones.build

    def spoiled(*arguments, **keywords):
        backbone = build(*arguments, **keywords)
        backbone[0].project.register_forward_hook(lambda module, inputs, out: part(out))
        return backbone

    monkeypatch.setattr(trained_module.backbones, "build", spoiled)
    text = refused(tmp_path, small, "--out", tmp_path / "out", "--formats", "safetensors", "onnx")
    assert text.startswith(line) and (text == line or text.endswith("): take --formats safetensors"))


@pytest.mark.parametrize("format", ["onnx", "pt2", "safetensors"])
def test_a_full_disk_is_one_line(format, small, tmp_path):
    with small_disk(tmp_path / "disk", 400) as disk:
        out = disk / "out"
        assert refused(disk, small, "--out", out, "--formats", format) == (
            f"--out {out} cannot be written ([Errno 28] No space left on device): make room there, or name another "
            "folder")


@pytest.mark.parametrize("spoil", [lambda output: output * 1.01, lambda output: output * torch.nan])
def test_a_file_that_computes_something_else_is_refused(spoil, small, tmp_path, monkeypatch):
    real = graph_files.GRAPH_FILES["pt2"]

    def wrong(path):
        run = real.open(path)
        return lambda pixels: [spoil(output) for output in run(pixels)]

    monkeypatch.setitem(graph_files.GRAPH_FILES, "pt2", graph_files.GraphFile(real.name, (), real.write, wrong))
    assert "differ from PyTorch's by" in refused(tmp_path, small, "--out", tmp_path / "out", "--formats", "pt2")


def test_several_ranks_are_refused(small, tmp_path, monkeypatch):
    def body(world):
        monkeypatch.setattr(export, "open_world", lambda *_: world)
        with pytest.raises(UserError, match="^xc.export works in one process, and 2 were started: leave the launcher "
                                            "out$"):
            export.main([str(small), "--out", str(tmp_path / "out")])

    run_ranks(2, body)


@pytest.mark.mpi
def test_real_ranks_are_refused(small, tmp_path):
    lines = error_lines(mpirun(2, "-m", "xc.export", small, "--out", tmp_path / "out", expect=2))
    assert lines == ["error: xc.export works in one process, and 2 were started: leave the launcher out"]
    assert list(tmp_path.iterdir()) == []
