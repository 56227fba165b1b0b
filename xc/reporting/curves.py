"""Curves as inline SVG. Text in them is numbers and our own labels; names of runs stand in the page's legend."""

import io
import re

import numpy as np

POINTS = 300  # most points of a curve; where there are more, a point is the mean of neighbours
COLOURS = ("#1f77b4", "#e8710a", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#d856a8", "#7f7f7f", "#a3a31b", "#17a2b8")
_INK = "#010203"  # drawn in the colour of the page's text, which may be light or dark
_STYLES = {"svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 10,
           "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
           "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False, "font.family": "sans-serif"}
UNITS = ((1, "seconds"), (60, "minutes"), (3600, "hours"))


def colour_of(place):
    """Colour of the run at this place."""
    return COLOURS[place % len(COLOURS)]


def is_dashed(place):
    """Whether the run's curves are dashed: colours repeat."""
    return place >= len(COLOURS)


def thinned(x, y):
    """(x, y), each at most POINTS numbers: means of neighbours, as many in every group but the last. Numbers that are
    not finite are left out."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) <= POINTS:
        return x, y
    starts = np.arange(0, len(x), -(-len(x) // POINTS))
    counts = np.diff(starts, append=len(x))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def time_unit(most):
    """(seconds of the unit, its name) for times up to so many seconds."""
    return next((unit for unit in reversed(UNITS) if most >= 2 * unit[0]), UNITS[0])


def plot(curves, x_label, y_label, percent=False):
    """An SVG of curves [(place of the run, x, y, is_thin)], or None where none has a point.

    percent  y are shares, and the axis has percent
    """
    curves = [(place, *thinned(x, y), thin) for place, x, y, thin in curves]
    if not any(len(x) for _, x, _, _ in curves):
        return None
    from matplotlib import rc_context  # their import takes a second; a bare Figure needs no display
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    with rc_context(_STYLES):
        figure = Figure(figsize=(6, 3.4), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        for place, x, y, thin in curves:
            style = ":" if thin else "--" if is_dashed(place) else "-"
            axes.plot(x, y, style, color=colour_of(place), linewidth=1.2 if thin else 1.8,
                      marker="o" if len(x) == 1 else None, markersize=4, fillstyle="none" if thin else "full")
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.18, color=_INK)
        if percent:
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _for_a_page(file.getvalue())


def _for_a_page(svg):
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', svg, count=1)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)  # it would hold for the whole page
    svg = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", svg)  # other plots of the page have the same ones
    return svg.replace(_INK, "currentColor").strip()
