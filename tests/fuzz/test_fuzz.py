"""Untrusted files: every reader refuses in one line or accepts, whatever is in them."""

import functools
import json
import re
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import soak
from tests.fuzz.case import Finding, Target, attempt
from tests.fuzz.targets import TARGETS, Cases
from tests.support.launch import run


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """Cases of a target by its name; their files are made once."""
    return functools.cache(lambda name: Cases(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("examples", [8, pytest.param(60, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", TARGETS)
def test_a_reader_accepts_or_refuses_in_one_line(name, examples, cases):
    """Always the same cases; benchmarks/soak.py runs others."""

    @settings(derandomize=True, database=None, deadline=None, max_examples=examples,
              suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])
    @given(random=st.randoms(use_true_random=False))
    def run_cases(random):
        cases(name).run(random)

    run_cases()


def misread(folder, out):
    """A reader that does what the file in its folder says."""
    what = (folder / "what").read_text()
    if what == "write":
        (out.parent / "elsewhere").write_text("")
    if what == "delete":
        (folder / "what").unlink()
    if what == "take":
        np.ones(120 * 2**17)  # far beyond what other tests may free meanwhile
    if what == "lines":
        raise ValueError("two\nlines")
    if what == "another":
        raise KeyError("x")
    if what == "claim":
        try:
            np.ones(2**62, np.uint8)
        except MemoryError as error:
            raise ValueError("refused") from error
    if what == "refuse":
        raise ValueError("refused")
    (out / "result").write_text("")


@pytest.mark.parametrize("what, outcome", [
    ("write", "outside"), ("delete", "outside"), ("take", "MB"), ("lines", "one line"), ("another", "KeyError"),
    ("claim", "memory"), ("refuse", None), ("accept", None)])
def test_what_a_reader_must_not_do_is_a_finding(what, outcome, tmp_path):
    target = Target(None, None, misread, (ValueError,), memory_mb=20)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "what").write_text(what)
    if outcome is None:
        assert attempt(target, tmp_path) == {"refuse": "refused", "accept": "accepted"}[what]
        return
    with pytest.raises(Finding, match=outcome):
        attempt(target, tmp_path)


@pytest.mark.parametrize("program, failure", [
    ("print(1)", r"^$"), ("import os; print(1, flush=True); os.abort()", "SIGABRT"),
    ("print(1, flush=True); raise SystemExit(3)", "exit code 3"),
    pytest.param("import time; print(1, flush=True); time.sleep(600)", "hangs", marks=pytest.mark.long)])
def test_a_child_that_crashes_or_hangs_is_seen(program, failure):
    lines, found = soak.watch([sys.executable, "-c", program], silence=10)
    assert lines == ["1"] and re.search(failure, found)


@pytest.mark.long
def test_a_soak_counts_its_cases_and_leaves_nothing(tmp_path):
    done = run(sys.executable, "benchmarks/soak.py", "fuzz", "--minutes", 0.02, "--targets", "synth", "--findings",
               tmp_path / "findings")
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["findings"] == 0 and facts["cases"] == facts["accepted"] + facts["refused"] > 0
    assert not (tmp_path / "findings").exists()
