"""A run that is killed again and again, and goes on each time from its last checkpoint."""

import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass

from tests.support.launch import Launched, losses, run
from tests.support.processes import of_run, ranks_of, wait_until
from tests.support.training import SGD
from xc.checkpoint import layout as checkpoint

_STEPS_A_SAVE = 20
_TRAIN = ["train.py", *SGD, "--data", "synth:classes=300,dim=16,test=0", "--feature-dim", 16, "--global-batch", 30,
          "--head", "knn", "--active-classes", 90, "--graph-from", 0, "--graph-every", "50steps",
          "--exchange", "dgc", "--density-warmup", "40steps", "--schedule", "constant", "--warmup", "10steps",
          "--log-steps", 1, "--device", "cpu", "--save-every", f"{_STEPS_A_SAVE}steps"]


@dataclass
class Kill:
    """moment: what the rank was killed in; seconds: from the kill to the end of all; lost: steps made but not saved."""

    moment: str
    seconds: float
    lost: int


def kill_again_and_again(folder, kills, ranks, seed, progress=lambda kill: None):
    """Start a run, kill a random rank of it at a random moment, and once more, so many times; then compare what came
    of it to a run that nobody killed.

    returns   a list of `Kill`
    progress  called with each of them

    AssertionError where a process is left, where what is called whole is not, where more is lost than what
    was made since the last checkpoint but one began, or where losses or a byte of the last checkpoint differ.
    """
    chance, out, done = random.Random(seed), folder / "run", []
    checkpoints = out / "checkpoints"

    def launch(steps, to):
        return Launched(["mpirun", "--oversubscribe", "-np", ranks, sys.executable, *_TRAIN, "--steps", steps, "--out",
                         to, "--resume", "auto"])

    for number in range(kills):
        before, launched = newest_step(checkpoints), launch(10**6, out)
        moment = ("start", "step", "save")[number % 3]
        if moment == "start":
            wait_until(lambda: len(ranks_of(out)) == ranks)
            time.sleep(chance.uniform(0, 4))
        else:
            wait_until(lambda: newest_step(checkpoints) > before)  # noqa: B023
            time.sleep(chance.uniform(0, 1))
        if moment == "save":
            wait_until(lambda: any(name.name.endswith(".partial") for name in checkpoints.iterdir()))
        victim = chance.choice(ranks_of(out))
        begun = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        launched.result(expect=137)
        wait_until(lambda: not of_run(out))
        seconds = time.monotonic() - begun
        for whole in checkpoints.glob("step-*") if checkpoints.exists() else ():
            checkpoint.check(whole)
        last, saved = max(losses(out), default=0) if out.exists() else 0, newest_step(checkpoints)
        assert saved >= before and last - saved <= 2 * _STEPS_A_SAVE, (before, saved, last)
        done.append(Kill(moment, seconds, max(0, last - saved)))
        progress(done[-1])

    last = newest_step(checkpoints)
    assert last > 0
    run("mpirun", "--oversubscribe", "-np", ranks, sys.executable, *_TRAIN, "--steps", last, "--out", folder / "whole",
        seconds=600)
    broken, whole = losses(out), losses(folder / "whole")
    assert {step: loss for step, loss in broken.items() if step <= last} == whole
    for file in sorted((folder / "whole" / "checkpoints" / f"step-{last:08d}").iterdir()):
        other = checkpoints / f"step-{last:08d}" / file.name
        if file.name == "meta.json":
            assert json.loads(file.read_text()) == json.loads(other.read_text())
        else:
            assert file.read_bytes() == other.read_bytes(), file
    return done


def newest_step(checkpoints):
    """0 where there is no checkpoint."""
    return max((int(path.name[5:]) for path in checkpoints.glob("step-*")), default=0)
