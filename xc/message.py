"""Texts of errors, which quote what strangers wrote, as one line for a terminal or a log."""

import re

_MOST = 1000  # characters
_ENDS = 450  # of them kept at either end of a longer text: what it is about, and what to do
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")  # control, line ends, bytes that are no UTF-8


def one_line(text):
    """The text with neither line ends nor control characters, its middle left out where it is long."""
    text = _UNSEEN.sub(" ", text)
    return text if len(text) <= _MOST else f"{text[:_ENDS]} … {text[-_ENDS:]}"


def is_one_line(text):
    return not _UNSEEN.search(text)
