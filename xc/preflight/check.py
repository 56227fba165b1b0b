"""The preflight check, `python train.py --check` with the flags of a run: faults that the run would find late.

Every rank looks at its own place, and all ranks see the list of these facts. Each finding is a line: what was found
and, where it is a fault, what to do. Lines are printed as they are found, so the last line tells where a network
hangs. An error on one rank becomes a line as well, and no rank waits for it.
"""

from xc.preflight.hosts import gpus, host_facts, interfaces, libraries, ranks, shared_memory, software, threads
from xc.preflight.memory import memory
from xc.preflight.network import agreement, clocks, network
from xc.preflight.report import Report
from xc.preflight.storage import data_set, run_folder


def check(cfg, world):
    """Print all findings on rank 0. Collective.

    returns  (exit code, last line); the code is 2 if something is wrong

    Findings that need --data or --out are left out, and named, where the flag is not given.
    """
    report = Report(world.rank == 0)
    if facts := report.look("host", host_facts, world):
        report.look("ranks", ranks, facts, cfg)
        report.look("MPI", libraries, world)
        report.look("software", software, world)
        report.look("threads", threads, facts)
        report.look("interfaces", interfaces, facts)
        report.look("shared memory", shared_memory, facts)
        report.look("GPUs", gpus, facts)
        report.look("agreement", agreement, world)
        report.look("network", network, world, facts)
        report.look("clocks", clocks, world)
        examples = cfg.data and report.look("data", data_set, cfg, world)
        plan = examples and report.look("memory", memory, cfg, world, facts, examples)
        if cfg.out:
            report.look("run folder", run_folder, cfg, world, plan)
    code, text = report.conclusion()
    left_out = ["data and memory (--data)"] * (not cfg.data) + ["run folder (--out)"] * (not cfg.out)
    return code, text + (f"; not looked at: {', '.join(left_out)}" if left_out else "")
