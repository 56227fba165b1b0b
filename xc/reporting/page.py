"""The page: one HTML file without scripts and without anything that is loaded. The template escapes all texts."""

import itertools
import math
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup, escape

from xc.errors import one_line
from xc.reporting.curves import COLOURS, POINTS, colour_of, is_dashed, plot, time_unit
from xc.reporting.runs import differing_settings, number
from xc.train.class_scores import FREQUENCIES

MOST_BYTES = 10_000_000  # of the page
_LONGEST = 120  # characters of a text from outside: a class name may have kilobytes
_LAUNCHES = 20  # that are listed
_NONE = "–"


class Page:
    """The page about some Runs. The same input gives the same bytes."""

    def __init__(self, runs):
        templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
            trim_blocks=True, lstrip_blocks=True, finalize=lambda value: short(value) if type(value) is str else value)
        templates.filters |= {"percent": percent, "seconds": seconds, "count": count, "decimals": decimals,
                              "sentence": sentence}
        self._template, self._runs = templates.get_template("page.html"), runs
        self._marks = [{"colour": colour_of(place), "dashed": is_dashed(place), "name": run.name}
                       for place, run in enumerate(runs)]
        self._parts = {
            "marks": self._marks, "summary": [_summary(run) for run in runs], "retrieval": _retrieval(runs),
            "settings": _settings(runs), "curves": _curves(runs), "phases": _phases(runs),
            "frequencies": _frequencies(runs), "launches": _LAUNCHES, "dash": _NONE, "points": POINTS,
            "megabytes": MOST_BYTES // 10**6}

    def html(self, sections):
        """The page as bytes of UTF-8.

        sections  for each run what `Look.shown` gives, or the text that says why there is none
        """
        runs = list(zip(self._runs, self._marks, sections, strict=True))
        return self._template.render(self._parts, runs=runs).encode("utf-8", "backslashreplace")


def short(text):
    """A text in one line, without its middle where it is long."""
    text = one_line(text)
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[: half - 1]} … {text[2 - half :]}"


def sentence(text):
    """A text of ours, which may quote others, in one line; its end says what to do."""
    return escape(one_line(text))


def percent(share):
    return f"{100 * share:.2f} %" if _finite(share) else _NONE


def seconds(value):
    """A time with its unit."""
    if not _finite(value):
        return _NONE
    if value < 100:
        return f"{value:.3g} s" if value >= 1 else f"{1e3 * value:.3g} ms"
    return f"{value / 60:.1f} min" if value < 6000 else f"{value / 3600:.1f} h"


def count(value):
    return f"{value:,.0f}" if _finite(value) else _NONE


def decimals(value, digits=3):
    return f"{value:.{digits}f}" if _finite(value) else _NONE


def _finite(value):
    return value is not None and math.isfinite(value)


def _summary(run):
    """The row of a run in the first table."""
    last = {split: (run.of_split(split) or [None])[-1] for split in ("val", "test")}
    vals = [one for one in run.of_split("val") if math.isfinite(one.top1)]
    best = max(vals, key=lambda one: one.top1, default=None)
    time = run.seconds
    return {"state": _state(run), "val": last["val"], "test": last["test"], "best": best,
            "steps": max([run.steps[-1] if run.steps else 0, *(one.step for one in run.evaluations)]),
            "loss": run.losses[-1] if run.losses else None, "time": time[-1] if time else None,
            "rate": _mean_rate(run), "memory": max((one for one in run.memory if _finite(one)), default=None),
            "ranks": _ranks(run)}


def _retrieval(runs):
    """[(place of the run, evaluation, whether it is the best of val)] of the last evaluations by retrieval."""
    rows = []
    for place, run in enumerate(runs):
        tests, vals = ([one for one in run.of_split(split) if one.retrieval] for split in ("test", "val"))
        best = max(vals, key=lambda one: one.retrieval.get("recall_at_1", -1), default=None)
        rows += [(place, one, False) for one in (*tests[-1:], *vals[-1:])] + [(place, best, True)] * bool(vals)
    return rows


def _state(run):
    """How far the newest checkpoint is."""
    if run.checkpoint is None:
        return "checkpoint damaged" if run.fault else "no checkpoint"
    done = number(run.checkpoint.get("examples")) / run.planned if run.planned else math.nan
    if not math.isfinite(done):
        return "unknown"
    return "finished" if done >= 1 else f"{math.floor(100 * done)} % saved"


def _mean_rate(run):
    """Images per second over all lines; each line counts by its time."""
    time = run.seconds
    spans = [after - before for before, after in itertools.pairwise([0.0, *time])]
    pairs = [(rate, span) for rate, span in zip(run.rates, spans, strict=True) if _finite(rate)]
    total = sum(span for _, span in pairs)
    return sum(rate * span for rate, span in pairs) / total if total else None


def _ranks(run):
    """The ranks of the launches in their order, as "4" or "4, 8"; repetitions are left out."""
    found = [str(launch.get("ranks", "?")) for launch in run.launches]
    return ", ".join(one for place, one in enumerate(found) if not place or one != found[place - 1]) or _NONE


def _settings(runs):
    def text(value):
        return _NONE if value is None else '""' if value == "" else str(value)

    return [{"flag": "--" + name.replace("_", "-"), "default": text(default), "values": [*map(text, values)],
             "differs": differs} for name, default, values, differs in differing_settings(runs)]


def _curves(runs):
    """[(title, SVG)] of the plots that have a point."""
    times = [run.seconds for run in runs]
    size, unit = time_unit(max((time[-1] for time in times if time), default=0))
    loss, accuracy, retrieval = [], [], []
    for place, (run, time) in enumerate(zip(runs, times, strict=True)):
        loss.append((place, run.steps, [one / size for one in time], run.losses))
        found = run.of_split(run.split)
        steps = [one.step for one in found]
        at = [_time_at(step, run.steps, time) / size for step in steps]
        accuracy += [(place, steps, at, [one.top1 for one in found], False),
                     (place, steps, at, [one.top5 for one in found], True)]
        retrieval += [(place, steps, at, [one.retrieval.get(name, math.nan) for one in found], name == "map")
                      for name in ("recall_at_1", "map")]
    plots = [
        ("Loss by steps", plot([(place, x, y, False) for place, x, _, y in loss], "steps", "loss")),
        ("Loss by time", plot([(place, x, y, False) for place, _, x, y in loss], f"{unit} of training", "loss")),
        ("Accuracy by steps", plot([(p, x, y, thin) for p, x, _, y, thin in accuracy], "steps", "accuracy", True)),
        ("Accuracy by time", plot([(p, x, y, thin) for p, _, x, y, thin in accuracy], f"{unit} of training", "accuracy",
                                  True)),
        ("Retrieval by steps", plot([(p, x, y, thin) for p, x, _, y, thin in retrieval], "steps", "recall@1", True)),
        ("Retrieval by time", plot([(p, x, y, thin) for p, _, x, y, thin in retrieval], f"{unit} of training",
                                   "recall@1", True))]
    return [(title, Markup(svg)) for title, svg in plots if svg]


def _time_at(step, steps, time):
    """Seconds of training until a step, between the lines; nan without lines."""
    return float(np.interp(step, [0, *steps], [0.0, *time])) if steps else math.nan


def _phases(runs):
    """Names and colours of the phases, and for each run the seconds of each and its bar's width in percent of the
    longest."""
    found = [run.phase_seconds for run in runs]
    names = list(dict.fromkeys(name for one in found for name in one))
    longest = max((sum(one.values()) for one in found), default=0)
    colours = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    bars = [{"total": sum(one.values()),
             "parts": [{"name": name, "colour": colours[name], "seconds": one.get(name, 0.0),
                        "share": one.get(name, 0.0) / sum(one.values()),
                        "width": round(100 * one.get(name, 0.0) / longest, 3)} for name in names]} if sum(one.values())
            else None for one in found]
    return {"names": [(name, colours[name]) for name in names], "bars": bars}


def _frequencies(runs):
    """Rows (frequency, for each run the share and the number of examples) of the last evaluation of test, else of the
    last one of val; and which evaluation that is."""
    chosen = []
    for run in runs:
        with_table = [one for one in run.evaluations if one.top1_by_frequency]
        tests = [one for one in with_table if one.split == "test"]
        chosen.append((tests or with_table or [None])[-1])
    rows = [(name, [(one.top1_by_frequency.get(name), one.examples_by_frequency.get(name)) if one else (None, None)
                    for one in chosen])
            for name in FREQUENCIES if any(one and name in one.top1_by_frequency for one in chosen)]
    return {"chosen": chosen, "rows": rows}
