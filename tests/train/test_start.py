"""A run that starts from another one: rows by class name, new rows from features, at any number of ranks (threads)."""

import json
import random
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.support.launch import mpirun, run
from tests.support.packs import contents, write_pack
from tests.support.training import QUICK, call_main, refusal
from tests.support.worlds import run_ranks
from xc import config
from xc.checkpoint import saved_run
from xc.comm.shard import Shard
from xc.comm.world import World
from xc.data import loader as loaders
from xc.data.augment import norm_of, prepared
from xc.data.pack import Pack
from xc.errors import ExitRun
from xc.model.initial_rows import RANDOM_LENGTH, initial_rows
from xc.run import folder as run_folder
from xc.run import signals
from xc.train import setup
from xc.train.start import Start

KEPT = [f"class{label}" for label in (1, 2, 4, 5, 6, 7, 8, 9)]
GONE, NEW, WITHOUT_IMAGES = ["class0", "class3"], ["added", "item 5", "only in test"], "only in test"


@pytest.fixture(scope="module")
def old(tiny_packs, tmp_path_factory):
    """The folder of a run of 3 ranks on tiny_packs."""
    out = tmp_path_factory.mktemp("old") / "run"
    mpirun(3, "train.py", "--data", tiny_packs, "--out", out, *QUICK, "--lr", 0.003, "--steps", 5)
    return out


INNER = ["--logits", "inner", "--scale", 1, "--lr", 0.003, "--steps", 5]


@pytest.fixture(scope="module")
def inner(tiny_packs, tmp_path_factory):
    """The folder of a run with --logits inner."""
    out = tmp_path_factory.mktemp("inner") / "run"
    run(sys.executable, "train.py", "--data", tiny_packs, "--out", out, *QUICK, *INNER)
    return out


@pytest.fixture(scope="module")
def packs(tiny_packs, tmp_path_factory):
    """The packs of the new catalogue: the names of its classes are NEW and KEPT, in this order."""
    out, names = tmp_path_factory.mktemp("new"), NEW + KEPT
    was = dict(zip(NEW, [*GONE, "class1"], strict=True)) | {name: name for name in KEPT}
    for split in "train", "test":
        images = sorted((image, name) for image, name in contents(Pack(tiny_packs / split)).items())
        random.Random(split).shuffle(images)
        write_pack(out / split, names, [(image, label) for image, of in images for label, name in enumerate(names)
                                        if was[name] == of and (split, name) != ("train", WITHOUT_IMAGES)])
    return out


def started(ranks, *flags, stopped=lambda: False):
    """[(weight (S, D), what fill_rows returned, backbone)] of every rank after the start, none of which trained."""
    cfg = config.parse([*map(str, [*QUICK, "--out", "unused", *flags])])

    def body(world):
        _, splits, loader, _ = setup.data(cfg, world)
        state = setup.state(cfg, splits["train"], world)
        before = state.head.weight.clone()
        start = Start(cfg, state, splits["train"], False, world)
        done = start.fill_rows(loader, stopped)
        assert not done or start.rows_known == bool(cfg.init_rows == "features" or (before != state.head.weight).any())
        return state.head.weight, done, state.backbone

    return run_ranks(ranks, body)


def rows_of(found):
    return torch.cat([weight for weight, _, _ in found])


def saved_rows(out):
    (checkpoint,) = (out / "checkpoints").iterdir()
    return torch.cat([load_file(path)["weight"] for path in sorted(checkpoint.glob("rows-*"))])


def random_rows(count):
    return initial_rows(Shard(0, count), 8, 0)


def names_of(path):
    table = Pack(path / "train").names
    return table.class_names(0, table.num_classes)


def discriminants(packs, backbone, names):
    """{name: direction of the row} of some classes, by the features of each image by itself, in float64."""
    cfg = config.parse(["--data", str(packs), "--out", "unused"])
    split, found = loaders.open_splits(cfg)["train"], {}
    backbone.eval()
    for record in range(len(split)):
        image, (label,) = split.examples([record])
        with torch.no_grad():
            feature = backbone(prepared(image, norm=norm_of(cfg.input_norm, cfg.channels)))
        found.setdefault(names_of(packs)[label], []).append(F.normalize(feature.double())[0])
    features = {name: torch.stack(found[name]) for name in names}
    around = torch.cat([one - one.mean(0) for one in features.values()])
    scatter = around.T @ around
    scatter = scatter / (scatter.trace() / len(scatter)) + 2 * torch.eye(len(scatter))
    return {name: F.normalize(torch.linalg.solve(scatter, one.sum(0)), dim=0) for name, one in features.items()}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_rows_are_kept_by_name_and_new_ones_come_from_features(ranks, old, packs, tiny_packs):
    found = started(ranks, "--data", packs, "--init", old, "--global-batch", 7)
    rows, before = rows_of(found), saved_rows(old)
    at, was_at = ({name: i for i, name in enumerate(names_of(path))} for path in (packs, tiny_packs))
    expected = {name: F.normalize(before[was_at[name]], dim=0) for name in KEPT}
    new = discriminants(packs, found[0][2], [name for name in NEW if name != WITHOUT_IMAGES])
    expected |= {name: direction.float() for name, direction in new.items()}
    assert len(expected) == len(rows) - 1
    for name, direction in expected.items():
        torch.testing.assert_close(rows[at[name]], direction * RANDOM_LENGTH, rtol=1e-3, atol=1e-4)
    assert rows[at[WITHOUT_IMAGES]].equal(random_rows(len(rows))[at[WITHOUT_IMAGES]])


def test_rows_of_new_classes_may_stay_random(old, packs):
    rows = rows_of(started(2, "--data", packs, "--init", old, "--init-rows", "random"))
    at = [names_of(packs).index(name) for name in NEW]
    assert rows[at].equal(random_rows(len(rows))[at])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_of_weights_gets_all_rows_from_features(dtype, old, packs):
    """The norm of the features takes the statistics of each batch, here of all images."""
    (checkpoint,) = (old / "checkpoints").iterdir()
    flags = ["--data", packs, "--init", checkpoint / "backbone.safetensors", "--global-batch", 120, "--row-dtype",
             dtype]
    one, three = (rows_of(started(ranks, *flags)) for ranks in (1, 3))
    torch.testing.assert_close(one, three, rtol=1e-2 if dtype == "bfloat16" else 1e-4, atol=1e-3)
    without = names_of(packs).index(WITHOUT_IMAGES)
    lengths = one.float().norm(dim=1)
    torch.testing.assert_close(lengths[torch.arange(len(one)) != without],
                               torch.full((len(one) - 1,), RANDOM_LENGTH), rtol=1e-2, atol=0)


def test_a_stop_is_heard_while_features_are_computed(old, packs):
    for _, done, _ in started(2, "--data", packs, "--init", old, stopped=lambda: True):
        assert done is False


@pytest.mark.parametrize("ranks", [1, 3])
def test_rows_of_inner_products_keep_their_length(ranks, inner, packs, tiny_packs):
    rows = rows_of(started(ranks, "--data", packs, "--init", inner, *INNER))
    at, was_at = ({name: i for i, name in enumerate(names_of(path))} for path in (packs, tiny_packs))
    kept = rows[[at[name] for name in KEPT]]
    assert kept.equal(saved_rows(inner)[[was_at[name] for name in KEPT]])
    for name in set(NEW) - {WITHOUT_IMAGES}:
        torch.testing.assert_close(rows[at[name]].norm(), kept.norm(dim=1).mean(), rtol=1e-5, atol=0)


def test_the_same_classes_are_all_kept(old, tiny_packs):
    rows = rows_of(started(2, "--data", tiny_packs, "--init", old))
    torch.testing.assert_close(rows, F.normalize(saved_rows(old)) * RANDOM_LENGTH)


def test_the_run_folder_says_what_was_kept_is_new_and_is_gone(old, packs, tmp_path, monkeypatch, capfd):
    flags = ["--data", packs, "--out", tmp_path / "run", *QUICK, "--init", old, "--lr", 0.003, "--head", "knn",
             "--active-classes", 11, "--neighbors", 3]
    assert call_main(monkeypatch, 2, *flags, "--steps", 2) == [None, None]
    out = capfd.readouterr().out
    assert f"init: backbone and class rows of {old}, step-00000005\n" in out
    assert "init: of the classes 8 are kept, 3 new, 2 gone" in out
    assert "init: rows of 2 classes from the features of 24 images; 1 have no image, their rows are random" in out
    found = json.loads((tmp_path / "run" / "init.json").read_text())
    assert found == {"run": str(old), "checkpoint": "step-00000005", "kept": 8, "new": 3, "gone": 2}
    assert sorted((tmp_path / "run" / "init-new.txt").read_text().splitlines()) == NEW
    assert sorted((tmp_path / "run" / "init-gone.txt").read_text().splitlines()) == GONE
    # The rows tell which classes are near, so the graph is built at once.
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "graph_exact" in line] == [0]

    run_folder._locks.pop().close()  # as at the end of its process
    assert call_main(monkeypatch, 3, *flags, "--steps", 3, "--resume", "auto") == [None] * 3
    assert "--init is not read" in capfd.readouterr().out


def test_the_names_of_a_run_outlive_its_pack(old, packs, tiny_packs, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(old, copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"data": str(tmp_path / "gone")}))
    assert (copy / run_folder.CLASSES_FILE).read_bytes() == (tiny_packs / "train" / "index.h5").read_bytes()
    reference = rows_of(started(2, "--data", packs, "--init", old))
    assert rows_of(started(2, "--data", packs, "--init", copy)).equal(reference)

    (copy / run_folder.CLASSES_FILE).unlink()  # as of code that did not keep them
    text = refusal(monkeypatch, 2, "--data", packs, "--out", tmp_path / "new", *QUICK, "--init", copy)
    assert text.startswith("the names of the classes cannot be read")
    assert text.endswith("move the pack of that run back")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("flags", "text"), [
    (["--feature-dim", 9], "--feature-dim 9 does not fit --init OLD, which has 8: give --feature-dim 8"),
    (["--channels", 3], "--channels 3 does not fit --init OLD, which has 1: give --channels 1"),
    (["--logits", "inner"], "--logits inner does not fit --init OLD, which has cosine: give --logits cosine"),
    (["--input-norm", "imagenet"], "--input-norm imagenet does not fit --init OLD, which has half: give "
     "--input-norm half"),
    (["--backbone", "resnet18"], "--backbone resnet18 does not fit --init OLD, which has small: give --backbone small"),
])
def test_a_run_that_does_not_fit_is_refused(flags, text, old, packs, tmp_path, monkeypatch):
    found = refusal(monkeypatch, 2, "--data", packs, "--out", tmp_path / "new", *QUICK, "--init", old, *flags)
    assert found == text.replace("OLD", str(old)) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("here, text", [
    (["--image-size", 96], "size mismatch for 0.conv1.weight: "),
    (["--data", "synth:classes=9,dim=4,test=0"], "--backbone resnet18 takes images"),
])
def test_a_network_of_other_inputs_is_refused(here, text, tmp_path, monkeypatch):
    flags = [*QUICK, "--data", "synth:classes=9,dim=4,images=1,test=0", "--backbone", "resnet18", "--image-size", 16]
    run(sys.executable, "train.py", "--out", tmp_path / "run", *flags, "--steps", 1)
    found = refusal(monkeypatch, 2, "--out", tmp_path / "new", *flags, "--init", tmp_path / "run", *here)
    assert text in found and not (tmp_path / "new").exists()
    if "--image-size" in here:
        assert found.endswith(f"give --image-size 16 and --data of the kind of synth:classes=9,dim=4,images=1,test=0, "
                              f"as {tmp_path / 'run'} has them")


def test_all_ranks_take_the_checkpoint_that_rank_0_sees(old, packs, monkeypatch):
    """A run that still trains saves and removes some between the looks of two ranks."""
    looks, best_of = [], saved_run.best_of
    monkeypatch.setattr(saved_run, "best_of", lambda folders: looks.append(folders) or best_of(folders))
    started(3, "--data", packs, "--init", old, "--init-rows", "random")
    assert len(looks) == 1


def test_lists_that_cannot_be_written_end_all_ranks(old, packs, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "init-gone.txt").symlink_to("/dev/full")
    text = refusal(monkeypatch, 2, "--data", packs, "--out", tmp_path / "run", *QUICK, "--init", old, "--resume",
                   "auto")
    assert "No space left on device" in text


def test_a_run_without_a_checkpoint_may_change_its_classes(packs, tiny_packs, tmp_path, monkeypatch):
    """Its folder has the names of the classes that it trains with at last."""
    flags = ["--out", tmp_path / "run", *QUICK, "--lr", 0.003, "--steps", 2]
    for data in (packs, tiny_packs, "synth:classes=9,dim=4,test=0"):
        assert call_main(monkeypatch, 1, "--data", data, *flags, "--resume", "auto") == [None]
        run_folder._locks.pop().close()
        names = saved_run.open_saved(tmp_path / "run", "", World()).class_table()
        assert names.num_classes == (9 if data not in (packs, tiny_packs) else len(names_of(data)))
        shutil.rmtree(tmp_path / "run" / "checkpoints")


@pytest.mark.parametrize(("source", "flags"), [("old", []), ("inner", INNER)])
def test_a_run_of_other_classes_is_refused(source, flags, request, tiny_packs, tmp_path, monkeypatch):
    source = request.getfixturevalue(source)
    for name in ("a", "b"):
        shutil.copytree(tiny_packs.parent / "tree" / "train" / "class1", tmp_path / "tree" / "train" / name)
    run(sys.executable, "-m", "data_tools.pack", tmp_path / "tree", tmp_path / "packs")
    found = refusal(monkeypatch, 2, "--data", tmp_path / "packs", "--out", tmp_path / "new", *QUICK, "--init", source,
                    *flags)
    assert found.startswith(f"--init {source} has no class of --data {tmp_path / 'packs'}, by name: give ")
    assert not (tmp_path / "new").exists()


def test_a_run_without_a_checkpoint_is_refused(old, packs, tmp_path, monkeypatch):
    shutil.copytree(old, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    found = refusal(monkeypatch, 2, "--data", packs, "--out", tmp_path / "new", *QUICK, "--init", tmp_path / "run")
    assert found == f"{tmp_path / 'run'} has no checkpoint: let it train until one is saved, or name another run"


@pytest.mark.mpi
def test_real_ranks_start_with_the_same_rows(old, packs, tmp_path):
    """No rate: the rows at the end are those of the start."""
    mpirun(2, "train.py", "--data", packs, "--out", tmp_path / "run", *QUICK, "--init", old, "--steps", 1,
           "--lr", 1e-30)
    torch.testing.assert_close(saved_rows(tmp_path / "run"), rows_of(started(1, "--data", packs, "--init", old)),
                               rtol=1e-4, atol=1e-6)


def test_a_signal_before_the_first_step_ends_with_75(old, packs, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_received", [15])
    with pytest.raises(ExitRun) as stopped:
        call_main(monkeypatch, 1, "--data", packs, "--out", tmp_path / "run", *QUICK, "--init", old)
    assert stopped.value.code == signals.EXIT_CODE
