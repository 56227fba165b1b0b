"""Runs of older versions."""

import dataclasses
import json

from xc.checkpoint.saved_run import _config_of
from xc.config import Config


def test_settings_that_are_gone_are_left_out(tmp_path):
    cfg = Config(data="d", out=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(cfg) | {"graph_refresh_angle": 5.0}))
    assert _config_of(tmp_path) == cfg
