"""The run folder: what a launch says about the one before."""

import dataclasses

from xc.config import Config
from xc.run import folder


def launch(cfg):
    """What a process does at its start, and the end of its lock."""
    folder.create(cfg, 1)
    folder._locks.pop().close()


def test_a_launch_names_the_settings_that_changed(tmp_path, capsys):
    first = Config(data="d", out=str(tmp_path / "run"), epochs=3.0, scale=20.0)
    launch(first)
    launch(dataclasses.replace(first, resume="auto"))
    assert "note" not in capsys.readouterr().out
    launch(dataclasses.replace(first, resume="auto", epochs=4.0, scale=0.0))
    assert capsys.readouterr().out == (
        "note: settings that differ from those of the last launch: --scale 20.0 -> 0.0, --epochs 3.0 -> 4.0\n")


def test_a_launch_names_a_choice_that_was_no_flag_before(tmp_path, capsys):
    cfg = Config(data="d", out=str(tmp_path / "run"), head="knn")
    launch(cfg)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(' "select": "scores",\n', ""))
    launch(cfg)
    assert "--select labels -> scores" in capsys.readouterr().out


def test_damaged_settings_are_written_anew(tmp_path, capsys):
    cfg = Config(data="d", out=str(tmp_path / "run"))
    launch(cfg)
    for text in "{", "[1]", "":
        (tmp_path / "run" / "config.json").write_text(text)
        launch(cfg)
        assert capsys.readouterr().out == "" and '"epochs": 10.0' in (tmp_path / "run" / "config.json").read_text()
