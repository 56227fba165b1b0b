"""What a run folder says of its run: settings, launches, metrics, how far it is.

Runs of other versions lack keys or have others, and a killed run may leave half a line. What cannot be read is counted.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from xc.checkpoint.layout import folders, read_meta
from xc.config import Config
from xc.errors import UserError
from xc.optim.schedule import Schedule
from xc.train.class_scores import FREQUENCIES

RETRIEVAL = ("recall_at_1", "recall_at_10", "recall_at_100", "map", "queries")  # scores of --eval retrieval
_NO_PHASES = ("waited_ms",)  # communication that a step waited for, in whatever phase it did
_MOST_STEPS = 2**53
_LARGEST = 2**128


@dataclass(frozen=True)
class Evaluation:
    """One evaluation: step, split, shares of examples, and {frequency: share}, {frequency: examples} by class
    frequency. nan: not recorded.

    retrieval  {name: number} of RETRIEVAL; empty where the run was not evaluated so
    """

    step: int
    split: str
    top1: float
    top5: float
    examples: float
    class_mean: float
    top1_by_frequency: dict
    examples_by_frequency: dict
    retrieval: dict
    scored_step: int


@dataclass
class Run:
    """A run folder as it was found.

    settings     {name: value} of config.json
    launches     objects of launches.jsonl, oldest first
    steps        (n) of the lines of training, ascending; of the same lines:
    losses, rates, memory, phases
                 mean loss since the line before; images per second; MiB; {phase: milliseconds of a step}
    evaluations  list of Evaluation, in the order of their steps
    unreadable   lines that are no JSON object with a step
    rewound      lines of steps that a later line goes back behind
    rollbacks    times that the run went back after something was not finite
    checkpoint   meta of the newest checkpoint; None where there is none, or `fault` says what is wrong with it
    planned      examples of the whole run; None where they are not known
    """

    folder: Path
    name: str
    settings: dict
    launches: list
    steps: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    rates: list = field(default_factory=list)
    memory: list = field(default_factory=list)
    phases: list = field(default_factory=list)
    evaluations: list = field(default_factory=list)
    unreadable: int = 0
    rewound: int = 0
    rollbacks: int = 0
    checkpoint: dict | None = None
    fault: str = ""
    planned: int | None = None

    def of_split(self, split):
        """The Evaluations on a split, by ascending step."""
        return [one for one in self.evaluations if one.split == split]

    @property
    def split(self):
        """Name of the split that was evaluated while training; "" without evaluations."""
        return "val" if self.of_split("val") else "test" if self.of_split("test") else ""

    @property
    def seconds(self):
        """(n) seconds of training until each line: the milliseconds of its phases, times the steps since the line
        before."""
        found, total, before = [], 0.0, 0
        for step, phases in zip(self.steps, self.phases, strict=True):
            total += sum(phases.values()) / 1e3 * (step - before)
            found.append(total)
            before = step
        return found

    @property
    def phase_seconds(self):
        """{phase: seconds of the whole run}, in the order of a step."""
        found, before = {}, 0
        for step, phases in zip(self.steps, self.phases, strict=True):
            for phase, milliseconds in phases.items():
                found[phase] = found.get(phase, 0.0) + milliseconds / 1e3 * (step - before)
            before = step
        return found


def read_runs(paths):
    """[Run] of run folders. UserError where one is none, or comes twice."""
    places = [Path(path).resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{path} is given twice: give each run once")
    names = [place.name for place in places]
    return [_read(Path(path), name if names.count(name) == 1 else str(path))
            for path, name in zip(paths, names, strict=True)]


def _read(folder, name):
    run = Run(folder, name, _settings_of(folder), _objects(folder / "launches.jsonl")[0])
    lines, run.unreadable = _objects(folder / "metrics.jsonl", _kept)
    lines, unordered = [line for line in lines if line], sum(line is None for line in lines)
    run.unreadable += unordered
    lines, run.rewound = _without_rewound(lines)
    for line in lines:
        if "loss" in line:
            run.steps.append(line["step"])
            run.losses.append(line["loss"])
            run.rates.append(line["rate"])
            run.memory.append(line["memory"])
            run.phases.append(line["phases"])
        elif "evaluation" in line:
            run.evaluations.append(line["evaluation"])
    run.rollbacks = _rollbacks_of(folder)
    _add_checkpoint(run)
    return run


def _settings_of(folder):
    try:
        settings = json.loads((folder / "config.json").read_text())
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except (OSError, ValueError, RecursionError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{folder} is not the folder of a run (config.json: {reason}): name the --out of train.py"
                        ) from e
    return settings


def _objects(path, keep=lambda value: value):
    """([keep(object) of every line], number of lines that are no JSON object); none where there is no file."""
    found, bad = [], 0
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    value = None
                if isinstance(value, dict):
                    found.append(keep(value))
                else:
                    bad += 1
    except FileNotFoundError:
        return [], 0
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror}): make it readable") from e
    return found, bad


def _kept(line):
    """What the report needs of a line of metrics; None where it has no step."""
    step = line.get("step")
    if type(step) is not int or not 0 <= step < _MOST_STEPS:
        return None
    if "loss" in line:
        phases = {key.removesuffix("_ms"): value for key, value in _numbers(line).items()
                  if key.endswith("_ms") and key not in _NO_PHASES}
        return {"step": step, "loss": number(line["loss"]), "rate": number(line.get("images_per_second")),
                "memory": number(line.get("peak_rss_mb")), "phases": phases}
    split = line.get("split", "test" if "top1" in line else None)  # a line of older code has no split
    if split not in ("val", "test"):
        return {"step": step}
    prefix = "" if split == "test" else f"{split}_"
    top1, top5, examples, class_mean = (number(line.get(prefix + key)) for key in
                                        ("top1", "top5", "examples", "top1_class_mean"))
    by_frequency = [{name: table[name] for name in FREQUENCIES if name in table} for table in
                    (_numbers(line.get(prefix + key)) for key in ("top1_by_frequency", "examples_by_frequency"))]
    retrieval = _numbers({name: line.get(prefix + name) for name in RETRIEVAL})
    scored = line.get("scored_step")
    return {"step": step, "evaluation": Evaluation(step, split, top1, top5, examples, class_mean, *by_frequency,
                                                   retrieval, scored if type(scored) is int else step)}


def number(value):
    """As float; nan where it is no number, or one beyond float32: no run logs it, and plots overflow."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
    return float(value) if known else math.nan


def _numbers(table):
    """{name: float} of the finite numbers of a dict; empty where it is none."""
    found = {key: number(value) for key, value in table.items()} if isinstance(table, dict) else {}
    return {key: value for key, value in found.items() if math.isfinite(value)}


def _without_rewound(lines):
    """(lines with ascending steps, number of the others): a run that goes back drops its later lines, but a copy that
    was made at another moment may have them."""
    kept = []
    for line in lines:
        while kept and kept[-1]["step"] > line["step"]:
            kept.pop()
        kept.append(line)
    return kept, len(lines) - len(kept)


def _rollbacks_of(folder):
    try:
        steps = json.loads((folder / "rollbacks.json").read_text())
    except (OSError, ValueError, RecursionError):
        return 0
    return len(steps) if isinstance(steps, list) else 0


def _add_checkpoint(run):
    found = folders(run.folder / "checkpoints")
    if not found:
        return
    try:
        run.checkpoint = read_meta(found[-1])
    except ValueError as e:
        run.fault = str(e)
        return
    known = {f.name for f in dataclasses.fields(Config)}
    try:
        cfg = Config(**{name: value for name, value in run.settings.items() if name in known})
        run.planned = Schedule.of(cfg, run.checkpoint["num_records"], 1).examples
    except (ValueError, TypeError, KeyError, ArithmeticError):
        run.planned = None  # settings of another version


def differing_settings(runs):
    """[(name, default, [value of each run], whether they differ)] of the flags that differ between the runs or from the
    default. A value is None where config.json lacks it, and so is the default of a flag that there is no more."""
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    unknown = sorted({name for run in runs for name in run.settings} - defaults.keys())
    rows = []
    for name in [*defaults, *unknown]:
        if name in ("out", "resume"):  # they say where a run is, not what it is
            continue
        values, default = [run.settings.get(name) for run in runs], defaults.get(name)
        differ = any(value != values[0] for value in values)
        if differ or any(value is not None and value != default for value in values):
            rows.append((name, default, values, differ))
    return rows
