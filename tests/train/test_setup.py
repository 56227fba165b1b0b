"""What a run says of its settings before it begins."""

import pytest

from xc.comm.world import World
from xc.config import Config
from xc.data.loader import open_splits
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
