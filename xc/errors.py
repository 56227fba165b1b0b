"""Errors that a user sees: one line of text, and the exit code.

They quote untrusted text (file names, cells of tables), so control characters never reach a terminal or a log.
"""

import re

_MOST = 1000  # characters
_ENDS = 450  # characters kept at either end of a longer text: what it is about, and what to do
_UNSEEN = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+")  # control, line ends, bytes that are no UTF-8


class UserError(ValueError):
    """A mistake of the user. Every rank finds it and raises it; rank 0 prints the line, all exit with `code`."""

    code = 2

    def __init__(self, text):
        super().__init__(one_line(text))


class ExitRun(Exception):
    """Every rank raises it: rank 0 prints the line, all exit with `code`."""

    def __init__(self, code, text):
        super().__init__(text)
        self.code = code


def is_out_of_memory(error):
    """Whether an error says that the memory of this process, or of its GPU, has ended."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("can't allocate memory", "out of memory")))


def one_line(text):
    """The text without line ends and control characters. The middle of a long text is left out."""
    text = _UNSEEN.sub(" ", text)
    return text if len(text) <= _MOST else f"{text[:_ENDS]} … {text[-_ENDS:]}"


def is_one_line(text):
    """Whether `one_line` would leave the characters as they are."""
    return not _UNSEEN.search(text)
