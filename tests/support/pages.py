"""HTML as a reader sees it: texts and tables by section, images, and tags that do not match."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "img", "br", "line", "path", "use", "rect"}  # and those of SVG that close themselves


@dataclass
class Page:
    """text: all of it, without styles; rows: {section: [[text of each cell]]}; images: [(src, alt)]; tags: every one of
    them"""

    text: str = ""
    rows: dict = field(default_factory=dict)
    images: list = field(default_factory=list)
    tags: set = field(default_factory=set)
    attributes: set = field(default_factory=set)


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.page, self._open, self._section, self._cells = Page(), [], "", None

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.page.tags.add(tag)
        self.page.attributes |= set(attributes)
        if tag not in _VOID:
            self._open.append(tag)
        if tag == "section":
            self._section = attributes["aria-labelledby"]
        if tag == "tr":
            self._cells = []
            self.page.rows.setdefault(self._section, []).append(self._cells)
        if tag in ("td", "th"):
            self._cells.append("")
        if tag == "img":
            self.page.images.append((attributes["src"], attributes["alt"]))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self._open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if self._open and self._open[-1] == "style":
            return
        self.page.text += data
        if "td" in self._open or "th" in self._open:
            self._cells[-1] += data


def read_page(html):
    """The Page of bytes of HTML. AssertionError where tags do not match."""
    reader = _Reader()
    reader.feed(html.decode())
    reader.close()
    assert not reader._open, reader._open
    for rows in reader.page.rows.values():
        for row in rows:
            row[:] = [" ".join(cell.split()) for cell in row]
    return reader.page
