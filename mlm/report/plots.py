"""Curves and histograms of a page: matplotlib's SVG, in colours and a font that the page's style sheet decides."""

import io
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

os.environ["MPLBACKEND"] = "agg"  # nothing is shown; a notebook names a backend that may be missing here

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator, NullLocator

WIDTH, HEIGHT = 400, 230  # in units that are about pixels on a page
MOST_POINTS = 250  # of a curve; more are averaged, as the picture shows no more and the page must stay small
MOST_DOTS = 40  # of a curve that has them; more would run together
ROUND_STEPS = [1, 2, 5, 10]  # between ticks, times a power of ten

# The names of the page's colours, each with the value that stands for it until the SVG is written: the page knows its
# own colours in light and in dark.
COLORS = {
    name: f"#0000{number:02x}"
    for number, name in enumerate(("soft", "line", "faint", "one", "two", "three", "four"), start=1)
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "font.sans-serif": "DejaVu Sans",  # which matplotlib brings along, to measure text by
    "font.size": 13,
    "lines.linewidth": 1.8,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": COLORS["line"],
    "xtick.color": COLORS["soft"],
    "ytick.color": COLORS["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.major.pad": 7,
    "ytick.major.pad": 8,
    "axes.axisbelow": True,  # the grid lies below bars and curves
}


class Point(NamedTuple):
    """A measured value."""

    step: float
    value: float
    margin: float = 0.0  # half the width of its interval


class Curve(NamedTuple):
    """Measured values in the order of steps."""

    name: str  # in the legend; "" where it needs none
    color: str  # of `COLORS`
    points: list[Point]
    dots: bool = False


class Reference(NamedTuple):
    """A value to compare curves with, drawn across the whole picture."""

    name: str
    color: str  # of `COLORS`
    value: float
    style: str = "dashed"  # a word that matplotlib and CSS both know


class Chart(NamedTuple):
    """A picture with its title and legend."""

    title: str
    svg: Markup
    legend: list[tuple[str, str, str]]  # name, colour, style of the line


@matplotlib.rc_context(STYLE)
def draw_curves(
    title: str,
    description: str,
    curves: Sequence[Curve],
    references: Sequence[Reference] = (),
    logarithmic: bool = False,
    label: Callable[[float], str] = "{:,.10g}".format,
) -> Chart | None:
    """Draws curves over steps. Returns None where there is nothing to draw.

    description: what the picture shows, for who cannot see it. label: writes a value of the vertical axis.
    """
    arrays = [_drawable(curve.points, logarithmic) for curve in curves]
    drawn = [(curve, array) for curve, array in zip(curves, arrays, strict=True) if array.size]
    references = [each for each in references if _is_drawable(each.value, logarithmic)]
    if not drawn:
        return None
    figure, axes = _new_figure()
    for curve, (steps, values, _) in drawn:
        marker = "o" if curve.dots and len(steps) <= MOST_DOTS else ""
        axes.plot(steps, values, color=COLORS[curve.color], marker=marker, clip_on=False)
    for reference in references:
        axes.axhline(reference.value, color=COLORS[reference.color], linestyle=reference.style)
    _scale(axes, logarithmic, label)
    for curve, (steps, values, margins) in drawn:  # a wide interval must not squeeze the curve
        if margins.any():
            axes.fill_between(steps, values - margins, values + margins, color=COLORS[curve.color], alpha=0.3, lw=0)
    legend = [(curve.name, curve.color, "solid") for curve, _ in drawn if curve.name]
    legend += [(each.name, each.color, each.style) for each in references]
    return Chart(title, _to_svg(figure, title, description), legend)


@matplotlib.rc_context(STYLE)
def draw_histogram(title: str, description: str, counts: list[tuple[str, int]]) -> Chart:
    """Draws a bar for each label and its count; the last bar is set apart by its colour."""
    figure, axes = _new_figure()
    colors = [COLORS["one"]] * (len(counts) - 1) + [COLORS["two"]]
    axes.bar(range(len(counts)), [count for _, count in counts], color=colors)
    last = len(counts) - 1
    labelled = [*range(0, last - 3, 4), last]  # not every label has room
    axes.set_xticks(labelled, [counts[index][0] for index in labelled])
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=ROUND_STEPS, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return Chart(title, _to_svg(figure, title, description), [])


def _drawable(points: list[Point], logarithmic: bool) -> np.ndarray:
    """Returns (3, points): the steps, values and margins that a picture can show, at most `MOST_POINTS`.

    Of more points it keeps the first and the last, and means of neighbours between.
    """
    array = np.array(points, dtype=float).reshape(-1, 3)
    array = array[_is_drawable(array[:, 1], logarithmic)]
    array[~_is_drawable(array[:, 2], False), 2] = 0
    if len(array) > MOST_POINTS:
        means = [part.mean(axis=0) for part in np.array_split(array[1:-1], MOST_POINTS - 2)]
        array = np.stack([array[0], *means, array[-1]])
    return array.T


def _is_drawable(values: Any, logarithmic: bool) -> Any:
    """Whether numbers are finite, of a size that axes can be computed for, and above 0 where the axis needs it."""
    return (np.abs(values) < 1e100) & (values > (1e-100 if logarithmic else -np.inf))


def _new_figure() -> tuple[Figure, Axes]:
    """Returns a figure without frame and background, and its axes, with room for labels at the left and below."""
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), frameon=False)  # SVG's unit is a 72nd of an inch
    return figure, figure.add_axes((0.15, 0.11, 0.77, 0.85), frameon=False)


def _scale(axes: Axes, logarithmic: bool, label: Callable[[float], str]) -> None:
    """Sets the axes for what they show by now: limits, ticks at round values, labels."""
    last_step = max(1, axes.dataLim.x1)
    axes.set_xlim(0, last_step)
    axes.xaxis.set_major_locator(MaxNLocator(5 if last_step < 10_000 else 4, steps=ROUND_STEPS, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    locator: Locator = MaxNLocator(5, steps=ROUND_STEPS)
    if logarithmic:
        axes.set_yscale("log")
        low, high = map(math.log10, axes.get_ylim())
        if high - low > 1:
            locator = LogLocator(subs=(1.0,) if high - low > 3 else (1.0, 2.0, 5.0))
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(lambda value, _: label(value))
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_autoscaley_on(False)  # what is drawn from now on is cut off
    if not logarithmic and 0 < low < high - low:
        axes.set_ylim(bottom=0)


def _to_svg(figure: Figure, title: str, description: str) -> Markup:
    """Writes a picture as an element of a page, coloured by the page's variables.

    Its ids are hashes salted with the title, so that pictures of one page share none.
    """
    written = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):
        figure.savefig(written, format="svg")
    _, group, rest = written.getvalue().partition("<g ")
    drawing = re.sub(r'<g id="[^"]*"', "<g", group + rest)
    for name, color in COLORS.items():
        drawing = drawing.replace(color, f"var(--{name})")
    start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, description)
    return start + Markup(drawing)
