"""--exchange auto: what it takes, and that it changes nothing else."""

import json

import pytest
from torch import nn

from tests.support.training import SGD, call_main
from tests.support.worlds import run_ranks
from xc.config import Config
from xc.gradients import choice
from xc.run import folder

RUN = [*SGD, "--data", "synth:classes=60,dim=16,examples=8,test=30", "--feature-dim", 16, "--global-batch", 13,
       "--steps", 4, "--warmup", 0, "--schedule", "constant", "--log-steps", 1, "--eval-every", 0,
       "--density", 0.05, "--density-warmup", 0]


@pytest.mark.parametrize("seconds, name", [
    ({"dense": 1.0, "powersgd": 0.91, "dgc": 0.92}, "dense"), ({"dense": 1.0, "powersgd": 0.89, "dgc": 0.8}, "dgc"),
    ({"dense": 1.0, "powersgd": 0.5}, "powersgd"), ({"dense": 1.0, "powersgd": 2.0}, "dense")])
def test_another_exchange_must_save_a_tenth(seconds, name):
    assert choice.quickest(seconds) == name


@pytest.mark.parametrize("settings, names", [
    ({}, ["dense", "powersgd"]), ({"optimizer": "sgd", "lr": 0.1, "micro_batches": 2}, ["dense", "powersgd", "dgc"])])
def test_all_ranks_measure_the_same(settings, names):
    cfg = Config(data="d", out="o", exchange="auto", feature_dim=8, global_batch=14, **settings)
    found = run_ranks(3, lambda world: choice.measured(cfg, choice.candidates(cfg), make_network, (9,), world))
    assert found[0] == found[1] == found[2] and list(found[0]) == names and min(found[0].values()) > 0


def make_network():
    return nn.Linear(9, 8)


def losses_of(monkeypatch, out, *flags, ranks=3):
    assert call_main(monkeypatch, ranks, *RUN, "--out", out, *flags) == [None] * ranks
    folder._locks.pop().close()  # as at the end of its process
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("taken", ["dense", "dgc", "powersgd"])
def test_the_run_is_that_of_the_exchange_it_takes(taken, tmp_path, monkeypatch, capsys):
    """Also where it resumes and another exchange would be quicker by then."""
    measured = choice.measured

    def with_result(*args, quickest=taken):
        return {name: 1.0 + (name != quickest) for name in measured(*args)}

    auto = ["--exchange", "auto", "--save-every", "1steps"]
    monkeypatch.setattr(choice, "measured", with_result)
    losses = losses_of(monkeypatch, tmp_path / "auto", *auto, "--steps", 2)
    said = capsys.readouterr()
    assert f"--exchange auto takes {taken}: the backbone's part" in said.out and "has no effect" not in said.err
    assert f'"exchange": "{taken}"' in (tmp_path / "auto/config.json").read_text()
    other = "dgc" if taken == "dense" else "dense"
    monkeypatch.setattr(choice, "measured", lambda *args: with_result(*args, quickest=other))
    losses |= losses_of(monkeypatch, tmp_path / "auto", *auto, "--resume", "auto")
    assert f"--exchange auto takes {taken}: as the run did before" in capsys.readouterr().out
    assert losses == losses_of(monkeypatch, tmp_path / "constant", "--exchange", taken)
    assert len(losses) == 4


def test_one_rank_has_nothing_to_choose(tmp_path, monkeypatch, capsys):
    losses = losses_of(monkeypatch, tmp_path / "auto", "--exchange", "auto", ranks=1)
    assert "--exchange auto takes dense: there is one rank" in capsys.readouterr().out
    assert losses == losses_of(monkeypatch, tmp_path / "named", ranks=1)


def test_a_run_shorter_than_the_warm_up_of_dgc_does_not_take_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(choice, "measured", lambda cfg, names, *_: {name: 1 / len(name) for name in names})
    losses_of(monkeypatch, tmp_path / "auto", "--exchange", "auto", "--density-warmup", "9steps", ranks=2)
    said = capsys.readouterr().out
    assert "--exchange auto takes powersgd" in said and "; not dgc: --density-warmup 9steps" in said


def test_the_exchange_of_a_resumed_run_is_found_by_any_path(tmp_path, monkeypatch):
    checkpoint = tmp_path / "run/checkpoints/step-00000004"
    checkpoint.mkdir(parents=True)
    (tmp_path / "run/config.json").write_text('{"exchange": "dgc-hier"}')
    (tmp_path / "link").symlink_to(checkpoint)
    monkeypatch.chdir(checkpoint.parent)
    for out, resume in ("new", checkpoint), ("new", checkpoint.name), ("new", tmp_path / "link"), ("..", "auto"):
        assert folder.exchange_before(Config(data="d", out=out, resume=str(resume))) == "dgc-hier"
    assert folder.exchange_before(Config(data="d", out="..")) is None
    (tmp_path / "run/config.json").write_text("[[[")
    assert folder.exchange_before(Config(data="d", out="..", resume="auto")) is None
