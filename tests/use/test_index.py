"""Indexes of class rows and of images: equal to exact search and to the build of one rank; names, recall, pictures, bad
input. Ranks are threads."""

import csv
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.launch import last_json, mpirun, run
from tests.support.training import QUICK
from tests.support.use import call, done
from tests.support.worlds import run_ranks
from tests.train.test_retrieval import brute_force
from xc import embed, index, predict
from xc.comm.world import World
from xc.data.pack import Pack
from xc.errors import UserError
from xc.use import index_folder, index_recall, vectors
from xc.use.index_build import build_index, faiss
from xc.use.index_recall import Exact, measured
from xc.use.index_types import TYPES, new_index
from xc.use.vectors import FeatureRows, sample_of, take

N, D = 1003, 12


@pytest.fixture(scope="module")
def trained(tiny_packs, tmp_path_factory):
    """(run folder, folder with images by class) of a short run on tiny_packs."""
    out = tmp_path_factory.mktemp("index") / "run"
    flags = [*QUICK, "--lr", 0.003, "--epochs", 1]
    run(sys.executable, "train.py", "--data", tiny_packs, "--out", out, *flags)
    return out, tiny_packs.parent / "tree"


def made(folder, count=N, width=D, seed=0, longest=1):
    """(numbers (N, D) of length 1 to longest, in clusters, FeatureRows of them)."""
    random = np.random.default_rng(seed)
    numbers = random.normal(size=(20, width))[random.integers(0, 20, count)] + random.normal(size=(count, width)) / 2
    numbers *= random.uniform(1, longest, (count, 1)) / np.linalg.norm(numbers, axis=1, keepdims=True)
    numbers = numbers.astype(np.float32)
    numbers.tofile(folder / "numbers")
    return numbers, FeatureRows(folder / "numbers", count, width)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(vectors, "BLOCK", 37)


@pytest.mark.parametrize("rows", [[], [0], [36, 37, 38, 500, 1002], list(range(N))])
def test_rows_are_taken_from_any_block(rows, tmp_path, small_blocks):
    numbers, file = made(tmp_path)
    assert np.array_equal(take(file, np.array(rows, np.int64)), numbers[rows])


def test_a_sample_has_no_repeats():
    for size in 1, 50, 90, 200:
        rows = sample_of(90, size, seed=3)
        assert len(rows) == min(size, 90) and (np.diff(rows) > 0).all() and rows.max() < 90


@pytest.mark.parametrize("kind", [*TYPES, "IVF5,SQ8", "PCA6,IVF7,Flat", "OPQ2,IVF4,PQ2x4", "SQ8", "IVF6,PQ4x4fs"])
def test_any_number_of_ranks_builds_the_same_index(kind, tmp_path, small_blocks):
    numbers, file = made(tmp_path)

    def body(world):
        built = build_index(file, kind, 0, tmp_path, world)
        assert (built is None) == (world.rank > 0)
        return built and (faiss.serialize_index(built).tobytes(), built.ntotal)

    (alone,) = run_ranks(1, body)
    assert alone[1] == N
    for ranks in 2, 3:
        assert run_ranks(ranks, body)[0] == alone
    assert [path.name for path in tmp_path.iterdir()] == ["numbers"]  # parts are gone


def test_more_ranks_than_vectors(tmp_path):
    numbers, file = made(tmp_path, count=2)
    for kind in TYPES:
        built = run_ranks(4, lambda world, kind=kind: build_index(file, kind, 0, tmp_path, world))[0]
        assert built.search(numbers[:1], 1)[1].tolist() == [[0]]


def test_a_flat_index_finds_what_is_nearest(tmp_path, small_blocks):
    numbers, file = made(tmp_path)
    built = build_index(file, "flat", 0, tmp_path, World())
    assert np.array_equal(built.search(numbers[:50], 7)[1], np.argsort(-numbers[:50] @ numbers.T, 1, "stable")[:, :7])


def dense_recall(numbers, rows, found, k):
    """Share of the k nearest other vectors of some rows among the first k that were found, (q, …) rows."""
    scores = numbers[rows].astype(np.float64) @ numbers.T
    scores[np.arange(len(rows)), rows] = -np.inf
    hits = 0
    for row, of_query in enumerate(found):
        others = [one for one in of_query if one != rows[row]][:k]
        hits += len(set(others) & set(np.argsort(-scores[row])[:k]))
    return hits / (k * len(rows))


@pytest.mark.parametrize("ranks, longest", [(1, 1), (2, 1), (3, 1), (2, 9)])
def test_recall_is_the_share_of_the_exact_neighbours(ranks, longest, tmp_path, small_blocks):
    """Of inner products as well, where vectors have any length."""
    numbers, file = made(tmp_path, longest=longest)
    rows = sample_of(N, 60, seed=1)

    def body(world):
        built = build_index(file, "IVF30,Flat", 0, tmp_path, world)
        exact = Exact(file, rows, 10, world)
        return built and (exact, built)

    exact, built = run_ranks(ranks, body)[0]
    scores = numbers[rows].astype(np.float64) @ numbers.T
    scores[np.arange(len(rows)), rows] = -np.inf
    assert np.array_equal(exact.found, np.argsort(-scores, 1)[:, :10])
    for nprobe in 1, 4, 30:
        built.nprobe = nprobe
        some = np.arange(0, 60, 3)
        recalls, found = exact.recalls_of(built, some), built.search(numbers[rows[some]], 11)[1]
        for k in 1, 10:
            assert recalls[k] == pytest.approx(dense_recall(numbers, rows[some], found, k))
        assert (recalls[10] < 0.9) if nprobe == 1 else (nprobe < 30 or recalls[10] == 1)


def test_equal_vectors_are_all_right(tmp_path):
    """An index may give any of them first."""
    numbers = np.repeat(np.eye(4, dtype=np.float32), 30, axis=0)
    numbers.tofile(tmp_path / "numbers")
    file = FeatureRows(tmp_path / "numbers", 120, 4)
    assert measured(build_index(file, "flat", 0, tmp_path, World()), file, 1, 0, World())["recall_at_1"] == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_search_setting_grows_until_the_recall_is_there(ranks, tmp_path, monkeypatch):
    numbers, file = made(tmp_path)
    monkeypatch.setattr(index_recall, "_TUNED_BY", 100)

    def body(world):
        built = build_index(file, "IVF30,Flat", 0, tmp_path, world)
        results = [measured(built, file, target, 0, world) for target in (0.2, 0.95, 1.0)]
        return results, built and built.nprobe

    found = run_ranks(ranks, body)
    results, last = found[0]
    assert all(one[0] == results for one in found)
    probes = [one["search"]["nprobe"] for one in results]
    assert probes[0] == 1 < probes[1] <= probes[2] == last
    assert results[0]["recall_at_10"] < results[1]["recall_at_10"] >= 0.93
    assert results[0]["recall_queries"] == 800


def test_names_are_found_across_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(index_folder, "GROUP", 5)
    writer = index_folder.NamesWriter(tmp_path / index_folder.NAMES)
    for start, stop in (0, 3), (3, 11), (11, 12), (12, 23):
        writer.add([f"ü{i}" for i in range(start, stop)], [2 * i for i in range(start, stop)])
    writer.close()
    new = faiss.IndexFlatIP(2)
    new.add(np.ones((23, 2), np.float32))
    index_folder.write_index(tmp_path, new, {"count": 23, "feature_dim": 2})
    meta = json.loads((tmp_path / "index.json").read_text())
    opened = index_folder.open_index(tmp_path, meta, True)
    assert opened.named(np.array([[22, 4], [5, 5]])) == {22: ("ü22", 44), 4: ("ü4", 8), 5: ("ü5", 10)}


def query(monkeypatch, ranks, folder, src, out, *flags):
    done(monkeypatch, index, ranks, "query", folder, src, "--out", out, *flags)
    with open(out, newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_images_are_found_as_by_all_products(ranks, trained, tmp_path, monkeypatch, capsys):
    folder, tree = trained
    done(monkeypatch, index, ranks, "build", folder, tree / "train", "--out", tmp_path / "a.index", "--batch-size", 7)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["recall_at_1"], facts["recall_at_10"], facts["count"], facts["images"]) == (1, 1, 120, 120)
    rows = query(monkeypatch, ranks, tmp_path / "a.index", tree / "test", tmp_path / "a.csv", "--top", 4)
    found = {}
    for src in "train", "test":
        done(monkeypatch, embed, 1, folder, tree / src, "--out", tmp_path / f"{src}.npy")
        names = (tmp_path / f"{src}.txt").read_text().splitlines()
        found[src] = np.load(tmp_path / f"{src}.npy"), names
    scores = found["test"][0] @ found["train"][0].T
    for i, name in enumerate(found["test"][1]):
        mine, best = rows[4 * i : 4 * i + 4], np.argsort(-scores[i], kind="stable")[:4]
        assert {row["path"] for row in mine} == {name} and [row["rank"] for row in mine] == list("1234")
        assert [float(row["score"]) for row in mine] == pytest.approx(scores[i, best], abs=1e-5)
        for row, other in zip(mine, best, strict=True):
            place = found["train"][1].index(row["name"])
            assert scores[i, place] == pytest.approx(scores[i, other], abs=1e-5)
    assert {path.name for path in (tmp_path / "a.index").iterdir()} == {"index.faiss", "names.parquet", "index.json"}


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_nearest_class_rows_are_the_classes_that_are_predicted(ranks, trained, tmp_path, monkeypatch):
    folder, tree = trained
    done(monkeypatch, index, ranks, "build", folder, "--out", tmp_path / "a.index", "--type", "hnsw")
    rows = query(monkeypatch, ranks, tmp_path / "a.index", tree / "test", tmp_path / "a.csv", "--top", 10)
    done(monkeypatch, predict, 1, folder, tree / "test", "--out", tmp_path / "b.csv", "--top", 10)
    with open(tmp_path / "b.csv", newline="") as file:
        expected = list(csv.DictReader(file))
    assert [(row["path"], row["name"]) for row in rows] == [(row["path"], row["class"]) for row in expected]


def test_bad_images_are_rows_with_a_reason_and_not_in_the_index(trained, tmp_path, monkeypatch, capsys):
    folder, tree = trained
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((tree / "test").glob("*/*.png"))[:7]):
        shutil.copy(path, flat / f"{i}.png")
    (flat / "3.png").write_bytes((flat / "3.png").read_bytes()[:100])
    (flat / "0notes.dat").write_text("no image")
    done(monkeypatch, index, 2, "build", folder, flat, "--out", tmp_path / "a.index", "--batch-size", 1)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (facts["count"], facts["images"], facts["without_result"]) == (6, 8, 2)
    rows = query(monkeypatch, 2, tmp_path / "a.index", flat, tmp_path / "a.csv", "--top", 1, "--sheet",
                 tmp_path / "a.png")
    bad = {row["path"].rpartition("/")[2] for row in rows if row["reason"]}
    assert bad == {"3.png", "0notes.dat"} and all(not row["name"] for row in rows if row["reason"])
    assert all(row["name"] == row["path"] for row in rows if not row["reason"])  # each finds itself
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape == (6 * 110, 2 * 96, 3)
    for top in range(0, 6 * 110, 110):  # and so does its picture
        assert np.array_equal(sheet[top : top + 96, :96], sheet[top : top + 96, 96:])
    assert "no picture" not in capsys.readouterr().err
    (flat / "5.png").unlink()
    (tmp_path / "a.png").unlink()
    done(monkeypatch, index, 1, "query", tmp_path / "a.index", tree / "test", "--sheet", tmp_path / "a.png", "--top", 9)
    text = capsys.readouterr()
    assert "2 of 6 neighbours have no picture" in text.err  # 5 is gone, and 6 is where it was
    assert "leaves out" not in text.err and text.out.count(".png\n") == 30 * 7  # without --out they are printed


def test_class_rows_have_the_picture_of_their_first_image(trained, tiny_packs, tmp_path, monkeypatch, capsys):
    folder, tree = trained
    done(monkeypatch, index, 1, "build", folder, "--out", tmp_path / "a.index")
    done(monkeypatch, index, 1, "query", tmp_path / "a.index", tree / "test" / "class4", "--sheet", tmp_path / "a.png",
         "--top", 2)
    assert "no picture" not in capsys.readouterr().err
    sheet, pack = np.asarray(Image.open(tmp_path / "a.png")), Pack(tiny_packs / "train")
    lines = query(monkeypatch, 1, tmp_path / "a.index", tree / "test" / "class4", tmp_path / "a.csv", "--top", 1)
    label = pack.class_names(0, 10).index(lines[0]["name"])
    first = int(np.flatnonzero(pack.labels(0, 120) == label)[0])
    picture = Image.open(io.BytesIO(pack.read([first])[0][0])).convert("RGB").resize((96, 96))
    assert np.abs(sheet[:96, 96:192].astype(int) - np.asarray(picture)).mean() < 25


def refused(monkeypatch, folder, *arguments, ranks=2):
    before = sorted(folder.rglob("*"))
    texts = {str(error) for error in call(monkeypatch, index, ranks, *arguments)}
    assert len(texts) == 1 and sorted(folder.rglob("*")) == before, texts
    (text,) = texts
    assert "\n" not in text and text != "None"
    return text.replace(str(folder), "")


def test_bad_input_is_one_line_and_nothing_is_written(trained, tiny_packs, tmp_path, monkeypatch, capsys):
    (folder, tree), new = trained, ("--out", tmp_path / "new")
    photos, (checkpoint,) = tree / "test", (trained[0] / "checkpoints").iterdir()
    done(monkeypatch, index, 1, "build", folder, photos, "--out", tmp_path / "a.index")
    (tmp_path / "note.png").write_text("hello")
    (tmp_path / "cut.png").write_bytes((photos / "class0" / "0.png").read_bytes()[:100])
    (tmp_path / "empty").mkdir()
    (tmp_path / "there.csv").write_text("mine")
    advice = "give flat, ivf, hnsw, ivfpq, or another factory string of faiss"
    a, image = tmp_path / "a.index", photos / "class0" / "0.png"
    cases = [
        (["build", folder, "--out", a], "/a.index exists; remove it or give another name"),
        (["build", folder, photos, *new, "--type", "IVF99999,Flat"],
         f"--type IVF99999,Flat: 99999 is not a number of cells from 1 to 30: {advice}"),
        (["build", folder, *new, "--type", "IVF11,Flat"],
         f"--type IVF11,Flat: 11 is not a number of cells from 1 to 10: {advice}"),
        (["build", folder, *new, "--type", "flatt"], "--type flatt is no index of 8 numbers by inner product (could "
         f"not parse index string flatt): {advice}"),
        (["build", folder, *new, "--type", "LSH"],
         f"--type LSH is no index of 8 numbers by inner product ('metric == METRIC_L2' failed): {advice}"),
        (["build", folder, *new, "--type", "IDMap,Flat"],
         "--type IDMap,Flat: rows are numbered already, so leave IDMap out"),
        *((["build", folder, *new, "--type", kind], f"--type {kind}: faiss crashes on parts of 0, and on graphs of "
           f"other than 2 to 512 links: {advice}")
          for kind in ("HNSW0", "HNSW1", "HNSW2000000", "PQ4x0", "NSG0,Flat", "PCA0,Flat")),
        (["build", folder, photos, *new, "--classes", tiny_packs],
         f"--classes {tiny_packs} names class rows, and {photos} is indexed: leave out one of them"),
        (["build", folder, *new, "--classes", tmp_path], f"the names of the classes cannot be read ({tmp_path}: not a "
         "pack: it holds neither index.h5 nor a folder train with one): name the pack of the run by --classes"),
        (["build", tmp_path, *new], " is not the folder of a run (config.json: "),
        (["build", folder, tmp_path / "empty", *new], "/empty holds no images: name a folder of images, or what "
         "data_tools.pack reads"),
        (["build", folder, tmp_path / "note.png", *new], "none of the 1 images of /note.png can be used, the first is "
         "/note.png (not an image"),
        (["build", folder, tmp_path / "cut.png", *new], "none of the 1 images of /cut.png can be used, the first is "
         "/cut.png (does not decode"),
        (["query", tmp_path / "empty", image], "/empty is no index (index.json: [Errno 2] No such file or directory: "
         "'/empty/index.json'): name the --out of xc.index build"),
        (["query", a, tmp_path / "none"], "/none: no such file or folder: name images"),
        (["query", a, tmp_path / "note.png"], "none of the 1 images of /note.png can be used, the first is /note.png "
         "(not an image"),
        (["query", a, tmp_path / "cut.png"], "none of the 1 images of /cut.png can be used, the first is /cut.png "
         "(does not decode"),
        (["query", a, image, "--out", tmp_path / "there.csv"], "/there.csv exists; remove it or give another name"),
        (["query", a, image, "--out", tmp_path / "b.txt"], "--out /b.txt: name a file that ends in .parquet or .csv or "
         ".jsonl"),
        (["query", a, photos, "--sheet", photos / "s.png"],
         f"{photos}/s.png lies inside {photos}; give a place outside"),
        (["query", a, image, "--sheet", tmp_path / "b.jpg"], "--sheet /b.jpg: name a file that ends in .png"),
        (["query", a, image, "--sheet", tmp_path / "note.png"], "/note.png exists; remove it or give another name"),
        (["query", a, image, "--classes", tiny_packs], f"--classes {tiny_packs} has pictures of classes for --sheet: "
         "leave it out"),
        (["query", a, image, "--run", tmp_path / "empty"], f"/a.index was built with {checkpoint.name}, which /empty "
         "does not have: build the index again, or name a run that has it by --run"),
        (["query", a, image, "--top", 0], "argument --top: 0 is not between 1 and 1000; see python -m xc.index query "
         "--help"),
        (["evaluate", folder, tiny_packs], f"{tiny_packs} has the splits train, test: name one of them, as "
         f"{tiny_packs}/test"),
        (["evaluate", folder, tmp_path / "empty"], "/empty: not a pack: it holds neither index.h5 nor a folder train "
         "with one"),
        (["search"], "argument COMMAND: invalid choice: 'search' (choose from 'build', 'query', 'evaluate'); see "
         "python -m xc.index --help"),
    ]
    capsys.readouterr()
    for arguments, text in cases:
        found = refused(monkeypatch, tmp_path, *arguments)
        assert found.startswith(text.replace(str(tmp_path), "")), arguments
    assert not capsys.readouterr().out


def test_an_index_of_another_width_or_checkpoint_or_with_a_damaged_file_is_refused(
        trained, tiny_packs, tmp_path, monkeypatch):
    folder, tree = trained
    image, a = tree / "test" / "class0" / "0.png", tmp_path / "a.index"
    done(monkeypatch, index, 1, "build", folder, tree / "test", "--out", a)
    good = (a / "index.json").read_text()
    meta = json.loads(good)

    def refused_with(changes):
        (a / "index.json").write_text(json.dumps(meta | changes))
        return refused(monkeypatch, tmp_path, "query", a, image)

    checkpoint = folder / "checkpoints" / meta["checkpoint"]
    same = f"and {checkpoint} has"
    other = "query with the run and checkpoint of the index, or build the index again"
    assert refused_with({"feature_dim": 9}) == f"/a.index was built with feature_dim 9 {same} 8: {other}"
    assert refused_with({"backbone_crc32": 1}) == (f"/a.index was built with backbone_crc32 1 {same} "
                                                   f"{meta['backbone_crc32']}: {other}")
    assert refused_with({"classes_digest": "x"}).startswith(f"/a.index was built with classes_digest x {same}")
    assert refused_with({"run": "/none"}) == ("/a.index was built from the run /none, which is not there: name it by "
                                              "--run")
    assert refused_with({"checkpoint": "step-00000009"}).startswith("/a.index was built with step-00000009, which ")
    assert refused_with({"count": 31}) == ("/a.index: the number of vectors of index.faiss is 30, and index.json says "
                                           "31: build the index again")
    assert refused_with({"count": None}) == "/a.index/index.json is damaged: count is None: build the index again"
    assert refused_with({"version": 9}) == "/a.index is no index of format xc-index, version 1: build it again"
    wide = faiss.IndexFlatIP(9)
    wide.add(np.ones((30, 9), np.float32))
    faiss.write_index(wide, str(a / "wide"))
    size = (a / "wide").stat().st_size
    (a / "index.faiss").rename(a / "old")
    (a / "wide").rename(a / "index.faiss")
    assert refused_with({"index_bytes": size}) == ("/a.index: the vectors of index.faiss have width 9, and index.json "
                                                   "says 8: build the index again")
    assert refused_with({}) == (f"/a.index/index.faiss has {size} bytes, not {meta['index_bytes']}: build the index "
                                "again")
    (a / "index.faiss").write_bytes(b"x" * 50)
    assert refused_with({"index_bytes": 50}).startswith("/a.index cannot be read (")
    (a / "old").rename(a / "index.faiss")
    (a / "index.json").write_text(good)
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    done(monkeypatch, index, 1, "query", a, image, "--run", moved)


@pytest.fixture(scope="module")
def unseen(tiny_packs, tmp_path_factory):
    """A pack of classes that training has no image of."""
    out = tmp_path_factory.mktemp("unseen") / "packs"
    run("python", "-m", "data_tools.split", tiny_packs / "train", out, "--test", 0.4, "--by", "class")
    return out / "test"


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_pack_is_evaluated_as_by_the_definition(ranks, trained, unseen, tmp_path, monkeypatch, capsys):
    done(monkeypatch, index, ranks, "evaluate", trained[0], unseen, "--batch-size", 5)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    done(monkeypatch, embed, 1, trained[0], unseen, "--out", tmp_path / "a.npy")
    labels = torch.from_numpy(Pack(unseen).labels(0, 48))
    expected = brute_force(torch.from_numpy(np.load(tmp_path / "a.npy")), labels)
    assert tuple(found[name] for name in ("recall_at_1", "recall_at_10", "recall_at_100", "map", "queries",
                                          "queries_without_match")) == pytest.approx(expected, abs=1e-4)
    assert found["examples"] == 48 and found["bad_records"] == 0


def test_records_that_cannot_be_read_are_counted(trained, spoiled_packs, monkeypatch, capsys):
    done(monkeypatch, index, 2, "evaluate", trained[0], spoiled_packs / "train", "--max-bad-records", 3)
    text = capsys.readouterr()
    found = json.loads(text.out.splitlines()[-1])
    assert (found["bad_records"], found["examples"]) == (3, 117) and text.err.count("warning: left out") == 3
    with pytest.raises(ValueError, match="record 7"):
        call(monkeypatch, index, 1, "evaluate", trained[0], spoiled_packs / "train")


def test_too_large_for_this_host_is_said_before_it_is_built():
    with pytest.raises(UserError, match=r"--type flat takes 5\d{5}\.\d GB for 10{12} vectors.*give --type ivfpq"):
        new_index("flat", 10**12, 128)


@pytest.mark.mpi
def test_real_ranks_build_and_query(trained, tmp_path, monkeypatch):
    folder, tree = trained
    build = "build", folder, "--type", "ivfpq"  # class rows: features would differ by rounding
    done(monkeypatch, index, 1, *build, "--out", tmp_path / "1")
    facts = last_json(mpirun(2, "-m", "xc.index", *build, "--out", tmp_path / "2"))
    first, second = (faiss.read_index(str(tmp_path / f"{ranks}" / "index.faiss")) for ranks in (1, 2))
    assert faiss.serialize_index(first).tobytes() == faiss.serialize_index(second).tobytes()
    assert second.nprobe == facts["search"]["nprobe"] and facts["count"] == 10
    mpirun(2, "-m", "xc.index", "query", tmp_path / "2", tree / "test", "--out", tmp_path / "a.csv")
    again = mpirun(2, "-m", "xc.index", "query", tmp_path / "2", tree / "test", "--out", tmp_path / "a.csv", expect=2)
    assert again.stderr.count("error: ") == 1
