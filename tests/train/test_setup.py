"""What a run says of its settings before it begins."""

import threading
import time

import pytest

from tests.support.training import call_main
from xc.checkpoint import tensor_file
from xc.checkpoint.checkpoints import Checkpoints
from xc.comm.world import World
from xc.config import Config
from xc.data.loader import open_splits
from xc.knn.build import build
from xc.model import knn
from xc.optim.schedule import Schedule
from xc.train import setup


@pytest.mark.parametrize("settings, warned", [
    ({}, False), ({"graph_from": "100%"}, True), ({"graph_from": "9epochs"}, True), ({"head": "sampled"}, False),
    ({"graph_from": "0", "graph_every": "50epochs"}, True), ({"graph_from": "100%", "head": "full"}, False)])
def test_a_run_that_never_builds_a_graph_says_so(settings, warned, capsys):
    cfg = Config(data="synth:classes=60,dim=4,examples=4", out="-", global_batch=12, epochs=4.0, active_classes=0.5,
                 **{"head": "knn"} | settings)
    split = open_splits(cfg)["train"]
    setup.warn_of_unused(cfg, split, Schedule.of(cfg, len(split), 1), World())
    assert ("takes random classes in the whole run" in capsys.readouterr().err) == warned


def test_no_graph_is_built_while_a_save_holds_the_last_one(tmp_path, monkeypatch):
    """There may be no memory for both."""
    builds, write = [], tensor_file.write

    def slow_write(*args, **options):
        time.sleep(0.3)
        return write(*args, **options)

    def watched_build(*args):
        builds.append([thread.name for thread in threading.enumerate() if thread.name == "checkpoint"])
        return build(*args)

    monkeypatch.setattr(tensor_file, "write", slow_write)
    monkeypatch.setattr(knn, "build", watched_build)
    errors = call_main(
        monkeypatch, 1, "--data", "synth:classes=60,dim=4,examples=8,test=50", "--out", tmp_path / "run", "--head",
        "knn", "--active-classes", 0.6, "--global-batch", 12, "--steps", 6, "--graph-from", "1steps", "--graph-every",
        "1steps", "--save-every", "1steps")
    assert errors == [None] and builds == 5 * [[]]


@pytest.mark.parametrize("head, waits", [("full", 0), ("sampled", 0), ("selective", 5)])
def test_only_a_head_that_builds_waits_for_a_save(head, waits, tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(Checkpoints, "wait", lambda self: waited.append(1))
    errors = call_main(
        monkeypatch, 1, "--data", "synth:classes=60,dim=4,examples=8,test=50", "--out", tmp_path / "run", "--head",
        head, "--global-batch", 12, "--steps", 6, "--graph-from", "1steps", "--graph-every", "1steps",
        *["--active-classes", 0.6] * (head != "full"))
    assert errors == [None] and len(waited) == waits
