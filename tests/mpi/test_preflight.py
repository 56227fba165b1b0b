"""train.py --check on real ranks: a line for every finding, and nothing is left behind."""

import re
import shutil
import subprocess
import sys

import pytest

from tests.support.launch import horovodrun, mpirun, run
from tests.support.training import SGD

pytestmark = [pytest.mark.mpi, pytest.mark.long]
DATA = ["--data", "synth:classes=300,dim=16,test=50", "--feature-dim", 16, "--global-batch", 30]
PLACES = ["ranks", "MPI", "software", "threads", "interfaces", "shared memory", "GPUs", "sums", "network",
          "clocks"]
OF_A_RUN = ["data", "evaluation", "memory", "run folder", "checkpoints"]


def findings(process):
    """{name: [(state, text), …]} of the table, in its order."""
    found = {}
    for line in process.stdout.splitlines():
        line = re.sub(r"\[\d+,\d+\]<stdout>:", "", line)  # horovodrun writes it in front, at times behind
        state, name, text = line[:8].strip(), line[9:23].strip(), line[24:]
        if state in ("ok", "warning", "wrong"):
            assert text and (state != "warning" or " -> " in text), line
            found.setdefault(name, []).append((state, text))
    return found


def test_an_installation_alone():
    process = run(sys.executable, "train.py", "--check")
    assert list(findings(process)) == PLACES and {state for (state, _), in findings(process).values()} == {"ok"}
    assert process.stdout.splitlines()[-1] == \
        "0 wrong, 0 with a warning; not checked: data and memory (--data), run folder (--out)"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_run_that_will_do(ranks, tmp_path):
    out = tmp_path / "not" / "there" / "run"
    process = mpirun(ranks, "train.py", *DATA, "--out", out, "--check")
    found = findings(process)
    assert list(found) == PLACES + OF_A_RUN and not list(tmp_path.iterdir())
    assert found["ranks"][0][1].startswith(f"{ranks} on ") and "thread level MULTIPLE" in found["MPI"][0][1]
    sums = "one rank: nothing to sum" if ranks == 1 else f"MPI and Horovod sum over {ranks} rank(s)"
    assert found["sums"] == [("ok", sums)]
    assert found["data"][0][1].startswith("300 classes, 3,000 + 50 examples (train + test)")
    assert process.stdout.splitlines()[-1].startswith("0 wrong, ")
    if ranks == 3:
        out.mkdir(parents=True)
        mpirun(ranks, "train.py", *DATA, "--out", out, "--check")
        assert not list(out.iterdir())


def test_horovodrun_does_not_take_it_for_check_build(tmp_path):
    for form in ["--check", *DATA], [*DATA, "--check"]:
        found = findings(horovodrun(2, "train.py", *form, "--out", tmp_path / "run"))
        assert set(found) == {*PLACES, *OF_A_RUN} and not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run(tmp_path):
    run(sys.executable, "train.py", *DATA, "--out", tmp_path / "run", "--steps", 2, "--warmup", 0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    found = findings(mpirun(2, "train.py", *DATA, "--out", tmp_path / "run", "--check", expect=2))
    assert found["run folder"][0][0] == "wrong" and "already holds a run" in found["run folder"][0][1]
    mpirun(2, "train.py", *DATA, "--out", tmp_path / "run", "--resume", "auto", "--check")
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path != tmp_path / "run"}
    assert after == {path: time for path, time in before.items() if path != tmp_path / "run"}


def namespaces():
    """Whether this process may mount for itself, as root may."""
    return bool(shutil.which("unshare")) and not subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode


@pytest.mark.skipif(not namespaces(), reason="needs root, to mount")
def test_a_folder_that_is_not_shared(tmp_path):
    """Rank 1 has another file system there, as on a host of its own."""
    own = [sys.executable, "train.py", *DATA, "--out", tmp_path / "run", "--check"]
    there = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', tmp_path]
    process = run("mpirun", "--oversubscribe", "-np", 1, *own, ":", "-np", 1, *there, *own, expect=2)
    (state, found), = findings(process)["run folder"]
    assert state == "wrong" and "rank 1 does not see what rank 0 writes" in found and "all hosts share" in found
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not namespaces(), reason="needs root, to mount")
@pytest.mark.parametrize("options, text", [("ro", "Read-only file system"), ("size=20m", "No space left")])
def test_a_folder_that_takes_nothing(options, text, tmp_path):
    script = f'mount -t tmpfs -o {options} none "$0" && "$@"; code=$?; ls -A "$0" >&2; exit $code'
    process = run("unshare", "-m", "sh", "-c", script, tmp_path, sys.executable, "train.py", *DATA, "--out",
                  tmp_path / "run", "--check", expect=2)
    (state, found), = findings(process)["run folder"]
    assert state == "wrong" and text in found and not process.stderr


def test_hosts_of_different_sizes():
    def on(hosts, *flags, **options):
        command = []
        for host in hosts:
            command += [":"] * bool(command) + ["-np", 1, "-x", f"XC_HOST={host}", sys.executable]
            command += ["train.py", "--check", *flags]
        return findings(run("mpirun", "--oversubscribe", *command, **options))

    found = on("aab")
    (state, text), = found["ranks"]
    assert state == "warning" and "3 on a (2), b (1)" in text and "same number" in text
    assert len(found["threads"]) == len(found["shared memory"]) == len(found["network"]) == 2
    assert on("aab", *SGD, "--exchange", "dgc-hier", expect=2)["ranks"][0][0] == "wrong"
    assert on("ab")["ranks"][0][0] == "ok"
