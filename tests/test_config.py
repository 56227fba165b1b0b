"""Flags: one clear line for what is wrong, files of arguments, and a round trip through the run folder."""

import dataclasses

import pytest

from xc.config import Config, as_arguments, parse
from xc.errors import UserError

BASE = ["--data", "d", "--out", "o"]


def test_defaults_and_types():
    assert parse(BASE) == Config(data="d", out="o")
    assert parse([*BASE, "--schedule", "step", "--lr", "0.25", "--steps", "7"]) == Config(
        "d", "o", schedule="step", lr=0.25, steps=7)


def test_argument_files_and_round_trip(tmp_path):
    cfg = Config(data="d", out="a b", lr=0.125, schedule="step", margin="arcface", margin_size=0.5)
    (tmp_path / "run.args").write_text(as_arguments(cfg) + "# a comment\n\n")
    assert parse([f"@{tmp_path / 'run.args'}"]) == cfg
    assert parse([f"@{tmp_path / 'run.args'}", "--lr", "1"]) == dataclasses.replace(cfg, lr=1.0)


@pytest.mark.parametrize("arguments, text", [
    ([], "--data"), (["--data", "d"], "--out"),
    ([*BASE, "--sede", "1"], "unknown argument --sede; did you mean --seed?"),
    ([*BASE, "--see", "1"], "unknown argument --see"),
    ([*BASE, "--lr", "fast"], "invalid float value: 'fast'"), ([*BASE, "--lr", "0"], "--lr 0.0"),
    ([*BASE, "--lr", "nan"], "--lr nan"), ([*BASE, "--epochs", "inf"], "--epochs inf"),
    ([*BASE, "--margin", "round"], "invalid choice: 'round'"),
    ([*BASE, "--sampler", "log"], "invalid choice: 'log' (choose from"),
    ([*BASE, "--margin-size", "0.3"], "no margin to size"),
    ([*BASE, "--logits", "inner", "--margin", "cosface"], "needs cosine"),
    ([*BASE, "--global-batch", "0"], "--global-batch 0"),
    (["@nowhere.args"], "nowhere.args"),
])
def test_a_mistake_is_one_line(arguments, text):
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert text in str(error.value) and "\n" not in str(error.value)
