"""A trace of some steps: what every rank computed and what was on the network meanwhile, in Chrome's trace format."""

import json
import time
from pathlib import Path

from xc.files import replace_text

LANES = {"step": 0, "compute": 1000, "network": 2000}  # number of the first thread; concurrent spans take the next
_SKIPPED = 10  # first steps of a run, which are slower


class Trace:
    """Records the Timer's phases and the world's traffic in `num_steps` steps and writes them to RUN/trace.json.

    ui.perfetto.dev and chrome://tracing draw the file, `python -m data_tools.show RUN/trace.json` sums it up. A span of
    traffic lasts from its start on this rank to the moment at which this rank has waited for it.
    """

    def __init__(self, num_steps, first_step, steps, run, world, timer):
        """steps: the least number of steps that the run has. The `at` of the last recorded step writes the file."""
        self._first = max(first_step, min(first_step + _SKIPPED, steps - num_steps))
        self._last = min(steps, self._first + num_steps) if num_steps else self._first
        self._path, self._world, self._timer = Path(run) / "trace.json", world, timer
        self._spans = []

    def at(self, step):
        """Called before every step and after the last one. Collective where recording begins and ends."""
        if self._first == self._last:
            return
        if step == self._first:
            self._world.all_ranks.all_gather_object(None)  # all ranks begin together, since clocks of hosts differ
            self._begun = self._step_begun = time.perf_counter()
            self._timer.on_end = lambda name, *span: self._spans.append(("compute", name, *span))
            self._world.traffic.on_end = lambda name, *span: self._spans.append(("network", name, *span))
        elif self._first < step <= self._last:
            now = time.perf_counter()
            self._spans.append(("step", f"step {step - 1}", self._step_begun, now))
            self._step_begun = now
        if step == self._last:
            self._timer.on_end = self._world.traffic.on_end = None
            # A transfer may have begun before the recording did, as the sum of the stop signals does.
            spans = [(lane, name, max(0.0, begin - self._begun), end - self._begun)
                     for lane, name, begin, end in self._spans]
            of_ranks = self._world.all_ranks.all_gather_object(spans)
            if self._world.rank == 0:
                events = [event for rank, spans in enumerate(of_ranks) for event in _events(rank, spans)]
                replace_text(self._path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def _events(rank, spans):
    """Chrome's trace events of a rank. A lane with concurrent spans gets several threads."""
    yield {"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}
    threads = {}  # (lane, number) -> end of its last span
    for lane, name, begin, end in sorted(spans, key=lambda span: span[2]):
        number = next(n for n in range(len(spans)) if threads.get((lane, n), 0.0) <= begin)
        threads[lane, number] = end
        yield {"ph": "X", "pid": rank, "tid": LANES[lane] + number, "cat": lane, "name": name, "ts": 1e6 * begin,
               "dur": 1e6 * (end - begin)}
    for lane, number in threads:
        yield {"ph": "M", "pid": rank, "tid": LANES[lane] + number, "name": "thread_name", "args": {"name": lane}}
