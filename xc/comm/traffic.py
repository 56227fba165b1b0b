"""Communication in flight: begun now, waited for later, moved along in between; how much of it, and for how long."""

import threading
import time
from collections import Counter
from contextlib import contextmanager

from xc.run import watchdog

_SPINS = 200  # polls without a pause, a fraction of a millisecond: most small collectives end within
_NAP_SECONDS = 1e-4  # between the polls after that: a rank that waits leaves its core to others


class Traffic:
    """What this rank sends and waits for.

    sent    bytes that leave this rank, by path, as the sent_* formulas of this file count them
    waited  seconds in which this rank did nothing but wait for communication

    MPI moves messages along only inside its calls. While something is in flight behind a computation, a thread makes
    such calls between naps; one that blocks in MPI would poll all the time and take a core.
    """

    def __init__(self):
        self.sent, self.waited = Counter(), 0.0
        self.on_end = None  # called with path, begin, end (seconds of time.perf_counter) of all that was in flight
        self._in_flight, self._some, self._thread = set(), threading.Event(), None

    def begin(self, path, num_bytes, poll, finish, background=True):
        """Note a collective that was begun; returns a function that waits for it and returns its result.

        num_bytes   that leave this rank
        poll        () -> whether it is over; called by several threads, one at a time
        finish      () -> result; called by the thread that waits
        background  something else is done before it is waited for
        """
        self.sent[path] += int(num_bytes)
        pending = _Pending(self, path, poll, finish)
        if background:
            self._in_flight.add(pending)
            if self._thread is None:
                self._thread = threading.Thread(target=self._move_along, name="progress", daemon=True)
                self._thread.start()
            self._some.set()
        return pending

    def take(self, num_steps=1):
        """Metrics of so many steps, since the last call: megabytes sent and milliseconds waited, of one step."""
        sent, waited, self.sent, self.waited = self.sent, self.waited, Counter(), 0.0
        return {"sent_mb": sum(sent.values()) / 2**20 / num_steps, "waited_ms": 1e3 * waited / num_steps}

    @contextmanager
    def uncounted(self):
        """What happens in this block is not the steps'."""
        counted = self.sent.copy(), self.waited
        try:
            yield
        finally:
            self.sent, self.waited = counted

    def _move_along(self):
        while True:
            self._some.wait()
            self._some.clear()
            while self._in_flight:
                for pending in tuple(self._in_flight):
                    pending.is_over()
                time.sleep(_NAP_SECONDS)


class _Pending:
    def __init__(self, traffic, path, poll, finish):
        self._traffic, self._path, self._poll, self._finish = traffic, path, poll, finish
        self._begun, self._over, self._error, self._lock = time.perf_counter(), False, None, threading.Lock()

    def is_over(self):
        with self._lock:
            if not self._over:
                try:
                    self._over = self._poll()
                except Exception as e:  # in whichever thread: the one that waits must have it
                    self._over, self._error = True, e
                if self._over:
                    self._traffic._in_flight.discard(self)
                    if self._traffic.on_end:
                        self._traffic.on_end(self._path, self._begun, time.perf_counter())
            return self._over

    def __call__(self):
        start, polls = time.perf_counter(), 0
        with watchdog.waiting(self._path):
            while not self.is_over():
                polls += 1
                if polls > _SPINS:
                    time.sleep(_NAP_SECONDS)
        self._traffic.waited += time.perf_counter() - start
        if self._error:
            raise self._error
        return self._finish()


def sent_all_gather(size, own_bytes):
    """Bytes that a rank of `size` sends when all get what it brings."""
    return (size - 1) * own_bytes


def sent_reduce_scatter(size, whole_bytes):
    """Of a sum of which every rank gets a near-equal piece."""
    return (size - 1) / size * whole_bytes


def sent_all_reduce(size, whole_bytes):
    """Of a sum that every rank gets, by a ring: reduce-scatter, then all-gather."""
    return 2 * (size - 1) / size * whole_bytes
