"""Metrics of a run: times of phases, JSON lines, TensorBoard, and a progress bar on a terminal or plain lines in a
log."""

import json
import math
import resource
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from xc.files import replace_text
from xc.run import watchdog


class Timer:
    """Wall time of the training steps by phase. Time outside of all phases (evaluation, checkpoints) is not counted.

    On a GPU a phase ends when its work is queued, not when it is done.
    """

    def __init__(self):
        self.seconds, self.examples = 0.0, 0  # of all intervals taken
        self.on_end = None  # called with phase, begin, end (seconds of time.perf_counter)
        self._phases = {}

    @contextmanager
    def __call__(self, phase):
        watchdog.heartbeat(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self._phases[phase] = self._phases.get(phase, 0.0) + end - start
            if self.on_end:
                self.on_end(phase, start, end)

    @property
    def total(self):
        """Seconds of all phases so far."""
        return self.seconds + sum(self._phases.values())

    @property
    def images_per_second(self):
        """Over all intervals that were taken, of all ranks; 0 before the first one."""
        return self.examples / self.seconds if self.seconds else 0.0

    def take(self, num_steps, num_examples):
        """Metrics of the interval since the last call, which had so many steps and examples."""
        seconds, phases, self._phases = sum(self._phases.values()), self._phases, {}
        self.seconds += seconds
        self.examples += num_examples
        return {"images_per_second": num_examples / seconds,
                **{f"{phase}_ms": 1e3 * s / num_steps for phase, s in phases.items()}}


class Metrics:
    """Writes the metrics on rank 0; on other ranks all calls do nothing.

    folder      the run folder: gets metrics.jsonl (one object a line) and tensorboard/
    progress    where this launch begins. Lines of later steps, written by a launch that failed, are dropped
    num_steps   of the whole run; None where it is not known
    examples    of the whole run, for the progress bar
    """

    def __init__(self, folder, rank, progress, num_steps, examples):
        self._active = rank == 0
        if not self._active:
            return
        # Imported here, since they take seconds and only rank 0 needs them.
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self._path = Path(folder) / "metrics.jsonl"
        self._lines = _open_after(self._path, progress.step)
        self._board = SummaryWriter(Path(folder) / "tensorboard", purge_step=progress.step + bool(progress.step))
        self._terminal, self._warned = sys.stderr.isatty(), False
        self._bar = tqdm(initial=progress.examples, total=examples, unit="img", unit_scale=True,
                         disable=not self._terminal)
        self._of_all = f"/{num_steps}" if num_steps else ""

    def log(self, progress, **values):
        """Write one line of metrics: numbers, texts, or {name: number}. A value of None is left out."""
        if not self._active:
            return
        step, values = progress.step, {name: value for name, value in values.items() if value is not None}
        with self._tolerating_full_disk(f"step {step}"):
            self._lines.write(_line(step, values) + "\n")
        with self._tolerating_full_disk(f"step {step}"):
            for name, value in _numbers(values):
                self._board.add_scalar(name, value, step)
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if name in _SHOWN)
        if self._terminal:
            self._bar.update(progress.examples - self._bar.n)
            if "split" in values:
                self._bar.write(f"step {step}  {text}", file=sys.stderr)
            else:
                self._bar.set_postfix_str(text)
        else:
            with self._tolerating_full_disk(f"step {step}"):
                print(f"step {step}{self._of_all}  {text}", flush=True)

    def log_once(self, progress, **values):
        """As `log`, unless an earlier launch wrote the same line."""
        if self._active and _line(progress.step, values) not in self._path.read_text(errors="replace").splitlines():
            self.log(progress, **values)

    @contextmanager
    def _tolerating_full_disk(self, when):
        """A full disk does not end the run. Lines that it did not take are written once it has room."""
        try:
            yield
        except OSError as e:
            if not self._warned:
                self._warned = True
                print(f"warning: metrics of {when} and later ones may be missing ({e}); training goes on",
                      file=sys.stderr, flush=True)

    def rewind(self, progress):
        """The run went back to this progress: drop the lines of later steps."""
        if self._active:
            self._lines.close()
            self._lines = _open_after(self._path, progress.step)
            self._bar.update(progress.examples - self._bar.n)

    def close(self):
        if self._active:
            self._bar.close()
            for file in self._board, self._lines:
                with self._tolerating_full_disk("the end"):
                    file.close()


def _open_after(path, step):
    """Open the metrics file to append, after dropping lines of steps after `step`; all lines where a run begins."""
    if path.exists():
        kept = [line for line in path.read_text(errors="replace").splitlines() if step and _step_of(line) <= step]
        replace_text(path, "".join(line + "\n" for line in kept))
    return open(path, "a", buffering=1)


def _step_of(line):
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf  # a killed run may leave half a line
    return step if isinstance(step, int) else math.inf


def _line(step, values):
    return json.dumps({"step": step} | {name: _rounded(v) for name, v in values.items() if v is not None})


def _numbers(values):
    """Yields (name, number); a number in {name: number} is named by both names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", number) for key, number in value.items())
        elif not isinstance(value, str):
            yield name, value


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(number) for name, number in value.items()}
    return float(f"{value:.7g}") if isinstance(value, float) else value


_SHOWN = {"loss", "lr", "global_batch", "images_per_second", "top1", "top5", "val_top1", "val_top5",
          "recall_at_1", "map", "val_recall_at_1", "val_map"}


def peak_rss_mb():
    """Highest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
