"""Seconds from sbatch to the first step, on a Slurm of two virtual nodes that this starts itself (as root).

    python benchmarks/slurm_start.py [--nodes 2 --rounds 3]

first_step           the templates' own way: launcher chosen by trying, --check before training
first_step_bare      XC_LAUNCHER=mpirun XC_CHECK=0
mpirun_first_step    the same training by mpirun, without Slurm
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.measure import report
from tests.launch import ROOT, Launched
from tests.slurm_cluster import Cluster, missing

_FLAGS = ["--data", "synth:classes=300,dim=16,test=0", "--global-batch", "30", "--warmup", "0", "--steps", "3",
          "--log-steps", "1", "--device", "cpu"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if reason := missing():
        sys.exit(f"error: {reason}")
    result = {"nodes": args.nodes}
    with tempfile.TemporaryDirectory(dir=ROOT / "slurm/logs") as scratch, Cluster(ROOT) as cluster:
        def by_slurm(out, **env):
            number = cluster.submit("-N", args.nodes, "slurm/train.sbatch", *_FLAGS, "--out", out, env=env)
            return lambda: cluster.wait(number, 100)

        def by_mpirun(out):
            return Launched(["mpirun", "--oversubscribe", "-np", args.nodes, sys.executable, "train.py", *_FLAGS,
                             "--out", out]).result

        for name, start in {"first_step": by_slurm, "mpirun_first_step": by_mpirun, "first_step_bare":
                            lambda out: by_slurm(out, XC_LAUNCHER="mpirun", XC_CHECK="0")}.items():
            result[name] = statistics.median(
                first_step(start, Path(scratch) / f"{name}-{i}") for i in range(args.rounds))
    report(f"seconds to the first step, {args.nodes} ranks on as many nodes", result)


def first_step(start, out):
    begin, metrics = time.monotonic(), out / "metrics.jsonl"
    wait = start(out)
    while not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.02)
    seconds = time.monotonic() - begin
    wait()
    return seconds


if __name__ == "__main__":
    os.umask(0o022)
    main()
