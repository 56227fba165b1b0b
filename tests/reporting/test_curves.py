"""Curves: as many points as fit, the means of neighbours; SVG that belongs into a page."""

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from xc.reporting import curves
from xc.reporting.curves import COLOURS, POINTS, plot, thinned, time_unit


@pytest.mark.parametrize("count", [0, 1, POINTS, POINTS + 1, 2 * POINTS + 7, 100_003])
def test_thinned_points_are_means_of_neighbours(count):
    y = np.random.default_rng(0).normal(size=count)
    x = np.arange(count, dtype=float)
    few_x, few_y = thinned(x, y)
    assert len(few_x) == len(few_y) == (count if count <= POINTS else -(-count // -(-count // POINTS))) <= POINTS
    size = max(1, -(-count // POINTS))
    groups = [slice(start, start + size) for start in range(0, count, size)]
    assert few_x == pytest.approx([x[group].mean() for group in groups])
    assert few_y == pytest.approx([y[group].mean() for group in groups])


def test_numbers_that_are_not_finite_are_left_out():
    x, y = thinned([1, 2, 3, math.nan, 5], [1, math.nan, 3, 4, math.inf])
    assert (x.tolist(), y.tolist()) == ([1, 3], [1, 3])


@pytest.mark.parametrize("most, unit", [(0, "seconds"), (119, "seconds"), (120, "minutes"), (7199, "minutes"),
                                        (7200, "hours"), (1e9, "hours")])
def test_units_of_time(most, unit):
    assert time_unit(most)[1] == unit


def test_a_plot_is_one_svg_without_names_of_its_own():
    svg = plot([(0, [1, 2, 3], [3, 2, 1], False), (11, [1, 2], [1, 2], False), (3, [], [], True)], "steps", "loss")
    tree = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert tree.tag == "svg" and svg.count("<svg") == 1 and "<style" not in svg and curves._INK not in svg
    assert "currentColor" in svg and COLOURS[0] in svg and COLOURS[1] in svg and COLOURS[3] not in svg
    texts = [element.text for element in tree.iter("text")]
    assert "steps" in texts and "loss" in texts
    assert svg == plot([(0, [1, 2, 3], [3, 2, 1], False), (11, [1, 2], [1, 2], False), (3, [], [], True)], "steps",
                       "loss")


def test_no_points_are_no_plot():
    assert plot([(0, [], [], False), (1, [1], [math.nan], False)], "steps", "loss") is None
    assert "<svg" in plot([(0, [5], [1], False)], "steps", "loss")


def test_a_single_point_of_a_thin_curve_is_hollow():
    """Two curves of a run have the same colour."""
    full, hollow = (plot([(0, [5], [1], thin)], "steps", "loss") for thin in (False, True))
    assert f"fill: {COLOURS[0]}" in full and f"fill: {COLOURS[0]}" not in hollow and COLOURS[0] in hollow
