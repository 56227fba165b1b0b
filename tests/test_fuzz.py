"""Strangers' files: every reader refuses in one line or accepts, whatever is in them."""


import pytest

import data_tools.show
from xc.config import UserError
from xc.message import one_line
from xc.pack import PackError


def test_a_message_is_one_short_line_with_both_its_ends():
    text = one_line("begin\n" + "x" * 10**6 + "\x1b[31m\r\u2028\udc80 end")
    assert text.startswith("begin x") and text.endswith(" end") and len(text) <= 1000 and text.isprintable()
    for error in UserError, PackError:
        assert str(error("a\nb" + "x" * 10**5)).startswith("a bxxx") and len(str(error("x" * 10**5))) <= 1000


def test_a_timeline_that_is_no_text(tmp_path, capsys):
    (tmp_path / "timeline.json").write_bytes(b'{"traceEvents": ["' + b"x" * 10**6 + b'\xff"]}')
    with pytest.raises(SystemExit):
        data_tools.show.main([str(tmp_path / "timeline.json")])
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and len(text) < 1100
