"""A real browser opens a report: no line in its console, something to see, the text as it was written."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.reporting.conftest import HOSTILE
from tests.support.browser import browser, visit
from tests.support.pages import read_page
from tests.use.test_predict import done
from xc import report

pytestmark = pytest.mark.skipif(browser() is None,
                                reason="no Chromium or Chrome here (.ci/browser_package.sh installs one)")


def test_a_browser_shows_a_report(finished, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    done(monkeypatch, report, 1, finished, "--out", out, "--device", "cpu")
    seen = visit(out, tmp_path)
    assert seen.console == []
    document = read_page(seen.document.encode())
    assert HOSTILE in document.text and "Surest wrong answers" in document.text and "script" not in document.tags
    assert len(document.images) == len(read_page(out.read_bytes()).images) > 100
    pixels = np.asarray(Image.open(seen.picture).convert("RGB"))
    assert pixels.shape[:2] == (2400, 1280)
    # Not blank, in any of its quarters: text, plots, pictures.
    for quarter in np.split(pixels, 4):
        assert len(np.unique(quarter.reshape(-1, 3), axis=0)) > 20 and quarter.std() > 5


_WIDE = """<script>
const wide = [...document.querySelectorAll(".card")].filter(one => one.scrollWidth > one.clientWidth);
document.title = `${wide.length} of ${document.querySelectorAll(".card").length} cards are too narrow`;
</script>"""


def test_long_names_stay_in_their_cards(finished, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    done(monkeypatch, report, 1, finished, "--out", out, "--device", "cpu")
    html = out.read_text()
    assert "w" * 50 in html
    (tmp_path / "page.html").write_text(re.sub("<meta http-equiv[^>]*>", "", html) + _WIDE)  # its policy bars scripts
    [title] = re.findall("<title>(.*)</title>", visit(tmp_path / "page.html", tmp_path).document)
    assert re.fullmatch(r"0 of [1-9]\d+ cards are too narrow", title)


def test_the_console_tells_of_errors(tmp_path):
    """What the test above must not find is found here: an error, and a request that the page's policy forbids."""
    policy = "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'unsafe-inline'\">"
    body = "<img src='http://127.0.0.1:9/'><script>throw new Error('broken')</script>"
    (tmp_path / "bad.html").write_text(f"<!DOCTYPE html><html><head>{policy}</head><body>{body}</body></html>")
    console = "\n".join(visit(tmp_path / "bad.html", tmp_path).console)
    assert "broken" in console and "Content Security Policy" in console
