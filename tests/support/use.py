"""The commands that use a trained run, on ranks that are threads."""

import threading

import pyarrow  # noqa: F401  # in the main thread: where a thread loads it first, it crashes in later ones

from tests.support.worlds import run_ranks
from xc.errors import UserError


def call(monkeypatch, module, ranks, *arguments):
    """[UserError or None] of every rank."""
    here = threading.local()
    monkeypatch.setattr(module, "open_world", lambda *_: here.world)

    def body(world):
        here.world = world
        try:
            module.main([*map(str, arguments)])
        except UserError as error:
            return error

    return run_ranks(ranks, body)


def done(monkeypatch, module, ranks, *arguments):
    assert call(monkeypatch, module, ranks, *arguments) == [None] * ranks
