"""Real launches: ranks as processes of mpirun or horovodrun, with a time limit and their output on failure."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# For ranks that share this machine's cores.
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none"}


@contextmanager
def default_signals():
    """What is started in this context ends by these signals, even where this process was started to ignore them, as
    `nohup make test &` starts it. A child inherits that a signal is ignored."""
    ignored = [number for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1, signal.SIGTERM)
               if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


class Launched:
    """A command that runs in the checkout."""

    def __init__(self, command, env=None):
        self._command = [str(part) for part in command]
        with default_signals():
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=os.environ | ENVIRONMENT | (env or {}), text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    def result(self, seconds=250, expect=0):
        """Wait for its end; returns the CompletedProcess.

        A command that outlasts its time is killed with all its children, and fails like one with another exit code than
        expected (None: any), with its output.
        """
        try:
            out, err = self.process.communicate(timeout=seconds)
            late = False
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            out, err = self.process.communicate()
            late = True
        code = self.process.returncode
        text = f"{' '.join(self._command)}\n--- stdout\n{out[-4000:]}\n--- stderr\n{err[-4000:]}"
        assert not late, f"no end after {seconds} s: {text}"
        assert expect is None or code == expect, f"exit code {code}, not {expect}: {text}"
        return subprocess.CompletedProcess(self._command, code, out, err)


def run(*command, seconds=250, expect=0, env=None):
    """Run a command in the checkout to its end: see `Launched`."""
    return Launched(command, env).result(seconds, expect)


def mpirun(ranks, *arguments, **options):
    return run("mpirun", "--oversubscribe", "-np", ranks, sys.executable, *arguments, **options)


def horovodrun(ranks, *arguments, **options):
    return run("horovodrun", "-np", ranks, "-H", f"localhost:{ranks}", sys.executable, *arguments, **options)


def losses(folder):
    """{step: loss} of a run folder."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def accuracies(folder):
    """(step, top1, top5) of every evaluation of a run folder."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["top1"], line["top5"]) for line in lines if "top1" in line]


def last_json(process):
    """The object that train.py prints last; horovodrun writes its prefix before it, and at times behind it too."""
    line = [line for line in process.stdout.splitlines() if "{" in line][-1]
    return json.JSONDecoder().raw_decode(line[line.index("{") :])[0]


def error_lines(process):
    return [line for line in process.stderr.splitlines() if "error:" in line]
