"""The command: numbers of the page equal those of the files, text from outside stays text, and what a run lacks is
said. Ranks are threads."""

import base64
import io
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.reporting.conftest import HOSTILE, NAMES
from tests.reporting.test_runs import add, lines_of
from tests.support.disks import small_disk
from tests.support.launch import last_json, mpirun
from tests.support.packs import write_pack
from tests.support.pages import read_page
from tests.use.test_predict import call, done, refused
from xc import report
from xc.reporting.look import PAIRS
from xc.reporting.page import MOST_BYTES, Page, percent, short
from xc.reporting.runs import read_runs


def page_of(monkeypatch, out, *arguments, ranks=1):
    """The Page that the command writes."""
    done(monkeypatch, report, ranks, *arguments, "--out", out, "--device", "cpu")
    return read_page(out.read_bytes())


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    """(Page, its bytes) of the run alone."""
    out = tmp_path_factory.mktemp("page") / "one.html"
    with pytest.MonkeyPatch.context() as monkeypatch:
        return page_of(monkeypatch, out, finished), out.read_bytes()


def test_numbers_are_those_of_the_files(page, finished):
    rows, lines = page[0].rows, lines_of(finished)
    training, test = [line for line in lines if "loss" in line], lines[-1]
    vals = [line for line in lines if line.get("split") == "val"]
    best = max(vals, key=lambda line: line["val_top1"])
    name, state, steps, *scores, loss = rows["runs"][1][:9]
    assert (name, state, steps) == (short(finished.name), "finished", "26")
    assert scores == [percent(test["top1"]), percent(test["top5"]), percent(vals[-1]["val_top1"]),
                      percent(vals[-1]["val_top5"]), f"{percent(best['val_top1'])}step {best['step']}"]
    assert loss == f"{training[-1]['loss']:.4f}" and rows["runs"][1][-2:] == ["1", "1"]
    flags = {row[0]: row[1:] for row in rows["settings"][1:]}
    assert flags["--epochs"] == ["10.0", "4.0"]
    assert "--seed" not in flags and "--out" not in flags
    frequencies = {row[0]: row[1] for row in rows["frequency"][1:]}
    assert frequencies == {name: f"{percent(share)} of {test['examples_by_frequency'][name]}"
                           for name, share in test["top1_by_frequency"].items()}
    assert rows["phases"][0][1:-1] == ["refresh", "data", "select", "forward", "wait", "head", "backward", "exchange",
                                       "update"]
    for title in "Loss by steps", "Loss by time", "Accuracy by steps", "Accuracy by time":
        assert title in page[0].text


def test_frequencies_are_of_the_last_test(copy, tmp_path, monkeypatch):
    """Where a run went on after its test, a later val is another split."""
    folder = copy("longer")
    test = lines_of(folder)[-1]
    add(folder, {"step": 30, "split": "val", "val_top1": 0.5, "val_top1_by_frequency": {"100+": 0.125}})
    found = page_of(monkeypatch, tmp_path / "page.html", folder)
    assert found.rows["frequency"][0][1] == f"longertest, step {test['scored_step']}"
    assert [row[0] for row in found.rows["frequency"][1:]] == list(test["top1_by_frequency"])


def test_retrieval_has_a_table_and_curves(page, finished, copy, tmp_path, monkeypatch):
    assert "Retrieval" not in page[0].text and "recall@" not in page[0].text
    folder = copy("retrieval")
    add(folder, *({"step": step, "split": "val", "val_recall_at_1": share, "val_map": share / 2, "val_queries": 1234}
                  for step, share in ((30, 0.5), (40, 0.75), (50, 0.625))),
        {"step": 50, "split": "test", "recall_at_1": 0.25, "recall_at_10": 0.5, "recall_at_100": 1, "scored_step": 40})
    found = page_of(monkeypatch, tmp_path / "page.html", finished, folder)
    rows = found.rows["runs"]
    assert rows[rows.index(next(row for row in rows if row[0] == "retrieval" and row[1] == "split")) + 1 :] == [
        ["retrieval", "test", "40", "25.00 %", "50.00 %", "100.00 %", "–", "–"],
        ["retrieval", "val", "50", "62.50 %", "–", "–", "31.25 %", "1,234"],
        ["retrieval", "best val", "40", "75.00 %", "–", "–", "37.50 %", "1,234"]]
    assert "Retrieval by steps" in found.text and "Retrieval by time" in found.text


def test_answers_are_those_of_evaluation(page, finished):
    """All of val is answered, by the checkpoint with the highest top-1."""
    best = max((line for line in lines_of(finished) if line.get("split") == "val" and line["step"] % 13 == 0),
               key=lambda line: line["val_top1"])
    assert (f"Checkpoint step-{best['step']:08d}, 65 of 65 examples of val: top-1 {percent(best['val_top1'])}, top-5 "
            f"{percent(best['val_top5'])}") in " ".join(page[0].text.split())


def test_text_from_outside_stays_text(page, finished):
    found, html = page
    assert HOSTILE in found.text and finished.name in found.text and "a $b_c^2$ {{ 7 * 7 }}" in found.text
    assert "script" not in found.tags and b"alert(1)</script>" not in html and "b" not in found.tags
    assert not any(name.startswith("on") for name in found.attributes)
    assert "größer" in found.text and "long " * 500 not in found.text  # long names have no middle
    assert "long long" in found.text and " … " in found.text


def test_nothing_is_loaded(page):
    found, html = page
    assert all(src.startswith(("data:image/png;base64,", "data:image/jpeg;base64,")) for src, _ in found.images)
    assert not re.search(rb"https?:|@import|url\((?!#)", html)
    assert not found.tags & {"script", "link", "iframe", "object", "form", "base"}
    assert b"default-src 'none'" in html


def test_every_picture_decodes_and_says_what_it_shows(page):
    assert len(page[0].images) > 100
    for src, alt in page[0].images:
        Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).load()
        assert alt


def test_the_same_input_gives_the_same_bytes(page, finished, tmp_path, monkeypatch):
    page_of(monkeypatch, tmp_path / "again.html", finished)
    assert (tmp_path / "again.html").read_bytes() == page[1]


def test_ranks_share_the_work(page, finished, tmp_path, monkeypatch):
    """Probabilities may differ in their last digit, nothing else does."""
    shared = page_of(monkeypatch, tmp_path / "shared.html", finished, "--batch-size", 4, ranks=3)
    assert shared.rows["runs"] == page[0].rows["runs"] and shared.images == page[0].images
    few = page_of(monkeypatch, tmp_path / "few.html", finished, "--examples", 20, ranks=2)
    assert "20 of 65 examples of val, at even distances" in " ".join(few.text.split())


def test_runs_are_compared(copy, tmp_path, monkeypatch):
    folders = [copy("first"), copy("second")]
    settings = json.loads((folders[1] / "config.json").read_text())
    settings |= {"lr": 0.25, "epochs": 8.0, "a <new> flag": "<i>x</i>"}
    del settings["momentum"]
    (folders[1] / "config.json").write_text(json.dumps(settings))
    found = page_of(monkeypatch, tmp_path / "both.html", *folders)
    assert [row[0:2] for row in found.rows["runs"][1:]] == [["first", "finished"], ["second", "50 % saved"]]
    flags = {row[0]: row[1:] for row in found.rows["settings"][1:]}
    assert flags["--lr"] == ["0.008", "0.01", "0.25"] and flags["--momentum"] == ["0.9", "0.9", "–"]
    assert flags["--a <new> flag"] == ["–", "–", "<i>x</i>"]
    # The library of today does not know that flag: so there are no answers of that run, and the page says so.
    assert "second: Its checkpoint cannot be used" in found.text and "Checkpoint step-" in found.text


def without(name):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def setting(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def spoil_rows(folder):
    for rows in folder.glob("checkpoints/*/rows-*"):
        rows.write_bytes(rows.read_bytes()[:-1])


def spoil_meta(folder):
    for meta in folder.glob("checkpoints/*/meta.json"):
        meta.write_text("{")


def odd_lines(folder):
    (folder / "metrics.jsonl").unlink()
    add(folder, {"step": 1, "loss": None, "forward_ms": 0}, {"step": 2, "split": "val", "val_top1": "high"},
        {"step": 3, "split": "test"}, {"step": 4, "loss": 10**400, "images_per_second": -1},
        {"step": 5, "loss": 1e308, "forward_ms": 1e308}, {"step": 2**52, "loss": -1e308, "forward_ms": 1e308})


def resumed(folder):
    path = folder / "launches.jsonl"
    launch = json.loads(path.read_text())
    path.write_text("".join(json.dumps(launch | {"ranks": ranks}) + "\n" for ranks in [4] * 30 + [8, 8, 4]))


def old_settings(folder):
    path = folder / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: settings[name] for name in ("data", "epochs", "feature_dim", "global_batch",
                                                                  "image_size", "out")}))


@pytest.mark.parametrize("change, texts", [
    (without("checkpoints"), ["no checkpoint", "The run has no checkpoint."]),
    (without("metrics.jsonl"), ["has no metrics yet", "No run has metrics yet.", "Checkpoint step-"]),
    (without("launches.jsonl"), ["launches: 0", "Checkpoint step-"]),
    (lambda folder: add(folder, "{half"), ["lines of metrics.jsonl that cannot be read: 1.", "Checkpoint step-"]),
    (lambda folder: add(folder, {"step": 25, "loss": 1.0}),
     ["lines of metrics.jsonl that a later line goes back behind: 3. They are left out."]),
    (odd_lines, ["finished", "No run has recorded it.", "not recorded", "Checkpoint step-"]),
    (setting(steps="many"), ["unknown", "Its checkpoint cannot be used"]),
    (lambda folder: (folder / "rollbacks.json").write_text("[3, 9]"),
     ["rollbacks to a checkpoint, after a loss or a weight was not finite: 2."]),
    (setting(data="nowhere"), ["Its data cannot be read (nowhere: not a pack", "Give their new place with --data."]),
    (setting(data="synth:classes=13"), ["trained on synthetic classes (synth:classes=13)"]),
    (setting(epochs=5.0), ["81 % saved", "Checkpoint step-"]),
    (setting(feature_dim=9), ["Its checkpoint cannot be used (checkpoint", "has feature_dim 8"]),
    (spoil_rows, ["Its checkpoint cannot be used (checkpoint file", "is damaged"]),
    (spoil_meta, ["checkpoint damaged", "is not a checkpoint", "Its checkpoint cannot be used"]),
    (resumed, ["4, 8, 4", "launches: 33", "The last 20."]),
    (old_settings, ["finished", "–", "Checkpoint step-"]),
])
def test_what_a_run_lacks_is_said(change, texts, copy, tmp_path, monkeypatch, capsys):
    folder = copy("changed")
    change(folder)
    found = page_of(monkeypatch, tmp_path / "page.html", folder, ranks=2)
    for text in texts:
        assert text in " ".join(found.text.split())
    notes = capsys.readouterr().err
    assert ("note: changed: " in notes) == ("So confused classes, surest mistakes and neighbours are not shown"
                                            in found.text)


def test_data_that_moved_are_named(copy, packs, tmp_path, monkeypatch):
    folder = copy("moved")
    setting(data="nowhere")(folder)
    found = page_of(monkeypatch, tmp_path / "page.html", folder, "--data", packs)
    assert "Checkpoint step-" in found.text and "nowhere" in found.text


def test_data_without_val_or_test(copy, packs, tmp_path, monkeypatch):
    folder = copy("alone")
    setting(data=str(packs / "train"))(folder)
    assert "have neither val nor test" in page_of(monkeypatch, tmp_path / "none.html", folder).text
    shutil.copytree(packs, tmp_path / "packs")
    shutil.rmtree(tmp_path / "packs" / "val")
    found = page_of(monkeypatch, tmp_path / "test.html", folder, "--data", tmp_path / "packs")
    assert "26 of 26 examples of test" in " ".join(found.text.split())


def test_bad_input_is_one_line_and_nothing_is_written(finished, packs, copy, tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "png")
    (tmp_path / "other").mkdir()
    for split in "train", "val":
        write_pack(tmp_path / "other" / split, ["a", "b"], [(file.getvalue(), 0)])
    (tmp_path / "there.html").write_text("mine")
    folder, new, other = copy("run"), tmp_path / "new.html", tmp_path / "other"
    cases = [
        ([folder, "--out", tmp_path / "there.html"],
         f"{tmp_path}/there.html exists; remove it or give another name"),
        ([folder, "--out", tmp_path / "page.pdf"], f"--out {tmp_path}/page.pdf: name a file that ends in .html"),
        ([folder, "--out", tmp_path / "no" / "a.html"],
         f"{tmp_path}/no: no such folder, or not writable; make it first, a.html goes there"),
        ([tmp_path / "none", "--out", new], f"{tmp_path}/none is not the folder of a run (config.json: No such file or "
         "directory): name the --out of train.py"),
        ([packs, "--out", new], f"{packs} is not the folder of a run (config.json: No such file or directory): name "
         "the --out of train.py"),
        ([folder, folder, "--out", new], f"{folder} is given twice: give each run once"),
        ([folder] * 21 + ["--out", new], "21 runs are given: give at most 20"),
        ([folder, "--out", new, "--data", tmp_path / "none"],
         f"--data {tmp_path}/none cannot be used ({tmp_path}/none: not a pack: it holds neither index.h5 nor a folder "
         "train with one): give the packs of the run"),
        ([folder, "--out", new, "--data", packs / "val"],
         f"--data {packs}/val has neither val nor test: give the folder with the packs of the run"),
        ([folder, "--out", new, "--data", other], None),
        ([folder, "--out", new, "--examples", "0"],
         "argument --examples: 0 is not between 1 and 10000000; see python -m xc.report --help"),
        (["--out", new], "the following arguments are required: RUN; see python -m xc.report --help"),
    ]
    for arguments, line in cases:
        text = refused(monkeypatch, tmp_path, *arguments, module=report)
        if line is None:
            assert text.startswith(f"--data {other} has 2 classes that are not the 13 of ")
            assert text.endswith(": give the packs of the run, or report this run alone")
        else:
            assert text == line
    (folder / "config.json").write_text("[]")
    assert "config.json: it holds no settings" in refused(monkeypatch, tmp_path, folder, "--out", new, module=report)
    assert (tmp_path / "there.html").read_text() == "mine"


def test_an_error_while_the_page_is_made_leaves_nothing(finished, tmp_path, monkeypatch):
    def fails(runs, looks):
        raise OSError("no room")

    monkeypatch.setattr(report, "html_of", fails)
    errors = call(monkeypatch, report, 3, finished, "--out", tmp_path / "a.html")
    assert [str(error) for error in errors] == ["no room"] * 3 and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(finished, tmp_path, monkeypatch):
    with small_disk(tmp_path / "disk", 40) as disk:
        out = disk / "a.html"
        assert refused(monkeypatch, disk, finished, "--out", out, module=report) == (
            f"--out {out} cannot be written ([Errno 28] No space left on device): make room there, or name another "
            "file")


def test_pictures_are_left_out_before_the_page_is_too_large(page, finished, tmp_path, monkeypatch):
    whole = page[0].images
    without_pictures = len(page[1]) - sum(len(src) for src, _ in whole)
    most = without_pictures + 60_000
    monkeypatch.setattr(report, "MOST_BYTES", most)
    found = page_of(monkeypatch, tmp_path / "few.html", finished)
    assert 20 < len(found.images) < len(whole) and most - 20_000 < (tmp_path / "few.html").stat().st_size <= most
    assert (f"Pictures that are left out, so that the page stays below 10 MB: {len(whole) - len(found.images)}."
            in found.text)


def test_runs_share_the_bytes_of_pictures():
    class Needs:
        def __init__(self, num_bytes):
            self.num_bytes = num_bytes

        def shown(self, pictures):
            pictures.left -= min(self.num_bytes, pictures.left)
            return {"left": pictures.left}

    assert report.shown([Needs(10), "none", Needs(10**6), Needs(50)], 301) == [
        {"left": 90}, "none", {"left": 0}, {"left": 96}]


def test_the_most_runs_with_the_longest_names_fit(finished, tmp_path, monkeypatch):
    """20 runs of many lines: what is not a picture leaves room for some."""
    given = []
    monkeypatch.setattr(report, "html_of", lambda runs, looks: given.extend(report.shown(looks, 0)) or b"")
    done(monkeypatch, report, 1, finished, "--out", tmp_path / "page.html", "--device", "cpu")
    folders, line = [tmp_path / f"{i:02d} {'&' * 200}" for i in range(20)], lines_of(finished)[0]
    for i, folder in enumerate(folders):
        shutil.copytree(finished, folder, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", "metrics.jsonl"))
        losses = np.random.default_rng(i).random(500).tolist()
        add(folder, *(new for step, loss in enumerate(losses, 1) for new in (
            line | {"step": step, "loss": loss}, {"step": step, "split": "val", "val_top1": loss, "val_top5": 1.0})))
    html = Page(read_runs(folders)).html([with_long_names(given[0])] * 20)
    assert len(given[0]["pairs"]) == PAIRS and len(html) < MOST_BYTES
    read_page(html)


def with_long_names(part):
    """A part of a section whose class names are as long and as costly as they can be."""
    if isinstance(part, dict):
        return {key: "&" * 2000 if key in ("name", "label", "answer") else with_long_names(value)
                for key, value in part.items()}
    return [with_long_names(one) for one in part] if isinstance(part, list) else part


@pytest.mark.mpi
def test_real_ranks_write_the_page(finished, packs, tmp_path):
    done = mpirun(2, "-m", "xc.report", finished, "--out", tmp_path / "a.html", "--device", "cpu")
    result = last_json(done)
    assert result["examples"] == [65] and result["bytes"] == (tmp_path / "a.html").stat().st_size
    assert NAMES[3] in read_page((tmp_path / "a.html").read_bytes()).text
    again = mpirun(2, "-m", "xc.report", finished, "--out", tmp_path / "a.html", expect=2)
    assert again.stderr.count("error: ") == 1 and [path.name for path in tmp_path.iterdir()] == ["a.html"]
