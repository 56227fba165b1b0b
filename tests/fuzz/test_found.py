"""What fuzzing has found, held by a test of its own."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

import data_tools.show
from data_tools.reports import trace
from tests.fuzz.checkpoints import IDENTITY, SETTINGS, a_state, make_runs
from tests.fuzz.pictures import make_trace
from xc import config
from xc.checkpoint import layout
from xc.checkpoint import state as checkpoint
from xc.data import synthetic as synth
from xc.data.pack import PackError
from xc.errors import UserError, one_line
from xc.run import metrics


def test_a_message_is_one_short_line_with_both_its_ends():
    text = one_line("begin\n" + "x" * 10**6 + "\x1b[31m\r\u2028\udc80 end")
    assert text.startswith("begin x") and text.endswith(" end") and len(text) <= 1000 and text.isprintable()
    for error in UserError, PackError:
        assert str(error("a\nb" + "x" * 10**5)).startswith("a bxxx") and len(str(error("x" * 10**5))) <= 1000


@pytest.mark.parametrize("content, words", [
    (b"@FILE", "inside of one"),  # itself: RecursionError
    (b"--data x --out 'y", "No closing quotation"),
    (b"--data x\xff --out y", "not a text in UTF-8"),
    (b"--data 'x\0' --out y", "control characters"),
    (b"--data x --out y\x1b[31m", "control characters"),
    (b"--data x --out y --seed " + b"9" * 10**5, "--seed"),
])
def test_argument_files(content, words, tmp_path):
    path = tmp_path / "some.args"
    path.write_bytes(content.replace(b"FILE", os.fsencode(path)))
    with pytest.raises(UserError, match=words) as error:
        config.parse([f"@{path}"])
    assert "\n" not in str(error.value) and len(str(error.value)) <= 1000


@pytest.mark.parametrize("value", ["null", '"5"', "[]", "1e3", "[" * 10**5 + "]" * 10**5])
def test_odd_lines_of_metrics_are_dropped(value, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": ' + value.encode() + b'}\n\xff\xfe\n{"step": 2}\n')
    metrics._open_after(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_deeply_nested_meta_json(tmp_path):
    (tmp_path / "meta.json").write_text("[" * 10**5 + "]" * 10**5)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        layout.read_meta(tmp_path)


@pytest.mark.parametrize("name, shape", [("u.0", ()), ("u.0", (1, 1)), ("w.0", (1,)), ("u.x", (1,)), ("u", (1,))])
def test_residuals_that_do_not_fit(name, shape, tmp_path):
    make_runs(tmp_path)
    folder = tmp_path / "dgc/checkpoints/step-00000004"
    save_file({name: torch.ones(shape)}, next(folder.glob("residuals-*")))
    with pytest.raises(ValueError, match="cannot be used"):
        checkpoint.load(folder, a_state(SETTINGS["dgc"], begun=False), IDENTITY)


def test_a_negative_dim_of_synthetic_images():
    with pytest.raises(UserError, match="dim=-1 is not allowed"):
        synth.Spec.parse("synth:classes=5,dim=-1,images=1")


def test_a_trace_that_is_no_text(tmp_path, capsys):
    (tmp_path / "trace.json").write_bytes(b'{"traceEvents": ["' + b"x" * 10**6 + b'\xff"]}')
    with pytest.raises(SystemExit):
        data_tools.show.main([str(tmp_path / "trace.json")])
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and len(text) < 1100


@pytest.mark.parametrize("key, value", [("pid", float("inf")), ("ts", 10**400), ("tid", "%s"), ("tid", None)],
                         ids=["rank", "time", "format", "none"])
def test_a_trace_of_odd_numbers(key, value, tmp_path):
    make_trace(tmp_path)
    events = json.loads((tmp_path / "trace.json").read_text())
    events["traceEvents"][2][key] = value
    (tmp_path / "trace.json").write_text(json.dumps(events))
    with pytest.raises(trace.TraceError, match="is not a trace"):
        trace.read(tmp_path / "trace.json")



@pytest.mark.parametrize("text", ["\udc80", "$\\frac$", "a\nb", "x" * 2000])
def test_a_trace_with_odd_names_is_printed(text, tmp_path, capsys):
    make_trace(tmp_path)
    path = tmp_path / "trace.json"
    events = json.loads(path.read_text())
    for event in events["traceEvents"]:
        event["name"] = text
        event["cat"] = text if event.get("cat") == "network" else event.get("cat")
    path.write_text(json.dumps(events))
    data_tools.show.main([str(path)])
    assert len(capsys.readouterr().out.splitlines()) == 2
