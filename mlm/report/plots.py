"""Curves and bars as the numbers that a page's inline SVG is drawn from: places in a picture, ticks, labels."""

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

os.environ["MPLBACKEND"] = "agg"  # nothing is shown; a notebook names a backend that may be missing here

from matplotlib.ticker import LogLocator, MaxNLocator


class Frame(NamedTuple):
    """The picture and its margins, in units that are about pixels on a page."""

    width: int = 400
    height: int = 230
    left: int = 54
    right: int = 14
    top: int = 12
    bottom: int = 32


FRAME = Frame()
INNER_WIDTH = FRAME.width - FRAME.left - FRAME.right
INNER_HEIGHT = FRAME.height - FRAME.top - FRAME.bottom
MOST_POINTS = 250  # of a curve; more are averaged, as the picture shows no more and the page must stay small


class Point(NamedTuple):
    """A measured value."""

    step: float
    value: float
    error: float = 0.0  # half the length of its bar


class Curve(NamedTuple):
    """Measured values in the order of steps; `style` is a class of the page's style sheet."""

    name: str
    style: str
    points: list[Point]
    dots: bool = False


class Reference(NamedTuple):
    """A value to compare curves with, drawn across the whole picture."""

    name: str
    style: str
    value: float


class Drawn(NamedTuple):
    """A curve in places of the picture."""

    name: str
    style: str
    path: str  # SVG's
    dots: list[tuple[float, float, float, float, str]]  # x, y, upper and lower end of the bar, what it says


class Chart(NamedTuple):
    """A picture: what is to be drawn where."""

    title: str
    alt: str
    curves: list[Drawn]
    references: list[tuple[str, str, float]]  # name, style, y
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def chart(
    title: str,
    alt: str,
    curves: Sequence[Curve],
    references: Sequence[Reference] = (),
    logarithmic: bool = False,
    label: Callable[[float], str] = "{:,.10g}".format,
) -> Chart | None:
    """A picture of curves over steps, or None where there is nothing to draw.

    label: writes a value of the vertical axis.
    """
    curves = [curve._replace(points=_thinned(_finite(curve.points, logarithmic))) for curve in curves]
    references = [each for each in references if math.isfinite(each.value) and (each.value > 0 or not logarithmic)]
    points = [point for curve in curves for point in curve.points]
    if not points:
        return None
    values = [point.value for point in points] + [each.value for each in references]
    y_of, y_ticks = _vertical_axis(min(values), max(values), logarithmic, label)
    last_step = max(point.step for point in points)
    x_ticks = [step for step in _ticks(0, last_step) if step == int(step)] if last_step else [0]

    def x_of(step: float) -> float:
        return round(FRAME.left + INNER_WIDTH * (step / last_step if last_step else 0.5), 1)

    drawn = []
    for curve in curves:
        places = [(x_of(point.step), y_of(point.value)) for point in curve.points]
        path = "M" + "L".join(f"{x} {y}" for x, y in places) if places else ""
        dots = [
            (*place, y_of(point.value + point.error), y_of(point.value - point.error), _say(point, label))
            for place, point in zip(places, curve.points, strict=True)
            if curve.dots
        ]
        drawn.append(Drawn(curve.name, curve.style, path, dots))
    return Chart(
        title=title,
        alt=alt,
        curves=drawn,
        references=[(each.name, each.style, y_of(each.value)) for each in references],
        x_ticks=[(x_of(step), f"{step:,.0f}") for step in x_ticks],
        y_ticks=[(y_of(value), label(value)) for value in y_ticks],
    )


def _say(point: Point, label: Callable[[float], str]) -> str:
    error = f" ± {label(point.error)}" if point.error else ""
    return f"step {point.step:,.0f}: {label(point.value)}{error}"


def _finite(points: list[Point], logarithmic: bool) -> list[Point]:
    return [
        point._replace(error=point.error if math.isfinite(point.error) else 0.0)
        for point in points
        if math.isfinite(point.value) and (point.value > 0 or not logarithmic)
    ]


def _thinned(points: list[Point]) -> list[Point]:
    """At most `MOST_POINTS`: the first and the last, and means of equally many neighbours between."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil((len(points) - 2) / (MOST_POINTS - 2))
    inner = points[1:-1]
    groups = [inner[start : start + size] for start in range(0, len(inner), size)]
    means = [Point(*(sum(part) / len(group) for part in zip(*group, strict=True))) for group in groups]
    return [points[0], *means, points[-1]]


def _vertical_axis(
    low: float, high: float, logarithmic: bool, label: Callable[[float], str]
) -> tuple[Callable[[float], float], list[float]]:
    """Where a value is drawn, and which are labelled."""
    if logarithmic:
        low, high = low / 1.1, high * 1.1
    else:
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low, high = (0.0 if 0 <= low < (high - low) else low - margin), high + margin
    scale: Callable[[float], float] = math.log if logarithmic else float

    def y_of(value: float) -> float:
        share = (scale(min(max(value, low), high)) - scale(low)) / (scale(high) - scale(low))
        return round(FRAME.height - FRAME.bottom - INNER_HEIGHT * share, 1)

    return y_of, _ticks(low, high, logarithmic)


def _ticks(low: float, high: float, logarithmic: bool = False) -> list[float]:
    """Round numbers from low to high; on a logarithmic axis 1, 2 and 5 times powers of ten, or the powers alone."""
    ticks: list[float] = []
    if logarithmic:
        for factors in ((1.0,), (1.0, 2.0, 5.0)):
            if len(ticks) < 3:
                ticks = _between(low, high, LogLocator(subs=factors, numticks=10**3).tick_values(low, high))
    return ticks if len(ticks) > 1 else _between(low, high, MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high))


def _between(low: float, high: float, ticks: Sequence[float]) -> list[float]:
    return [float(tick) for tick in ticks if low <= tick <= high]


class Bar(NamedTuple):
    """A bar of a histogram, in places of the picture."""

    x: float
    y: float
    width: float
    height: float
    label: str
    number: int
    is_labelled: bool  # on the axis, where not every label has room


def bars(counts: list[tuple[str, int]]) -> list[Bar]:
    """A histogram: a bar for each label and how often it occurs."""
    most = max(1, max(number for _, number in counts))
    room = INNER_WIDTH / len(counts)
    drawn = []
    for index, (label, number) in enumerate(counts):
        height = INNER_HEIGHT * number / most
        is_last = index == len(counts) - 1
        is_labelled = is_last or (index % 4 == 0 and index < len(counts) - 4)
        x, y = FRAME.left + room * index, FRAME.height - FRAME.bottom - height
        drawn.append(Bar(round(x, 1), round(y, 1), round(room - 2, 1), round(height, 1), label, number, is_labelled))
    return drawn
