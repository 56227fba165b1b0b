"""Fuzzing of every reader of untrusted files.

    python -m tests.fuzz TARGET --case FOLDER                       read one saved case, with the traceback if it fails
    python -m tests.fuzz TARGET --seed S --seconds T --work FOLDER  cases S, S + 1, …: a child of benchmarks/soak.py

A target's files are made by our own writers and are small. A case is a changed copy of them. Its reader may accept it,
or refuse it in one line with one of the target's clear errors. All else is a finding: another exception, too much
memory, a write outside of the case's folder `out`. Who watches the child sees a crash or a hang.

Changes are drawn from a `random.Random`. In tests/fuzz/test_fuzz.py it is hypothesis's, which shrinks what fails; in a
child it is a plain one, seeded with the case's number. atheris is not used: it sees the branches of our Python code
alone, not those of the C and Rust libraries that parse, and it ends at the first finding.
"""

import argparse
import random
import resource
import subprocess
import tempfile
import time
import traceback
from pathlib import Path

import torch

from tests.fuzz.case import Finding, attempt
from tests.fuzz.targets import TARGETS, Cases


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--case", type=Path, help="a saved case")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--seconds", type=float, default=10, help="how long to go on")
    parser.add_argument("--work", type=Path, help="a new folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        with tempfile.TemporaryDirectory() as folder:
            Cases(args.target, Path(folder) / "made")  # imports what makes folders of its own
            subprocess.run(["cp", "-a", args.case / "in", folder], check=True)
            print(attempt(TARGETS[args.target], Path(folder)))
        return
    cases, number, end = Cases(args.target, args.work), args.seed, time.monotonic() + args.seconds
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, resource.RLIM_INFINITY))
    while time.monotonic() < end:
        print(f"case {number}", flush=True)
        try:
            print(cases.run(random.Random(number)), flush=True)
        except Finding as finding:
            traceback.print_exc()
            print("finding " + " ".join(str(finding).split()), flush=True)
            return
        number += 1
    print("end", flush=True)


if __name__ == "__main__":
    main()
