"""Faults of real ranks: the run ends within its time with nothing left over, or goes on; and what goes on from its
checkpoints is an unbroken run."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.disks import small_disk
from tests.support.kills import kill_again_and_again
from tests.support.launch import Launched, accuracies, losses, run
from tests.support.processes import of_run, wait_until
from tests.support.training import QUICK, SYNTH, launcher

pytestmark = [pytest.mark.mpi, pytest.mark.long]


def faulty(ranks, fault, *arguments, **options):
    return run(*launcher(ranks), sys.executable, "-m", "tests.mpi.programs.faults", fault, *arguments, **options)


def errors(process):
    return [line for line in process.stderr.splitlines() if line.startswith("error:")]


def assert_nothing_left(out):
    """Ranks are gone, if not all at once: mpirun may be gone before them."""
    wait_until(lambda: not of_run(out))


@pytest.mark.parametrize("fault, flags", [
    ("kill-gather", ["--micro-batches", 2]), ("kill-bucket", []),
    ("kill-message", ["--exchange", "dgc", "--density", 0.05])])
def test_a_rank_killed_with_communication_in_flight_ends_all(fault, flags, tmp_path):
    out = tmp_path / "run"
    process = faulty(3, fault, *SYNTH[1:], *flags, "--out", out, "--steps", 500, expect=137)
    assert re.search(r"process rank 1 .* exited on signal 9", process.stderr)
    assert_nothing_left(out)


@pytest.mark.parametrize("graph", ["exact", "approx"])
def test_memory_that_ends_in_a_build_is_one_line_and_nothing_is_lost(graph, tmp_path):
    out = tmp_path / "run"
    flags = [*SYNTH[1:], "--out", out, "--steps", 12, "--head", "knn", "--active-classes", 100, "--graph", graph,
             "--graph-from", 0, "--graph-every", "11steps", "--save-every", "4steps", "--resume", "auto"]
    process = faulty(2, "memory", *flags, expect=2)
    (line,) = errors(process)
    assert line.startswith("error: rank 1 has no memory left (") and "--check" in line
    assert "Traceback" not in process.stderr and (out / "checkpoints" / "step-00000004").exists()
    assert_nothing_left(out)
    faulty(2, "none", *flags)


@pytest.mark.timeout(900)
def test_killed_again_and_again_a_run_loses_nothing_but_steps_since_its_last_checkpoint(tmp_path):
    """Each moment twice; benchmarks/soak.py kills as often as it is told to."""
    kill_again_and_again(tmp_path, kills=6, ranks=2, seed=0)


@pytest.mark.parametrize("ranks, fault, sentence", [
    (3, "sleep", "rank 1: in data; ranks 0, 2: waiting in all_ranks.all_reduce"),
    (2, "spin", "rank 1: no answer; rank 0: waiting in all_ranks.all_reduce")])
def test_a_rank_that_stalls_is_named_and_the_run_ends(ranks, fault, sentence, tmp_path):
    """It stalls until it is ended; tests/run/test_watchdog.py has more, and ranks that work for long."""
    out = tmp_path / "run"
    process = faulty(ranks, fault, *SYNTH[1:], "--out", out, "--steps", 500, "--stall-seconds", 20, expect=None,
                     seconds=250)
    assert process.returncode not in (0, 2, 75)
    (line,) = errors(process)
    assert line.startswith("error: no rank made progress for 20 s (--stall-seconds), at step 1")
    assert line.endswith(sentence)
    assert re.search(rf'File ".*", line \d+ in {fault}', process.stderr), process.stderr  # stacks
    assert_nothing_left(out)


@pytest.mark.parametrize("ranks, flags", [
    (2, ["--amp", "bf16", "--exchange", "dgc", "--density-warmup", 0]),
    (3, ["--head", "knn", "--active-classes", 90, "--graph-from", 0, "--graph-every", "10steps"])])
def test_a_loss_that_is_no_number_is_left_behind(ranks, flags, tmp_path):
    """Back at the last checkpoint the batch is left out, as if it had never been there."""
    base = [*SYNTH[1:], *flags, "--steps", 40, "--save-every", "8steps", "--log-steps", 4, "--keep-checkpoints", 1]
    process = faulty(ranks, "nan", *base, "--out", tmp_path / "run", "--max-rollbacks", 1)
    assert process.stderr.count("warning: the loss of step 22 is nan: going back to") == 1
    assert "step-00000016" in process.stderr
    faulty(ranks, "without", *base, "--out", tmp_path / "without")
    assert losses(tmp_path / "run") == losses(tmp_path / "without")
    assert sorted(losses(tmp_path / "run")) == list(range(4, 41, 4))
    files = [sorted((tmp_path / name / "checkpoints/step-00000040").iterdir()) for name in ("run", "without")]
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_a_loss_that_is_no_number_ends_all_ranks(tmp_path):
    out = tmp_path / "run"
    process = faulty(3, "nan", *SYNTH[1:], "--steps", 40, "--max-rollbacks", 1, "--out", out, expect=2)
    (line,) = errors(process)
    assert "the loss of step 22 is nan, and there is no checkpoint yet to go back to" in line
    assert "Traceback" not in process.stderr
    assert_nothing_left(out)


# --- disks ---


# About 1.3 MB a checkpoint, most of it rows.
WIDE = ["train.py", "--data", "synth:classes=20000,dim=16,test=0", "--feature-dim", 16, "--global-batch", 30,
        "--warmup", 0, "--schedule", "constant", "--log-steps", 1, "--device", "cpu", "--head", "sampled",
        "--active-classes", 60, "--save-every", "10steps"]


def test_training_goes_on_with_a_full_disk(tmp_path):
    """Room for two checkpoints and a half: the third, which is written before the first goes, never fits."""
    with small_disk(tmp_path / "disk", 3600) as disk:
        out = disk / "run"
        process = run(*launcher(3), sys.executable, *WIDE, "--out", out, "--steps", 60, "--keep-checkpoints", 2,
                      expect=1)
        assert process.stderr.count("warning: a checkpoint could not be written") == 2
        (line,) = errors(process)
        assert "3 checkpoint(s) in a row could not be written" in line
        assert re.search(r"No space left|full", line)
        assert sorted(f.name for f in (out / "checkpoints").iterdir()) == ["step-00000010", "step-00000020"]
        assert_nothing_left(out)
        shutil.copytree(out, tmp_path / "elsewhere")
    run(*launcher(3), sys.executable, *WIDE, "--out", tmp_path / "elsewhere", "--steps", 60, "--resume", "auto")
    run(*launcher(3), sys.executable, *WIDE, "--out", tmp_path / "whole", "--steps", 60)
    assert losses(tmp_path / "elsewhere") == losses(tmp_path / "whole")


def test_training_goes_on_while_a_disk_is_read_only(tmp_path):
    with small_disk(tmp_path / "disk", 40000) as disk:
        out = disk / "run"
        launched = Launched([*launcher(2), sys.executable, *WIDE, "--out", out, "--steps",
                             400])
        wait_until(lambda: len(list(out.glob("checkpoints/step-*"))) >= 2)
        os.chmod(out / "checkpoints", 0o500)
        subprocess.run(["mount", "-o", "bind", out / "checkpoints", out / "checkpoints"], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", out / "checkpoints"], check=True)
        saved = sorted(f.name for f in (out / "checkpoints").iterdir())
        try:
            process = launched.result(expect=1)
        finally:
            subprocess.run(["umount", "-l", out / "checkpoints"], check=True)
        assert process.stderr.count("Read-only file system") == 3 and len(errors(process)) == 1
        assert sorted(f.name for f in (out / "checkpoints").iterdir() if f.name[0] != ".") == saved


# --- records ---


def test_damaged_records_are_left_out_up_to_a_number(spoiled_packs, tmp_path):
    """In whose place the next whole record is taken, on whichever rank."""
    base = [*launcher(3), sys.executable, "train.py", "--data", spoiled_packs, *QUICK, "--steps", 22]
    process = run(*base, "--out", tmp_path / "run", "--max-bad-records", 3)
    named = set(re.findall(r"warning: left out: .*record (\d+): wrong checksum", process.stderr))
    assert named == {"7", "8", "119"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"bad_records": 3' in lines
    few = run(*base, "--out", tmp_path / "few", "--max-bad-records", 2, expect=2)
    assert re.search(r"error: .*3 records cannot be used, --max-bad-records allows 2", few.stderr)
    none = run(*base, "--out", tmp_path / "none", expect=2)
    assert re.search(r"error: rank \d: .*record \d+: wrong checksum", none.stderr)
    for name in "few", "none":
        assert_nothing_left(tmp_path / name)


def test_a_loss_that_is_no_number_goes_back_beyond_what_it_spoiled(tmp_path):
    """The checkpoint that an update spoiled is passed by for the one before; what was left out is known to a launch
    that comes later."""
    base = [*SYNTH[1:], "--steps", 40, "--save-every", "7steps", "--log-steps", 7, "--keep-checkpoints", 3,
            "--max-rollbacks", 1]
    out = tmp_path / "run"
    process = faulty(2, "nan", *base, "--out", out)  # step 22, right behind the checkpoint of step 21
    assert "going back to" in process.stderr and "step-00000014 and leaving out" in process.stderr
    faulty(2, "without", *base, "--out", tmp_path / "without")
    assert losses(out) == losses(tmp_path / "without")
    assert (out / "rollbacks.json").read_text() == "[21]"


def test_a_launch_may_begin_with_a_batch_that_is_left_out(tmp_path):
    """Killed behind a rollback and before a further step: the next launch evaluates before it has trained."""
    base = [*SYNTH[1:], "--head", "knn", "--active-classes", 90, "--steps", 30, "--save-every", "20steps",
            "--eval-every", "21steps", "--keep-checkpoints", 3, "--max-rollbacks", 1]
    faulty(2, "nan", *base, "--out", tmp_path / "run")
    whole = accuracies(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000030")
    faulty(2, "none", *base, "--out", tmp_path / "run", "--resume", "auto")
    assert [step for step, *_ in whole] == [21, 30] and accuracies(tmp_path / "run") == whole


def test_two_launches_do_not_share_a_run_folder(tmp_path):
    base = [sys.executable, *SYNTH, "--out", tmp_path / "run", "--resume", "auto"]
    first = Launched([*base, "--steps", 10**6])
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    second = run(*base, "--steps", 10, expect=2)
    (line,) = errors(second)
    assert f"belongs to process {first.process.pid} on" in line
    first.process.terminate()
    first.result(expect=75)
    run(*base, "--steps", max(losses(tmp_path / "run")) + 1)  # it is nobody's now
