"""What is in flight ends without its owner's help; bytes and waits are counted."""

import threading
import time

import pytest

from xc.comm.traffic import Traffic


def over_after(calls):
    """A poll that says yes at its n-th call, and where it was called from."""
    seen = []

    def poll():
        seen.append(threading.current_thread())
        return len(seen) >= calls

    return poll, seen


def test_it_moves_along_behind_a_computation():
    traffic = Traffic()
    ends = []
    traffic.on_end = lambda path, begin, end: ends.append((path, end - begin))
    polls = [over_after(calls) for calls in (1, 5, 9)]
    waits = [traffic.begin(f"path{i}", 10, poll, lambda i=i: i) for i, (poll, _) in enumerate(polls)]
    limit = time.monotonic() + 10
    while len(ends) < 3 and time.monotonic() < limit:
        time.sleep(0.01)  # the owner does something else
    assert [path for path, _ in ends] == ["path0", "path1", "path2"]
    assert [wait() for wait in waits] == [0, 1, 2]
    assert all(thread.name == "progress" for _, seen in polls for thread in seen)
    assert all(len(seen) == calls for (_, seen), calls in zip(polls, (1, 5, 9), strict=True))  # none after its end


def test_what_is_waited_for_at_once_needs_no_thread():
    traffic = Traffic()
    poll, seen = over_after(300)
    assert traffic.begin("path", 10, poll, lambda: "result", background=False)() == "result"
    assert {thread.name for thread in seen} == {"MainThread"} and len(seen) == 300


def test_an_error_in_flight_reaches_the_one_that_waits():
    traffic = Traffic()

    def poll():
        raise OSError("connection reset")

    wait = traffic.begin("path", 10, poll, lambda: None)
    other = traffic.begin("other", 10, over_after(3)[0], lambda: "fine")
    with pytest.raises(OSError, match="connection reset"):
        wait()
    assert other() == "fine"


def test_bytes_and_waits_are_counted_once():
    traffic = Traffic()
    for _ in range(2):
        traffic.begin("a", 2**20, lambda: True, lambda: None)()
    traffic.begin("b", 2**19, over_after(400)[0], lambda: None, background=False)()
    taken = traffic.take(2)
    assert taken["sent_mb"] == 1.25 and taken["waited_ms"] > 1
    assert traffic.take() == {"sent_mb": 0.0, "waited_ms": 0.0}


def test_what_is_not_a_steps_is_not_counted():
    traffic = Traffic()
    traffic.begin("a", 2**20, lambda: True, lambda: None)()
    with traffic.uncounted():
        traffic.begin("a", 2**20, over_after(400)[0], lambda: None, background=False)()
    assert traffic.take()["sent_mb"] == 1.0


def test_the_thread_sleeps_when_nothing_is_in_flight():
    traffic = Traffic()
    traffic.begin("a", 1, over_after(3)[0], lambda: None)()
    time.sleep(0.05)
    start = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - start < 0.1
    traffic.begin("a", 1, over_after(30)[0], lambda: None)  # and wakes up again
    limit = time.monotonic() + 10
    while traffic._in_flight and time.monotonic() < limit:
        time.sleep(0.01)
    assert not traffic._in_flight
