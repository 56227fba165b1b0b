"""Answers, confused pairs, surest mistakes and neighbours equal those of a brute-force computation, at any number of
ranks."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.worlds import run_ranks
from tests.use.test_scores import opened
from xc.config import Config
from xc.data.augment import norm_of, prepared
from xc.data.images import decode
from xc.data.pack import Pack
from xc.reporting import answers as answers_module
from xc.reporting.answers import Answers, answers_of, evenly
from xc.reporting.mistakes import confused_pairs, surest, worst_classes
from xc.reporting.neighbours import nearest_rows
from xc.use.trained import open_run


def brute_force(trained, pack, numbers):
    """(labels, (n, C) probabilities) of records, one by one and all classes at once."""
    images, labels = pack.read(numbers)
    cfg, rows = trained.cfg, torch.cat([rows for _, rows in trained.row_blocks(range_of(trained.num_classes), "cpu")])
    shares = []
    for image in images:
        pixels = torch.from_numpy(decode(image, cfg.image_size, cfg.channels))[None]
        with torch.no_grad():
            features = trained.backbone(prepared(pixels, norm=norm_of(cfg.input_norm, cfg.channels)))
        shares.append((cfg.scale * F.normalize(features).double() @ rows.double().T).softmax(1)[0])
    return labels, torch.stack(shares).numpy()


def range_of(num_classes):
    return type("Range", (), {"first": 0, "last": num_classes})


@pytest.mark.parametrize("ranks, most", [(1, 1000), (2, 41), (3, 64)])
def test_answers_equal_brute_force(ranks, most, finished, packs, monkeypatch):
    monkeypatch.setattr(answers_module, "_PASS", 10)
    monkeypatch.setattr(answers_module, "_BLOCK", 7)
    pack = Pack(packs / "val")
    numbers = evenly(len(pack), most)
    done = []

    def body(world):
        trained = open_run(finished, "", world)
        return answers_of(trained, pack, most, world, batch=4, threads=2, progress=done.append), trained

    found = run_ranks(ranks, body)
    labels, shares = brute_force(found[0][1], pack, numbers)
    best = shares.argmax(1)
    wrong = best != labels
    ranks_of_labels = (shares > shares[np.arange(len(labels)), labels][:, None]).sum(1)
    assert 5 < wrong.sum() < len(labels)
    for answers, _ in found:
        assert (answers.of, answers.examples, answers.without) == (65, len(numbers), 0)
        assert answers.top1 == pytest.approx((ranks_of_labels < 1).mean())
        assert answers.top5 == pytest.approx((ranks_of_labels < 5).mean())
        assert answers.labels.tolist() == labels.tolist()
        assert answers.record.tolist() == numbers[wrong].tolist()
        assert (answers.label.tolist(), answers.answer.tolist()) == (labels[wrong].tolist(), best[wrong].tolist())
        np.testing.assert_allclose(answers.probability, shares.max(1)[wrong], rtol=1e-4)
        of_label = np.where(ranks_of_labels < 5, shares[np.arange(len(labels)), labels], np.nan)[wrong]
        np.testing.assert_allclose(answers.label_probability, of_label, rtol=1e-4)
        assert np.isnan(of_label).any()
    assert sum(done) == ranks * len(numbers)


def test_images_that_cannot_be_used_are_counted(finished, packs, tmp_path):
    import shutil

    import h5py

    shutil.copytree(packs / "val", tmp_path / "val")
    with h5py.File(tmp_path / "val" / "shard-00000.h5", "r+") as file:
        for record in 3, 5, 8, 64:
            file["bytes"][file["offsets"][record] + 20] ^= 255
    pack = Pack(tmp_path / "val")

    def body(world):
        return answers_of(open_run(finished, "", world), pack, 100, world, batch=4, threads=1, progress=lambda n: None)

    for answers in run_ranks(2, body):
        assert (answers.examples, answers.without, len(answers.labels)) == (61, 4, 61)
        assert [name.split()[-1] for name, _ in answers.reasons] == ["3", "5", "8"]
        assert all("checksum" in reason for _, reason in answers.reasons)
        assert not {3, 5, 8, 64} & set(answers.record.tolist())


@pytest.mark.parametrize("total, count", [(1, 5), (7, 7), (100, 7), (65, 64), (10**8, 20000), (3, 1)])
def test_records_are_spread_evenly(total, count):
    numbers = evenly(total, count)
    assert len(numbers) == min(total, count) and numbers[0] == 0 and numbers[-1] < total
    gaps = np.diff([*numbers, total])
    assert gaps.min() >= total // count and gaps.max() <= -(-total // len(numbers))


def made(examples=3000, classes=9, seed=0):
    """Answers with few classes, so that pairs come often, and equal probabilities."""
    random = np.random.default_rng(seed)
    labels, best = random.integers(classes, size=(2, examples))
    wrong, probability = labels != best, random.integers(1, 50, size=examples) / 64
    return Answers(examples, examples, labels=labels, record=np.arange(examples)[wrong], label=labels[wrong],
                   answer=best[wrong], probability=probability[wrong], label_probability=probability[wrong] / 2)


@pytest.mark.parametrize("classes, most", [(9, 20), (9, 1000), (2, 20), (300, 20)])
def test_confused_pairs_equal_counting(classes, most):
    answers = made(classes=classes)
    counts, sums, there = Counter(), Counter(), Counter()
    for label, answer, probability in zip(answers.label.tolist(), answers.answer.tolist(),
                                          answers.probability.tolist(), strict=True):
        pair = min(label, answer), max(label, answer)
        counts[pair] += 1
        sums[pair] += probability
        there[label, answer] += 1
    expected = sorted(counts, key=lambda pair: (-counts[pair], -sums[pair], pair))[:most]
    found = confused_pairs(answers, most)
    assert [tuple(sorted((pair.first, pair.second))) for pair in found] == expected
    for pair in found:
        assert pair.there == there[pair.first, pair.second] >= pair.back == there[pair.second, pair.first]
        assert pair.of_first == (answers.labels == pair.first).sum() and pair.of_second == (
            answers.labels == pair.second).sum()
        assert len(pair.places) == pair.there + pair.back
        assert {(answers.label[i], answers.answer[i]) for i in pair.places} <= {
            (pair.first, pair.second), (pair.second, pair.first)}
        assert (np.diff(answers.probability[pair.places]) <= 0).all()


def test_surest_mistakes_and_worst_classes_equal_sorting():
    answers = made(400, 7)
    rows = sorted(zip(-answers.probability, answers.record, strict=True))
    for most in 40, 1000:
        assert answers.record[surest(answers, most)].tolist() == [record for _, record in rows[:most]]
    wrong, examples = Counter(answers.label.tolist()), Counter(answers.labels.tolist())
    expected = sorted(wrong, key=lambda one: (-wrong[one], examples[one], one))
    assert worst_classes(answers, 5) == [(one, wrong[one], examples[one]) for one in expected[:5]]


def test_no_mistakes_are_no_pairs():
    answers = made(50, 1)
    assert len(answers.record) == 0
    assert confused_pairs(answers, 5) == worst_classes(answers, 5) == [] and surest(answers, 5).tolist() == []


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("num_classes, k, logits, dtype", [
    (1, 0, "cosine", torch.float32), (2, 1, "cosine", torch.float32), (101, 6, "inner", torch.float32),
    (101, 6, "cosine", torch.bfloat16), (7, 6, "inner", torch.float32)])
def test_nearest_rows_equal_the_dense_cosines(ranks, num_classes, k, logits, dtype, tmp_path):
    rows = torch.randn(num_classes, 9, generator=torch.Generator().manual_seed(3)).to(dtype)
    rows[-1] = rows[0]  # an equal row: neither is its own neighbour
    trained = replace(opened(tmp_path, rows, [1] if num_classes > 2 else []),
                      cfg=Config(data="d", out="o", logits=logits))
    classes = [num_classes - 1, 0, min(1, num_classes - 1), num_classes // 2]
    cosines = F.normalize(rows.float()) @ F.normalize(rows.float()).T
    cosines.fill_diagonal_(-2)
    expected = cosines[classes].sort(dim=1, descending=True, stable=True)
    for near, found in run_ranks(ranks, lambda world: nearest_rows(classes, trained, k, world)):
        # The order of the two equal rows follows the rounding of their products.
        alike = [torch.where(ids == num_classes - 1, 0, ids).tolist() for ids in (near, expected.indices[:, :k])]
        assert alike[0] == alike[1] and all(len(set(row)) == k for row in near.tolist())
        assert not (near == torch.tensor(classes)[:, None]).any()
        torch.testing.assert_close(found, expected.values[:, :k], rtol=1e-5, atol=1e-6)


def test_a_class_that_many_rows_equal_is_not_its_own_neighbour(tmp_path):
    trained = replace(opened(tmp_path, torch.ones(20, 4), []), cfg=Config(data="d", out="o"))
    [(near, cosines)] = run_ranks(1, lambda world: nearest_rows([19, 2], trained, 3, world))
    assert near.tolist() == [[0, 1, 2], [0, 1, 3]] and cosines.flatten().tolist() == pytest.approx([1] * 6)
