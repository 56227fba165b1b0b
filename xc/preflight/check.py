"""The preflight check, `python train.py --check` with the flags of a run. It finds faults before the run meets them.

Every rank gathers facts about its host, and all ranks get the facts of all. Each finding is one line: what was found
and, if that is a fault, what to do. Lines are printed at once, so the last one shows where a network hangs. An error
on one rank becomes a finding, too, and no rank waits for that rank.
"""

from xc.preflight.hosts import (
    host_facts,
    report_gpus,
    report_interfaces,
    report_mpi,
    report_ranks,
    report_shared_memory,
    report_software,
    report_threads,
)
from xc.preflight.memory import report_memory
from xc.preflight.network import report_clocks, report_network, report_sums
from xc.preflight.report import Report
from xc.preflight.storage import report_data, report_run_folder, report_start_weights


def check(cfg, world):
    """Print all findings on rank 0. Collective.

    returns  (exit code, last line); the code is 2 if something is wrong

    Without --data or --out, the findings that need it are left out. The last line names them.
    """
    report = Report(world.rank == 0)
    if facts := report.run("host", host_facts, world):
        report.run("ranks", report_ranks, facts, cfg)
        report.run("MPI", report_mpi, world)
        report.run("software", report_software, world)
        report.run("threads", report_threads, facts)
        report.run("interfaces", report_interfaces, facts)
        report.run("shared memory", report_shared_memory, facts)
        report.run("GPUs", report_gpus, facts)
        report.run("sums", report_sums, world)
        report.run("network", report_network, world, facts)
        report.run("clocks", report_clocks, world)
        examples = cfg.data and report.run("data", report_data, cfg, world)
        if cfg.init and examples:
            report.run("start weights", report_start_weights, cfg, world, examples)
        plan = examples and report.run("memory", report_memory, cfg, world, facts, examples)
        if cfg.out:
            report.run("run folder", report_run_folder, cfg, world, plan)
    code, text = report.conclusion()
    left_out = ["data and memory (--data)"] * (not cfg.data) + ["run folder (--out)"] * (not cfg.out)
    return code, text + (f"; not checked: {', '.join(left_out)}" if left_out else "")
