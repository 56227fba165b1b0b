"""Retrieval metrics equal the definition, written out over the whole matrix of scores; the same on any number of ranks.
Ranks are threads."""

import json
import shutil

import numpy as np
import pytest
import torch

from tests.support.launch import run
from tests.support.training import QUICK, call_main, refusal
from tests.support.worlds import run_ranks
from xc.checkpoint import layout
from xc.data.evaluated import data_of
from xc.errors import UserError
from xc.train import retrieval
from xc.train.retrieval import retrieval_scores


def made(num, width, classes, seed, steps=None):
    """(features, labels). steps: features are multiples of 1 / steps, so that many scores are equal."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(num, width)).astype(np.float32)
    features = np.round(features * steps) / steps if steps else features / np.linalg.norm(features, axis=1)[:, None]
    return torch.from_numpy(features.astype(np.float32)), torch.from_numpy(random.integers(0, classes, num))


def brute_force(features, labels):
    """The definition: every query sorts all other images; of equal scores the relevant ones come last."""
    scores = (features.double() @ features.double().T).float().numpy()
    labels, hits, precisions, alone = labels.numpy(), [], [], 0
    for query in range(len(labels)):
        others = np.delete(np.arange(len(labels)), query)
        same = labels[others] == labels[query]
        same = same[np.lexsort([same, -scores[query, others]])]
        if not same.any():
            alone += 1
            continue
        hits.append([same[:k].any() for k in (1, 10, 100)])
        precisions.append(np.mean(np.cumsum(same)[same] / (np.flatnonzero(same) + 1)))
    return (*np.mean(hits, axis=0), np.mean(precisions), len(hits), alone)


def of_ranks(ranks, features, labels, **more):
    """The result on ranks that have uneven parts, some of them none."""
    ends = np.sort(np.random.default_rng(ranks).integers(0, len(labels) + 1, ranks - 1))
    parts = list(zip([0, *ends], [*ends, len(labels)], strict=True))

    def body(world):
        mine = slice(*parts[world.rank])
        return retrieval_scores(features[mine], labels[mine], world.all_ranks, **more)

    found = run_ranks(ranks, body)
    assert all(one == found[0] for one in found)
    return found[0]


@pytest.mark.parametrize("num, width, classes, steps", [
    (2, 1, 1, None), (31, 3, 7, None), (120, 5, 40, None), (257, 8, 5, None), (90, 2, 12, 2), (61, 3, 1, 1),
    (150, 4, 100, 1)])
def test_scores_are_those_of_the_definition_at_any_number_of_ranks(num, width, classes, steps, monkeypatch):
    monkeypatch.setattr(retrieval, "_TILE", 17)
    monkeypatch.setattr(retrieval, "_SCORES", 900)
    features, labels = made(num, width, classes, num, steps)
    expected = brute_force(features, labels)
    (alone, unmatched) = of_ranks(1, features, labels)
    assert tuple(alone.values())[:6] == pytest.approx(expected, abs=1e-8) and alone["examples"] == num
    assert steps is None or len(np.unique(features @ features.T)) < num  # there are ties
    singles = [label for label in range(classes) if (labels == label).sum() == 1]
    assert alone["queries_without_match"] == len(singles) and set(unmatched) <= set(singles)
    assert len(unmatched) == min(3, len(singles))
    for ranks in 2, 3, 5:
        assert of_ranks(ranks, features, labels)[0] == alone


def test_equal_features_find_nothing():
    """Were ties broken by place, a pack in the order of its classes would find all."""
    (scores, _) = of_ranks(2, torch.ones(300, 4), torch.arange(300) // 100)
    assert scores["recall_at_1"] == scores["recall_at_100"] == 0
    assert scores["map"] == pytest.approx(np.mean(np.arange(1, 100) / (200 + np.arange(1, 100))))


def test_perfect_features_find_all():
    (scores, _) = of_ranks(3, torch.eye(6).repeat(5, 1), torch.arange(6).repeat(5))
    assert [scores[name] for name in ("recall_at_1", "recall_at_10", "map")] == [1, 1, 1]


def test_no_query_with_a_match_has_no_scores():
    scores, unmatched = of_ranks(2, torch.eye(5), torch.arange(5) + 7)
    assert scores["map"] is scores["recall_at_1"] is None and unmatched == [7, 8, 9]
    assert (scores["queries"], scores["queries_without_match"]) == (0, 5)


def test_features_that_are_not_finite_are_an_error_on_all_ranks():
    def body(world):
        features = torch.ones(3, 2)
        features[1] = torch.nan if world.rank == 1 else 1
        with pytest.raises(UserError, match="not finite"):
            retrieval_scores(features, torch.zeros(3, dtype=torch.int64), world.all_ranks)

    run_ranks(2, body)


def test_it_stops_when_asked():
    assert of_ranks(2, *made(30, 3, 4, 0), stopped=lambda: True) is None


def test_progress_counts_every_query():
    done = []
    of_ranks(1, *made(30, 3, 4, 0), progress=done.append)
    assert sum(done) == 30


def evaluations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "split" in line]


@pytest.fixture(scope="module")
def unseen(tiny_packs, tmp_path_factory):
    """Packs whose val and test have two classes each that train has no image of."""
    out = tmp_path_factory.mktemp("unseen") / "packs"
    run("python", "-m", "data_tools.split", tiny_packs / "train", out, "--val", 0.2, "--test", 0.2, "--by", "class")
    return out


FLAGS = [*QUICK, "--steps", 6, "--save-every", "3steps", "--eval-every", "3steps", "--eval", "retrieval",
         "--keep-checkpoints", 3]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_is_evaluated_by_retrieval_of_classes_it_never_saw(ranks, unseen, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    assert call_main(monkeypatch, ranks, "--data", unseen, "--out", out, *FLAGS) == [None] * ranks
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    lines = evaluations(out)
    assert [(line["step"], line["split"]) for line in lines] == [(3, "val"), (6, "val"), (6, "test")]
    assert result["top1"] is None and result["queries"] == result["val_queries"] == 24
    for name in "recall_at_1", "recall_at_10", "map":
        assert 0 < result[name] <= 1 and result[f"val_{name}"] == pytest.approx(
            next(line for line in lines if line["step"] == result["scored_step"])[f"val_{name}"], abs=1e-6)
    by_step = {line["step"]: line["val_recall_at_1"] for line in lines[:2]}
    best = max(by_step, key=lambda step: (by_step[step], -step))
    assert result["scored_step"] == best  # the first of equal ones
    metas = [layout.read_meta(folder) for folder in layout.folders(out / "checkpoints")]
    assert [meta["top1"] for meta in metas] == pytest.approx(list(by_step.values()), abs=1e-6)
    assert {meta["evaluated_on"].split(":")[0] for meta in metas} == {"retrieval on val"}


def test_a_run_that_resumes_with_another_evaluation_evaluates_again(unseen, tmp_path, monkeypatch, capsys):
    """A top-1 is not compared with a recall@1."""
    out = tmp_path / "run"
    run("python", "train.py", "--data", unseen, "--out", out, *FLAGS, "--eval", "classify")
    assert [("val_top1" in line) for line in evaluations(out)] == [True, True, False]
    assert call_main(monkeypatch, 1, "--data", unseen, "--out", out, *FLAGS, "--steps", 9, "--resume", "auto"
                     ) == [None]
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    again = [line["step"] for line in evaluations(out) if "val_recall_at_1" in line]
    assert again == [6, 9] and result["scored_step"] in (6, 9)
    metas = {meta["step"]: meta for meta in map(layout.read_meta, layout.folders(out / "checkpoints"))}
    assert metas[3]["evaluated_on"].startswith("val:") and metas[6]["evaluated_on"].startswith("retrieval on val:")
    assert layout.best_of(layout.folders(out / "checkpoints")).name != "step-00000003"  # of another measure


def test_images_that_are_alone_are_counted_and_named(tiny_packs, tmp_path, monkeypatch, capsys):
    shutil.copytree(tiny_packs.parent / "tree", tmp_path / "tree")
    for label in 3, 5:
        for i in 1, 2:
            (tmp_path / "tree" / "test" / f"class{label}" / f"{i}.png").unlink()
    run("python", "-m", "data_tools.pack", tmp_path / "tree", tmp_path / "packs")
    assert call_main(monkeypatch, 2, "--data", tmp_path / "packs", "--out", tmp_path / "run", *FLAGS) == [None] * 2
    text = capsys.readouterr()
    result = json.loads(text.out.splitlines()[-1])
    assert (result["queries"], result["queries_without_match"], result["examples"]) == (24, 2, 26)
    notes = [line for line in text.err.splitlines() if "no other image of their class to find" in line]
    assert len(notes) == 1 and "2 of 26 images of test" in notes[0] and "class3" in notes[0] and "class5" in notes[0]


def test_what_retrieval_cannot_evaluate_is_refused(tmp_path, monkeypatch):
    text = refusal(monkeypatch, 2, "--data", "synth:classes=40,dim=8,test=20,examples=2", "--feature-dim", 8, "--out",
                   tmp_path / "run", "--eval", "retrieval", "--device", "cpu")
    assert text == ("--eval retrieval needs two images of a class, and no class of test has two: give a split that "
                    "does, or --eval classify")
    assert not (tmp_path / "run").exists()


def test_checkpoints_name_what_was_measured():
    splits = {"train": None, "val": type("Split", (), {"data_seed": 4, "__len__": lambda self: 9})()}
    assert data_of(splits) == "val: 9 examples, seed 4"
    assert data_of(splits, "retrieval") == "retrieval on val: 9 examples, seed 4"
    assert data_of({"train": None}, "retrieval") is None
