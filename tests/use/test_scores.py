"""The best classes and their probabilities: equal to the dense computation, at odd sizes and any number of ranks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.support.packs import write_pack
from tests.support.worlds import run_ranks
from xc.checkpoint import saved_run, tensor_file
from xc.checkpoint.layout import rows_name
from xc.data.class_names import NAMES, names_of
from xc.data.pack import Pack
from xc.use.scores import best_classes


def opened(folder, rows, cuts, cosine=True, scale=20.0):
    """Trained with these class rows (C, D) in files that are cut at these classes."""
    edges, files = [0, *cuts, len(rows)], {}
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        name = rows_name(first, last)
        files[name] = tensor_file.write(folder / name, {"weight": tensor_file.pieces_of(rows[first:last])})
    meta = {"num_classes": len(rows), "num_rows": len(rows), "feature_dim": rows.shape[1], "files": files,
            "rows": list(files), "row_dtype": str(rows.dtype).removeprefix("torch.")}
    cfg = SimpleNamespace(logits="cosine" if cosine else "inner", scale=scale)
    return saved_run.SavedRun(cfg, folder, meta)


def dense(features, rows, k, cosine, scale=20.0):
    """(classes, probabilities) in float64, all classes at once; the lower of equal ones first."""
    features, rows = features.double(), rows.double()
    logits = scale * F.normalize(features) @ F.normalize(rows).T if cosine else features @ rows.T
    shares, classes = logits.softmax(1).sort(dim=1, descending=True, stable=True)
    return classes[:, :k], shares[:, :k]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("num_classes, cuts, k, cosine, dtype", [
    (1, [], 1, True, torch.float32), (3, [1, 2], 3, True, torch.float32), (97, [40], 5, False, torch.float32),
    (1000, [31, 32, 700], 7, True, torch.float32), (331, [], 40, True, torch.bfloat16)])
def test_equal_to_the_dense_softmax(ranks, num_classes, cuts, k, cosine, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_run, "_BLOCK_ROWS", 61)
    random = torch.Generator().manual_seed(num_classes)
    rows = torch.randn(num_classes, 9, generator=random).to(dtype)
    features = torch.randn(133, 9, generator=random)
    model = opened(tmp_path, rows, cuts, cosine)
    expected, shares = dense(features, rows, k, cosine)
    for classes, probabilities in run_ranks(ranks, lambda world: best_classes(features.clone(), model, k, world)):
        assert torch.equal(classes, expected)
        torch.testing.assert_close(probabilities, shares, rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("ranks", [1, 3])
def test_of_equal_scores_the_lower_class_comes_first(ranks, tmp_path, monkeypatch):
    monkeypatch.setattr(saved_run, "_BLOCK_ROWS", 50)
    model = opened(tmp_path, torch.ones(200, 4), [90])
    for classes, probabilities in run_ranks(ranks, lambda world: best_classes(torch.ones(2, 4), model, 35, world)):
        assert classes.tolist() == [list(range(35))] * 2
        assert probabilities.flatten().tolist() == pytest.approx([1 / 200] * 70)


def test_no_images_have_no_classes(tmp_path):
    model = opened(tmp_path, torch.ones(8, 4), [])
    for classes, probabilities in run_ranks(2, lambda world: best_classes(torch.zeros(0, 4), model, 3, world)):
        assert classes.shape == probabilities.shape == (0, 3)


def test_rows_of_another_shape_are_refused(tmp_path):
    model = opened(tmp_path, torch.ones(8, 4), [])
    model.meta["feature_dim"] = 5
    with pytest.raises(ValueError, match="weight is F32"):
        list(model.row_blocks(SimpleNamespace(first=0, last=8), "cpu"))


@pytest.mark.parametrize("ids", [[0], [NAMES - 1, NAMES, NAMES + 5], list(range(0, NAMES + 40, 3))])
def test_names_are_those_of_the_pack(ids, tmp_path):
    names = [f"c{i:06d}" for i in range(NAMES + 50)]
    pack = Pack(write_pack(tmp_path / "pack", names, [(b"x", 0)]))
    assert names_of(torch.tensor([ids, ids]), pack) == {i: names[i] for i in ids}
