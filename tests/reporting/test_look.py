"""What is shown of a run belongs together: names, counts, probabilities, pictures of the same classes and records."""

import base64
from dataclasses import replace

import numpy as np
import pytest

from tests.reporting.conftest import NAMES
from tests.support.packs import write_pack
from tests.support.worlds import run_ranks
from xc.data.pack import Pack
from xc.reporting.answers import answers_of
from xc.reporting.look import Look, neighbour_classes, open_model
from xc.reporting.mistakes import Pair
from xc.reporting.pictures import Pictures, thumbnail
from xc.reporting.runs import read_runs


@pytest.fixture(scope="module")
def look(finished):
    [run] = read_runs([finished])

    def body(world):
        model, reason = open_model(run, "", world)
        assert reason == "" and model.split == "val"
        answers = answers_of(model.trained, model.pack, 1000, world, batch=8, threads=1, progress=lambda count: None)
        return Look(model, answers, world)

    return run_ranks(2, body)[0]


@pytest.fixture(scope="module")
def section(look):
    return look.shown(Pictures(10**7))


def uri(pack, record):
    kind, data = thumbnail(pack.read([record])[0][0])
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def test_pairs(look, section, packs):
    answers, train = look.answers, Pack(packs / "train")
    labels = train.labels(0, len(train))
    assert len(section["pairs"]) == len(look.pairs) > 5
    for shown in section["pairs"]:
        first, second = (shown[side]["number"] for side in ("first", "second"))
        assert (shown["first"]["name"], shown["second"]["name"]) == (NAMES[first], NAMES[second])
        assert shown["there"] == ((answers.label == first) & (answers.answer == second)).sum() >= shown["back"]
        assert shown["back"] == ((answers.label == second) & (answers.answer == first)).sum()
        assert (shown["of_first"], shown["of_second"]) == ((answers.labels == first).sum(),
                                                           (answers.labels == second).sum())
        for side in "first", "second":
            records = np.flatnonzero(labels == shown[side]["number"])[:3]
            assert shown[side]["pictures"] == [uri(train, record) for record in records]
        for mistake in shown["mistakes"]:
            assert {mistake["label"], mistake["answer"]} == {NAMES[first], NAMES[second]}
    assert any(shown["back"] for shown in section["pairs"]) and any(
        shown["back"] < shown["there"] for shown in section["pairs"])


def test_surest_wrong_answers(look, section, packs):
    pack, answers = Pack(packs / "val"), look.answers
    found = [one["probability"] for one in section["wrong"]]
    assert found == sorted(answers.probability.tolist(), reverse=True)[:40] and len(found) > 10
    for one in section["wrong"]:
        [place] = np.flatnonzero(answers.record == one["record"])
        assert one["picture"] == uri(pack, one["record"])
        assert one["label"] == one["of_label"]["name"] == NAMES[pack.labels(one["record"], one["record"] + 1)[0]]
        assert one["answer"] == one["of_answer"]["name"] == NAMES[answers.answer[place]]


def test_neighbours(look, section):
    assert [(row["own"]["number"], row["why"], [(near["number"], near["cosine"]) for near in row["near"]])
            for row in section["neighbours"]] == look.neighbours
    for row in section["neighbours"]:
        cosines = [near["cosine"] for near in row["near"]]
        assert len(cosines) == 6 and cosines == sorted(cosines, reverse=True)
        assert row["own"]["number"] not in [near["number"] for near in row["near"]]
        assert all(near["name"] == NAMES[near["number"]] for near in [row["own"], *row["near"]])


def test_examples_of_classes_without_images_in_train_are_counted(look, section, packs, tmp_path):
    assert section["untrained"] == 0
    images = Pack(packs / "train").read([0, 1])[0]
    train = Pack(write_pack(tmp_path / "train", NAMES, [(images[0], 0), (images[1], 2)], 10**5))
    other = Look.__new__(Look)
    other.model, other.answers = replace(look.model, train=train), look.answers
    assert other._untrained == (~np.isin(look.answers.labels, [0, 2])).sum() > 40


def test_classes_whose_neighbours_are_shown():
    pairs = [Pair(first, first + 1, 1, 0, 1, 1, np.array([0])) for first in range(0, 20, 2)]
    worst = [(1, 9, 9), (50, 5, 6), (60, 4, 4), (61, 3, 4), (62, 2, 4), (63, 1, 4)]
    found = neighbour_classes(pairs, worst, 10**8)
    assert list(found.items())[:12] == [*((one, "of a confused pair") for one in range(8)), (50, "5 of 6 wrong"),
                                        (60, "4 of 4 wrong"), (61, "3 of 4 wrong"), (62, "2 of 4 wrong")]
    assert list(found.values())[12:] == ["random"] * 6 and found == neighbour_classes(pairs, worst, 10**8)
    assert set(neighbour_classes([], [], 1)) == {0}
