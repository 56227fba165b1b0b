"""Collectives that were begun and not yet waited for. Counts their bytes and the time spent waiting for them."""

import time
from collections import Counter
from contextlib import contextmanager

from xc.run import watchdog

_NUM_BUSY_POLLS = 200  # polls without a pause take a fraction of a millisecond; most small collectives end by then
# Between later polls a waiting rank leaves its core to others, for a share of the time that it has waited.
_SLEEP_SHARE, _LEAST_SLEEP, _MOST_SLEEP = 1e-3, 1e-4, 1e-2


class Traffic:
    """What this rank sends, and how long it waits.

    sent    {name of a collective: bytes that leave this rank}, as the sent_* formulas below count them
    waited  seconds in which this rank did nothing but wait for communication
    on_end  None, or a function that is called with (name, begin, end) of every collective, in seconds of
            time.perf_counter. `end` is when this rank saw that the collective had ended. The rank looks only while it
            waits, so the collective itself may have ended earlier

    MPI moves data only inside of MPI calls. Horovod's background thread makes such calls every millisecond, so
    collectives proceed during computation. A polling thread of our own made steps no faster.
    """

    def __init__(self):
        self.sent, self.waited, self.on_end = Counter(), 0.0, None

    def begin(self, name, num_bytes, poll, finish):
        """Record a collective that was begun. Returns a function that waits for it and returns its result.

        num_bytes  bytes that leave this rank
        poll       () -> whether it has ended
        finish     () -> its result; called once it has ended
        """
        self.sent[name] += int(num_bytes)
        begun = time.perf_counter()

        def wait():
            start, num_polls = time.perf_counter(), 0
            with watchdog.waiting(name):
                while not poll():
                    num_polls += 1
                    if num_polls > _NUM_BUSY_POLLS:
                        waited = time.perf_counter() - start
                        time.sleep(min(_MOST_SLEEP, max(_LEAST_SLEEP, _SLEEP_SHARE * waited)))
            end = time.perf_counter()
            self.waited += end - start
            if self.on_end:
                self.on_end(name, begun, end)
            return finish()

        return wait

    def pop_metrics(self, num_steps=1):
        """Mean MiB sent and milliseconds waited per step, of the `num_steps` steps since the last call."""
        sent, waited, self.sent, self.waited = self.sent, self.waited, Counter(), 0.0
        return {"sent_mb": sum(sent.values()) / 2**20 / num_steps, "waited_ms": 1e3 * waited / num_steps}

    @contextmanager
    def uncounted(self):
        """What is sent and waited for in this block is not counted. For work that belongs to no step."""
        counted = self.sent.copy(), self.waited
        try:
            yield
        finally:
            self.sent, self.waited = counted


def sent_all_gather(size, own_bytes):
    """Bytes that one of `size` ranks sends in an all-gather to which it brings own_bytes."""
    return (size - 1) * own_bytes


def sent_reduce_scatter(size, whole_bytes):
    """Bytes that one of `size` ranks sends in a reduce-scatter of whole_bytes into near-equal pieces."""
    return (size - 1) / size * whole_bytes


def sent_all_reduce(size, whole_bytes):
    """Bytes that one of `size` ranks sends in a ring all-reduce of whole_bytes: reduce-scatter, then all-gather."""
    return 2 * (size - 1) / size * whole_bytes
