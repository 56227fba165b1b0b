"""Bytes and waits of communication in flight are counted once, and errors reach the rank that waits."""

import pytest

from xc.comm.traffic import Traffic


def over_after(calls):
    """A poll that says yes at its n-th call."""
    seen = []

    def poll():
        seen.append(None)
        return len(seen) >= calls

    return poll


def test_a_wait_ends_with_its_transfer_and_returns_the_result():
    traffic, ends = Traffic(), []
    traffic.on_end = lambda path, begin, end: ends.append((path, end >= begin))
    waits = [traffic.begin(f"path{i}", 10, over_after(calls), lambda i=i: i) for i, calls in enumerate((1, 300, 9))]
    assert [wait() for wait in reversed(waits)] == [2, 1, 0]
    assert ends == [("path2", True), ("path1", True), ("path0", True)]


def test_an_error_in_flight_reaches_the_one_that_waits():
    traffic = Traffic()

    def poll():
        raise OSError("connection reset")

    wait = traffic.begin("path", 10, poll, lambda: None)
    other = traffic.begin("other", 10, over_after(3), lambda: "fine")
    with pytest.raises(OSError, match="connection reset"):
        wait()
    assert other() == "fine"


def test_bytes_and_waits_are_counted_once():
    traffic = Traffic()
    for _ in range(2):
        traffic.begin("a", 2**20, lambda: True, lambda: None)()
    traffic.begin("b", 2**19, over_after(400), lambda: None)()
    taken = traffic.pop_metrics(2)
    assert taken["sent_mb"] == 1.25 and taken["waited_ms"] > 1
    assert traffic.pop_metrics() == {"sent_mb": 0.0, "waited_ms": 0.0}


def test_what_belongs_to_no_step_is_not_counted():
    traffic = Traffic()
    traffic.begin("a", 2**20, lambda: True, lambda: None)()
    with traffic.uncounted():
        traffic.begin("a", 2**20, over_after(400), lambda: None)()
    assert traffic.pop_metrics()["sent_mb"] == 1.0
