"""A watchdog: where no rank moves on for too long, one line says which of them the others wait for, all print their
Python stacks, and the run ends."""

import faulthandler
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

_TICK_SECONDS = 0.5
_GRACE_SECONDS = 5.0  # for the ranks to answer; one that does not is frozen


@dataclass(frozen=True)
class _Doing:
    what: str
    waits: bool  # for other ranks
    since: float  # time.monotonic

    def facts(self):
        return self.what, self.waits, time.monotonic() - self.since


_doing = _Doing("set-up", False, time.monotonic())
_step = 0


def note(what, waits=False):
    """The main thread moves on, and does this now, or waits for other ranks in it. Cheap: for every phase of a step,
    every block of long work."""
    _set(what, waits)


def at(step):
    """The step that the main thread is in, for the line that names it."""
    global _step
    _step = step


@contextmanager
def waiting(path):
    """In this block the calling thread waits for other ranks in the collective `path`."""
    before = _doing
    _set(path, waits=True)
    try:
        yield
    finally:
        _set(before.what, before.waits)


def _set(what, waits):
    global _doing
    if threading.current_thread() is threading.main_thread():  # the others are beside the steps
        _doing = _Doing(what, waits, time.monotonic())


class Watchdog:
    """Watches this rank's main thread, in a thread of its own, from now to `close`.

    A rank that has not moved on for so many seconds reports to rank 0, which asks all of them what they do. Where none
    has moved on lately, or has not answered, all of them end. Where some rank has, the others only wait for long work
    of it, and patience begins anew. Where rank 0 itself is frozen, those who reported to it end the run.
    """

    def __init__(self, world, seconds):
        """seconds: 0 for no watch."""
        self._world, self._seconds, self._closed = world, seconds, threading.Event()
        self._reported = self._asked = None  # when
        self._patient_since, self._answers = time.monotonic(), {}
        if seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self):
        """Work that comes now may take as long as it likes."""
        self._closed.set()

    def _watch(self):
        while not self._closed.wait(_TICK_SECONDS):
            # Comes to pass where a call holds the interpreter, and with it this thread.
            faulthandler.dump_traceback_later(self._seconds + _GRACE_SECONDS)
            while message := self._world.mailbox.take():
                self._hear(*message)
            now, (_, _, idle) = time.monotonic(), _doing.facts()
            if self._reported is None and min(idle, now - self._patient_since) >= self._seconds:
                self._reported = now
                self._world.mailbox.send(0, "report")
            if self._asked and (len(self._answers) == self._world.size or now - self._asked >= _GRACE_SECONDS):
                self._judge()
            if self._reported and now - self._reported >= 4 * _GRACE_SECONDS:
                self._end(f"rank 0: no answer; {self._sentence({self._world.rank: _doing.facts()})}")
        faulthandler.cancel_dump_traceback_later()

    def _hear(self, rank, word, *rest):
        if word == "report" and not self._asked:
            self._asked, self._answers = time.monotonic(), {}
            self._tell_all("ask")
        elif word == "ask":
            self._world.mailbox.send(rank, "answer", *_doing.facts())
        elif word == "answer":
            self._answers[rank] = rest
        elif word == "patience":
            self._reported, self._patient_since = None, time.monotonic()
        elif word == "end":
            _dump(self._world.rank)

    def _judge(self):
        """On rank 0, after all have answered or had their time."""
        # Who waits began to wait a little after the one that stalls did, or is only now and then waiting.
        if any(idle < self._seconds / (2 if waits else 1) for _, waits, idle in self._answers.values()):
            self._asked = None
            self._tell_all("patience")
        else:
            self._end(self._sentence(self._answers))

    def _sentence(self, answers):
        """What the ranks do, those that the others wait for first."""
        silent = [rank for rank in range(self._world.size) if rank not in answers] if self._asked else []
        groups = {}
        for rank, (what, waits, _) in sorted(answers.items(), key=lambda item: (item[1][1], item[0])):
            groups.setdefault(("waiting in " if waits else "in ") + what, []).append(rank)
        parts = [f"{_ranks(silent)}: no answer"] if silent else []
        return "; ".join(parts + [f"{_ranks(ranks)}: {does}" for does, ranks in groups.items()])

    def _end(self, sentence):
        print(f"error: nothing has moved on for {self._seconds:g} s (--stall-seconds), at step {_step}: {sentence}",
              file=sys.stderr, flush=True)
        self._tell_all("end")
        time.sleep(4 * _TICK_SECONDS)
        _dump(self._world.rank)
        self._world.abort(1)

    def _tell_all(self, word):
        for rank in range(self._world.size):
            self._world.mailbox.send(rank, word)


def _dump(rank):
    print(f"rank {rank}, step {_step}, in {_doing.what}:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr)


def _ranks(ranks):
    """rank 3; ranks 0, 1, 2 and 60 more."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"
