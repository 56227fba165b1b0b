"""A watchdog against stalls: where no rank makes progress for too long, it names the rank that the others wait for,
prints the Python stacks of all ranks and ends the run. While a step takes long it says once a minute what it does."""

import faulthandler
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

_TICK_SECONDS = 0.5
_GRACE_SECONDS = 5.0  # for the ranks to answer; a rank that does not is frozen
_SAY_SECONDS = 60.0  # between two lines on a step that takes long


@dataclass(frozen=True)
class _Activity:
    what: str
    waits: bool  # for other ranks
    since: float  # time.monotonic

    def facts(self):
        return self.what, self.waits, time.monotonic() - self.since


_activity = _Activity("set-up", False, time.monotonic())
_step, _step_began = 0, time.monotonic()
_work = None  # (what, share that is done) of long work in this step


def heartbeat(what, waits=False):
    """The main thread makes progress and now does `what`, or waits for other ranks in it.

    It costs next to nothing. Call it in every phase of a step and in every block of long work.
    """
    _set(what, waits)


def progress(what, share):
    """A `heartbeat` of long work of which this share, 0 to 1, is done."""
    global _work
    heartbeat(what)
    if threading.current_thread() is threading.main_thread():
        _work = (what, share) if share < 1 else None


def at_step(step):
    """The number of the step that the main thread is in, for what is printed."""
    global _step, _step_began, _work
    _step, _step_began, _work = step, time.monotonic(), None


@contextmanager
def waiting(path):
    """In this block the calling thread waits for other ranks in the collective `path`."""
    before = _activity
    _set(path, waits=True)
    try:
        yield
    finally:
        _set(before.what, before.waits)


def _set(what, waits):
    global _activity
    if threading.current_thread() is threading.main_thread():  # background threads do not count
        _activity = _Activity(what, waits, time.monotonic())


class Watchdog:
    """Watches this rank's main thread from a thread of its own, until `close`.

    A rank without progress for `seconds` reports to rank 0, and rank 0 asks all ranks what they do. If none of them
    made progress lately, or a rank does not answer, all ranks end. If one of them did, the others only wait for its
    long work, and their clocks start again. If rank 0 itself is frozen, the ranks that reported to it end the run.
    """

    def __init__(self, world, seconds):
        """seconds: 0: for ever; then it only says what takes long"""
        self._world, self._seconds, self._closed = world, seconds, threading.Event()
        self._reported = self._asked = None  # when
        self._said = 0.0
        self._clock_start, self._answers = time.monotonic(), {}
        if seconds or world.rank == 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def close(self):
        """Stop watching."""
        self._closed.set()

    def _watch(self):
        while not self._closed.wait(_TICK_SECONDS):
            self._say_what_takes_long()
            if not self._seconds:
                continue
            # This fires where a call holds the interpreter, and with it this thread.
            faulthandler.dump_traceback_later(self._seconds + _GRACE_SECONDS)
            while message := self._world.mailbox.receive():
                self._handle_message(*message)
            now, (_, _, idle) = time.monotonic(), _activity.facts()
            if self._reported is None and min(idle, now - self._clock_start) >= self._seconds:
                self._reported = now
                self._world.mailbox.send(0, "report")
            if self._asked and (len(self._answers) == self._world.size or now - self._asked >= _GRACE_SECONDS):
                self._decide()
            if self._reported and now - self._reported >= 4 * _GRACE_SECONDS:
                self._end(f"rank 0: no answer; {self._describe({self._world.rank: _activity.facts()})}")
        faulthandler.cancel_dump_traceback_later()

    def _say_what_takes_long(self):
        now = time.monotonic()
        if self._world.rank == 0 and now - max(self._said, _step_began) >= _SAY_SECONDS:
            self._said = now
            what, share = _work or (_activity.what, None)
            done = "" if share is None else f", {share:.0%} done"
            print(f"step {_step}: {what}{done}", file=sys.stderr, flush=True)

    def _handle_message(self, rank, word, *rest):
        if word == "report" and not self._asked:
            self._asked, self._answers = time.monotonic(), {}
            self._tell_all("ask")
        elif word == "ask":
            self._world.mailbox.send(rank, "answer", *_activity.facts())
        elif word == "answer":
            self._answers[rank] = rest
        elif word == "continue":
            self._reported, self._clock_start = None, time.monotonic()
        elif word == "end":
            _dump(self._world.rank)

    def _decide(self):
        """On rank 0, after all ranks have answered or had their time."""
        # A rank that waits began to wait a little after the stalled one stalled, or waits only now and then.
        if any(idle < self._seconds / (2 if waits else 1) for _, waits, idle in self._answers.values()):
            self._asked = None
            self._tell_all("continue")
        else:
            self._end(self._describe(self._answers))

    def _describe(self, answers):
        """What the ranks do; those that the others wait for come first."""
        silent = [rank for rank in range(self._world.size) if rank not in answers] if self._asked else []
        groups = {}
        for rank, (what, waits, _) in sorted(answers.items(), key=lambda item: (item[1][1], item[0])):
            groups.setdefault(("waiting in " if waits else "in ") + what, []).append(rank)
        parts = [f"{_ranks(silent)}: no answer"] if silent else []
        return "; ".join(parts + [f"{_ranks(ranks)}: {does}" for does, ranks in groups.items()])

    def _end(self, description):
        print(f"error: no rank made progress for {self._seconds:g} s (--stall-seconds), at step {_step}: {description}",
              file=sys.stderr, flush=True)
        self._tell_all("end")
        time.sleep(4 * _TICK_SECONDS)
        _dump(self._world.rank)
        self._world.abort(1)

    def _tell_all(self, word):
        for rank in range(self._world.size):
            self._world.mailbox.send(rank, word)


def _dump(rank):
    print(f"rank {rank}, step {_step}, in {_activity.what}:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr)


def _ranks(ranks):
    """rank 3; ranks 0, 1, 2 and 60 more."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


