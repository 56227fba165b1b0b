"""train.py in the tests: flags of short runs, and main() on ranks that are threads."""

import signal
import sys
import threading

import pytest

from tests.support.worlds import run_ranks
from xc.errors import UserError
from xc.model import backbone

# What tests train with whose losses, rates and places of a mistake are of SGD.
SGD = ["--optimizer", "sgd", "--lr", 0.1, "--head-lr-scale", 40, "--weight-decay", 5e-4, "--warmup", "0.5epochs",
       "--scale", 20]
# On synthetic vectors; every step logged.
SYNTH = ["train.py", *SGD, "--data", "synth:classes=300,dim=16,test=50", "--feature-dim", 16, "--global-batch", 30,
         "--lr", 0.05, "--warmup", 0.01, "--log-steps", 1, "--schedule", "constant", "--device", "cpu",
         "--save-every", 0]
# On the images of `tiny_packs`.
QUICK = [*SGD, "--global-batch", 12, "--feature-dim", 8, "--warmup", 0, "--log-steps", 1, "--eval-every", 0,
         "--save-every", 0, "--device", "cpu"]
# The same with an uneven batch on any number of ranks and every source of randomness on. A learning rate as at the
# start of a warm-up: larger ones throw the loss of ten classes about, and now and then rounding decides which of two
# equal pixels a max-pool takes.
UNEVEN = [*SGD, "--global-batch", 13, "--lr", 0.0003, "--feature-dim", 24, "--warmup", 0.1, "--log-steps", 1,
          "--save-every", 0, "--eval-every", 0, "--device", "cpu"]


def launcher(ranks):
    """The words before python that start so many ranks; none for a single process without a launcher."""
    return ["mpirun", "--oversubscribe", "-np", ranks] if ranks > 1 else []


def assert_equal_losses(found, reference):
    """Of {step: loss}, up to the rounding of sums in another order."""
    assert found.keys() == reference.keys()
    for step, loss in reference.items():
        assert found[step] == pytest.approx(loss, rel=1e-5), f"step {step}"


def files_of(folder):
    """{path: bytes} of all files in a folder and below."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def call_main(monkeypatch, ranks, *arguments):
    """train.main() on so many ranks, which are threads of this process; [the UserError or None] of every rank.

    A model is built from torch's random generator, which threads share, so one rank at a time builds its own.
    """
    train, here, build, one_at_a_time = _import_train(), threading.local(), backbone.build, threading.Lock()

    def build_alone(*args, **kwargs):
        with one_at_a_time:
            return build(*args, **kwargs)

    monkeypatch.setattr(backbone, "build", build_alone)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments), "--stall-seconds", "0"])
    monkeypatch.setattr(train, "open_world", lambda *_: here.world)

    def body(world):
        here.world = world
        try:
            train.main()
        except UserError as error:
            return error

    return run_ranks(ranks, body)


def refusal(monkeypatch, ranks, *arguments):
    """The one line with which all ranks of train.py refuse these arguments."""
    texts = {str(error) if error else None for error in call_main(monkeypatch, ranks, *arguments)}
    assert len(texts) == 1 and None not in texts, texts
    (text,) = texts
    assert text and "\n" not in text
    return text


def _import_train():
    """train.py listens to signals from its import on; this process must not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    import train

    for number, handler in handlers.items():
        signal.signal(number, handler)
    return train
