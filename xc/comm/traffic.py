"""Communication in flight: begun now, waited for later. Counts its bytes and the time spent waiting."""

import time
from collections import Counter
from contextlib import contextmanager

from xc.run import watchdog

_SPINS = 200  # polls without a pause, a fraction of a millisecond: most small collectives end within that time
_NAP_SECONDS = 1e-4  # between later polls, so that a rank that waits leaves its core to others


class Traffic:
    """What this rank sends and waits for.

    sent    bytes that leave this rank, by path, as the sent_* formulas below count them
    waited  seconds in which this rank did nothing but wait for communication

    MPI makes progress only inside of its calls. Horovod's background thread makes such calls every millisecond, so
    transfers go on during computation; a polling thread of our own gained nothing beside it.
    """

    def __init__(self):
        self.sent, self.waited = Counter(), 0.0
        self.on_end = None  # called with path, begin, end (seconds of time.perf_counter) of every transfer

    def begin(self, path, num_bytes, poll, finish):
        """Record a collective that was begun; returns a function that waits for it and returns its result.

        num_bytes  that leave this rank
        poll       () -> whether it has ended
        finish     () -> result
        """
        self.sent[path] += int(num_bytes)
        begun = time.perf_counter()

        def wait():
            start, polls = time.perf_counter(), 0
            with watchdog.waiting(path):
                while not poll():
                    polls += 1
                    if polls > _SPINS:
                        time.sleep(_NAP_SECONDS)
            end = time.perf_counter()
            self.waited += end - start
            if self.on_end:
                self.on_end(path, begun, end)
            return finish()

        return wait

    def take(self, num_steps=1):
        """Metrics of the steps since the last call: MiB sent and milliseconds waited, of one step."""
        sent, waited, self.sent, self.waited = self.sent, self.waited, Counter(), 0.0
        return {"sent_mb": sum(sent.values()) / 2**20 / num_steps, "waited_ms": 1e3 * waited / num_steps}

    @contextmanager
    def uncounted(self):
        """Traffic in this block does not count: it belongs to no step."""
        counted = self.sent.copy(), self.waited
        try:
            yield
        finally:
            self.sent, self.waited = counted


def sent_all_gather(size, own_bytes):
    """Bytes that a rank of `size` sends when all ranks get what it brings."""
    return (size - 1) * own_bytes


def sent_reduce_scatter(size, whole_bytes):
    """Bytes that a rank sends for a sum of which every rank gets a near-equal piece."""
    return (size - 1) / size * whole_bytes


def sent_all_reduce(size, whole_bytes):
    """Bytes that a rank sends for a sum that every rank gets, by a ring: reduce-scatter, then all-gather."""
    return 2 * (size - 1) / size * whole_bytes
