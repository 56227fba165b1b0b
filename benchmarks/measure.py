"""What the benchmarks share: a median of repeats, memory over idle, a table for people and one JSON line at the end."""

import json
import os
import resource
import statistics
import sys
import time


def median_step(step, repeats, warmup):
    """(wall ms, CPU ms) of step(), medians over `repeats` calls after `warmup` ones. CPU: of all threads."""
    wall, cpu = [], []
    for i in range(warmup + repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        step()
        if i >= warmup:
            wall.append(1e3 * (time.perf_counter() - wall_start))
            cpu.append(1e3 * (time.process_time() - cpu_start))
    return statistics.median(wall), statistics.median(cpu)


def cpu_seconds():
    """CPU time of this process and of those that it has joined."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def rss_mb():
    """Resident memory of this process now, in MiB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def reset_peak():
    """Let the highest resident memory of this process (xc.run.metrics.peak_rss_mb) begin anew. Linux only."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def report(title, values):
    """Print one result: a line for every value, then all of them as one JSON object on the last line."""
    print(title)
    for name, value in values.items():
        print(f"  {name:24} {value:,.4g}" if isinstance(value, float) else f"  {name:24} {value}")
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}))
    sys.stdout.flush()
