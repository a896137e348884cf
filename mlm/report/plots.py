"""Curves and histograms of a page: matplotlib's SVG, in colours and a font that the page's style sheet decides."""

import io
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
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

WIDTH, HEIGHT = 400, 230  # in units that are about pixels on a page
MOST_POINTS = 250  # of a curve; more are averaged, as the picture shows no more and the page must stay small
MOST_DOTS = 20  # of a curve; more would run together
ROUND_STEPS = [1, 2, 5, 10]  # between ticks, times a power of ten

COLORS_OF_RUNS = ("one", "two", "three", "four")  # beside each other

# The names of the page's colours, each with the value that stands for it until the SVG is written: the page knows its
# own colours in light and in dark.
COLORS = {name: f"#00000{number}" for number, name in enumerate(("soft", "line", "faint", *COLORS_OF_RUNS), start=1)}


class Point(NamedTuple):
    """A measured value."""

    step: float
    value: float
    margin: float = 0.0  # half the width of its interval


class Curve(NamedTuple):
    """Values in the order of steps."""

    name: str  # in the legend; "" where it needs none
    color: str  # of `COLORS`
    points: list[Point]
    style: str = "solid"  # a word that matplotlib and CSS both know


class Chart(NamedTuple):
    """A picture with its title and the curves of its legend."""

    title: str
    svg: Markup
    legend: list[Curve]


def draw_curves(
    title: str,
    curves: Sequence[Curve],
    logarithmic: bool = False,
    label: Callable[[float], str] = "{:,.10g}".format,
) -> Chart | None:
    """Draws curves over steps. Returns None where there is nothing to draw.

    label: writes a value of the vertical axis.
    """
    drawn = [(curve, array) for curve in curves if (array := _drawable(curve.points, logarithmic)).size]
    if not drawn:
        return None
    figure, axes = _new_figure()
    for curve, (steps, values, _) in drawn:
        marker = "o" if curve.style == "solid" and len(steps) <= MOST_DOTS else ""
        color = COLORS[curve.color]
        axes.plot(steps, values, color=color, linestyle=curve.style, linewidth=1.8, marker=marker, clip_on=False)
    _scale(axes, logarithmic, label)
    for curve, (steps, values, margins) in drawn:  # a wide interval must not squeeze the curve
        if margins.any():
            axes.fill_between(steps, values - margins, values + margins, color=COLORS[curve.color], alpha=0.3, lw=0)
    ends = [(curve.name, *(label(float(f"{values[i]:.4g}")) for i in (0, -1))) for curve, (_, values, _) in drawn]
    description = ", ".join(f"{name} from {first} to {last}" for name, first, last in ends)
    return Chart(title, _to_svg(figure, title, description), [curve for curve, _ in drawn if curve.name])


def draw_histogram(title: str, counts: list[tuple[str, int]]) -> Chart:
    """Draws a bar for each label and its count of lines; the last bar is set apart by its colour."""
    figure, axes = _new_figure()
    last = len(counts) - 1
    axes.bar(range(last + 1), [count for _, count in counts], color=[COLORS["one"]] * last + [COLORS["two"]])
    labelled = [*range(0, last - 3, 4), last]  # not every label has room
    axes.set_xticks(labelled, [counts[index][0] for index in labelled])
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=ROUND_STEPS, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    description = ", ".join(f"{label}: {count:,} lines" for label, count in counts if count)
    return Chart(title, _to_svg(figure, title, description), [])


def _drawable(points: list[Point], logarithmic: bool) -> np.ndarray:
    """Returns (3, points): the steps, values and margins that a picture can show, at most `MOST_POINTS`. Of more points
    it keeps the first and the last, and means of neighbours between."""
    array = np.array(points, dtype=float).reshape(-1, 3)
    array[~(np.abs(array) < 1e100)] = np.nan  # axes cannot be computed for what is larger
    array = array[array[:, 1] > (1e-100 if logarithmic else -np.inf)]
    array = np.nan_to_num(array)  # a margin that is not finite is not drawn
    if len(array) > MOST_POINTS:
        means = [part.mean(axis=0) for part in np.array_split(array[1:-1], MOST_POINTS - 2)]
        array = np.stack([array[0], *means, array[-1]])
    return array.T


def _new_figure() -> tuple[Figure, Axes]:
    """Returns a figure without frame and background, and its axes, with room for labels at the left and below."""
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), frameon=False)  # SVG's unit is a 72nd of an inch
    axes = figure.add_axes((0.15, 0.11, 0.77, 0.85), frameon=False)
    axes.grid(axis="y", color=COLORS["line"])
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=8, labelsize=13, labelcolor=COLORS["soft"])
    return figure, axes


def _scale(axes: Axes, logarithmic: bool, label: Callable[[float], str]) -> None:
    """Sets the axes for what they show by now: limits, ticks at round values, labels."""
    last_step = max(1, axes.dataLim.x1)
    axes.set_xlim(0, last_step)
    axes.xaxis.set_major_locator(MaxNLocator(5 if last_step < 10_000 else 4, steps=ROUND_STEPS, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    locator: Locator = MaxNLocator(5, steps=ROUND_STEPS)
    if logarithmic:
        axes.set_yscale("log")
        low, high = np.log10(axes.get_ylim())
        if high - low > 1:
            locator = LogLocator(subs=(1.0,) if high - low > 3 else (1.0, 2.0, 5.0))
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(lambda value, _: label(value))
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_autoscaley_on(False)  # what is drawn from now on is cut off
    if not logarithmic and 0 < low < high - low:
        axes.set_ylim(bottom=0)


def _to_svg(figure: Figure, title: str, description: str) -> Markup:
    """Writes a picture as an element of a page, coloured by the page's variables, and described for who cannot see it.

    Text stays text, measured by the font that matplotlib brings along. Ids are hashes salted with the title, so that
    pictures of one page share none.
    """
    written = io.StringIO()
    options: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": title, "font.sans-serif": "DejaVu Sans"}
    with matplotlib.rc_context(options):
        figure.savefig(written, format="svg")
    _, group, rest = written.getvalue().partition("<g ")
    drawing = re.sub(r'<g id="[^"]*"', "<g", group + rest)
    for name, color in COLORS.items():
        drawing = drawing.replace(color, f"var(--{name})")
    start = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}: {}">')
    return start.format(WIDTH, HEIGHT, title, description) + Markup(drawing)
