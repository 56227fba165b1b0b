"""Flags: one clear line for a mistake, argument files, old names, and a round trip through the run folder."""

import argparse
import dataclasses

import pytest

from xc import config
from xc.config import Config, as_arguments, parse
from xc.errors import UserError
from xc.gradients.exchanges import EXCHANGES
from xc.model.head_table import HEADS
from xc.model.margin import MARGINS
from xc.optim.schedule import DECAYS

BASE = ["--data", "d", "--out", "o"]


def test_defaults_and_types():
    assert parse(BASE) == Config(data="d", out="o")
    assert parse([*BASE, "--schedule", "step", "--lr", "0.25", "--steps", "7", "--check"]) == Config(
        data="d", out="o", schedule="step", lr=0.25, steps=7, check=True)


def test_choices_are_those_of_the_tables():
    assert set(config.HEADS) == set(HEADS) and set(config.MARGINS) == set(MARGINS)
    assert set(config.SCHEDULES) == set(DECAYS) and set(config.FLAGS_OF_EXCHANGES) == {*EXCHANGES, "auto"}


def test_argument_files_and_round_trip(tmp_path):
    cfg = Config(data="d", out="a b", lr=0.125, schedule="step", margin="arcface", margin_size=0.5,
                 sampling_correction=False)
    (tmp_path / "run.args").write_text(as_arguments(cfg) + "# a comment\n\n")
    assert parse([f"@{tmp_path / 'run.args'}"]) == cfg
    assert "--lr 0.125\n--momentum 0.9\n" in (tmp_path / "run.args").read_text()  # a recipe is whole, with its defaults
    assert parse([f"@{tmp_path / 'run.args'}", "--lr", "1"]) == dataclasses.replace(cfg, lr=1.0)


@pytest.mark.parametrize("old, new", [
    ("--timeline-steps 5", "--trace-steps 5"), ("--keep 3", "--keep-checkpoints 3"),
    ("--padding plain", "--no-sampling-correction"),
    ("--padding corrected", "--sampling-correction"),
    ("--schedule fccs --max-batch 512 --hold 5% --tail 10% --growth 20%",
     "--schedule fccs --max-batch 512 --fccs-hold 5% --fccs-tail 10% --fccs-growth 20%"),
    ("--schedule fccs --fccs auto --max-batch 512 --micro-batches 2",
     "--schedule fccs --batch-growth auto --max-batch 512 --micro-batches 2")])
def test_old_names_of_flags_still_work(old, new):
    assert parse([*BASE, *old.split()]) == parse([*BASE, *new.split()])
    shown = {name for action in config._parser()._actions if action.help != argparse.SUPPRESS
             for name in action.option_strings}
    assert {word for word in old.split() if word.startswith("--")} - shown == {
        word for word in old.split() if word.startswith("--") and word not in new.split()}


@pytest.mark.parametrize("arguments, text", [
    ([], "--data"), (["--data", "d"], "--out"),
    ([*BASE, "--sede", "1"], "unknown argument --sede; did you mean --seed?"),
    ([*BASE, "--see", "1"], "unknown argument --see"),
    ([*BASE, "--lr", "fast"], "invalid float value: 'fast'"), ([*BASE, "--lr", "0"], "--lr 0.0"),
    ([*BASE, "--lr", "nan"], "--lr nan"), ([*BASE, "--epochs", "inf"], "--epochs inf"),
    ([*BASE, "--margin", "round"], "invalid choice: 'round'"),
    ([*BASE, "--sampler", "log"], "invalid choice: 'log' (choose from"),
    ([*BASE, "--margin-size", "0.3"], "needs a margin"),
    ([*BASE, "--margin", "arcface", "--margin-size", "1.6"], "below 1.5708"),
    ([*BASE, "--logits", "inner", "--margin", "cosface"], "needs cosine"),
    ([*BASE, "--global-batch", "0"], "--global-batch 0 is not allowed: give a number at least 1"),
    ([*BASE, "--warmup", "soon"], "--warmup 'soon' is not allowed: give a number and its unit"),
    ([*BASE, "--fccs-tail", "1%"], "--fccs-tail 1% is a part of --schedule fccs"),
    ([*BASE, "--optimizer", "adamw", "--exchange", "dgc"], "give --exchange dense, or @recipes/sgd.args"),
    ([*BASE, "--optimizer", "lars"], "--optimizer lars needs rates of its own"),
    ([*BASE, "--padding", "none"], "'none' is not known: give --sampling-correction"),
    (["@nowhere.args"], "nowhere.args"),
])
def test_a_mistake_is_one_line(arguments, text):
    with pytest.raises(UserError) as error:
        parse(arguments)
    assert text in str(error.value) and "\n" not in str(error.value)
