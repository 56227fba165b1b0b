"""The watchdog of one rank among others that are scripted: what it says, whom it ends, and whom it leaves alone. It
waits for events, so a machine under load changes nothing. tests/mpi/test_faults.py has stalls of real ranks."""

import queue
import threading

import pytest

from xc.run import watchdog

_PATIENCE_SECONDS = 60
STALLED, WAITING = ("data", False, 100.0), ("shards.all_gather", True, 99.0)  # what, waits for others, idle seconds


class Mailbox:
    """Of a rank whose peers answer as scripted: {rank: facts}. A rank that is not among them is silent."""

    def __init__(self, rank, answers):
        self._rank, self._answers, self._inbox = rank, answers, queue.SimpleQueue()
        self.sent, self.received = [], 0

    def send(self, rank, word, *rest):
        self.sent.append((rank, word))
        if rank == self._rank:
            self._inbox.put((rank, word, *rest))
        elif word == "ask" and rank in self._answers:
            self._inbox.put((rank, "answer", *self._answers[rank]))

    def receive(self):
        self.received += 1
        return None if self._inbox.empty() else self._inbox.get()


class Rank:
    def __init__(self, rank, size, answers):
        self.rank, self.size, self.mailbox = rank, size, Mailbox(rank, answers)
        self.ended, self.code = threading.Event(), None

    def abort(self, code):
        self.code = code
        self.ended.set()


@pytest.fixture
def watched(monkeypatch):
    """watched(rank, size, answers): a rank whose watchdog runs, with short times. This thread is its main thread."""
    monkeypatch.setattr(watchdog, "_TICK_SECONDS", 0.01)
    monkeypatch.setattr(watchdog, "_GRACE_SECONDS", 0.2)
    dogs = []

    def begin(rank, size, answers, seconds=0.1):
        world = Rank(rank, size, answers)
        dogs.append(watchdog.Watchdog(world, seconds))
        return world

    yield begin
    for dog in dogs:
        dog.close()


def line_of(capfd):
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("rank, size, answers, sentence", [
    (0, 1, {}, "rank 0: in data"),
    (0, 3, {1: STALLED, 2: WAITING}, "rank 1: in data; ranks 0, 2: waiting in shards.all_gather"),
    (0, 3, {2: WAITING}, "rank 1: no answer; ranks 0, 2: waiting in shards.all_gather"),
    (1, 3, {}, "rank 0: no answer; rank 1: waiting in shards.all_gather")])
def test_a_rank_that_stalls_is_named_and_all_end(rank, size, answers, sentence, watched, capfd):
    watchdog.at_step(7)
    watchdog.heartbeat("data") if size == 1 else watchdog.heartbeat("shards.all_gather", waits=True)
    world = watched(rank, size, answers)
    assert world.ended.wait(_PATIENCE_SECONDS) and world.code == 1
    assert line_of(capfd) == f"error: no rank made progress for 0.1 s (--stall-seconds), at step 7: {sentence}"
    assert {to for to, word in world.mailbox.sent if word == "end"} == set(range(size))


@pytest.mark.parametrize("busy", [("long work", False, 0.01), ("shards.all_gather", True, 0.01)])
def test_a_rank_that_works_for_long_is_no_stall(busy, watched):
    """The others wait for it, ask again and again, and never end it."""
    watchdog.heartbeat("shards.all_gather", waits=True)
    world = watched(0, 3, {1: busy, 2: WAITING})
    enough = threading.Event()
    threading.Thread(target=lambda: _until(lambda: world.mailbox.sent.count((1, "continue")) >= 5, enough)).start()
    assert enough.wait(_PATIENCE_SECONDS)
    assert not world.ended.is_set() and (1, "end") not in world.mailbox.sent


@pytest.mark.parametrize("rank, seconds", [(0, 0), (0, 100), (1, 100)])
def test_a_step_that_takes_long_says_what_it_does(rank, seconds, watched, monkeypatch, capfd):
    """Once in every _SAY_SECONDS, on rank 0; a new step says nothing before."""
    said = []
    monkeypatch.setattr(watchdog, "print", lambda line, **_: said.append(line), raising=False)
    watchdog.at_step(7)
    watchdog.progress("search of neighbours", 0.255)
    watchdog.heartbeat("a block of it")
    world = watched(rank, 2, {}, seconds)
    assert not said
    monkeypatch.setattr(watchdog, "_SAY_SECONDS", 0.03)
    if rank:
        assert _until(lambda: world.mailbox.received > 20) and not said
        return
    assert _until(lambda: len(said) == 2) and set(said) == {"step 7: search of neighbours, 26% done"}
    watchdog.progress("search of neighbours", 1.0)
    watchdog.heartbeat("exchange")
    assert _until(lambda: said[-1] == "step 7: exchange")


def test_what_other_threads_do_is_no_progress(watched):
    """Readers and writers beside the steps may go on where the steps do not."""
    watchdog.heartbeat("shards.all_gather", waits=True)
    world, over = watched(1, 2, {}), threading.Event()
    beats = iter(lambda: over.wait(0.01), True)
    threading.Thread(target=lambda: [watchdog.heartbeat("reading") for _ in beats]).start()
    try:
        assert _until(lambda: (0, "report") in world.mailbox.sent)
    finally:
        over.set()


def _until(true, event=None, tick=0.01):
    pause = threading.Event()
    for _ in range(int(_PATIENCE_SECONDS / tick)):
        if true():
            if event:
                event.set()
            return True
        pause.wait(tick)
    return False
