"""Curves and histograms: values where the labels say they are, in the page's colours, whatever a run brings."""

import math
import os
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from runs import ROOT

from mlm.report.plots import HEIGHT, MOST_POINTS, Curve, Point, draw_curves, draw_histogram

NUMBER = r"-?[\d.]+"


class Drawing:
    """An SVG as a browser sees it: lines by colour, and where the labels of the axes are."""

    def __init__(self, svg: str):
        root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
        self.paths = [(path.get("style") or "", self.places(path)) for path in root.iter("path")]
        bands = [path for path in root.findall(".//defs/path") if not path.get("style")]
        self.bands = [self.places(path) + np.array([0, HEIGHT]) for path in bands]  # their <use> moves them down
        self.texts = [(text.text, float(text.get("x")), text.get("style")) for text in root.iter("text")]

    @staticmethod
    def places(path) -> np.ndarray:
        """Where a path goes: (points, 2)."""
        return np.array([place.split() for place in re.findall(f"[ML] ({NUMBER} {NUMBER})", path.get("d"))], float)

    def stroked(self, color: str) -> list[np.ndarray]:
        """The lines of a colour: of each its places."""
        stroke = f"stroke: var(--{color})"
        return [places for style, places in self.paths if style.startswith("fill: none") and stroke in style]

    def x_ticks(self) -> list[tuple[float, float]]:
        """Label and place of each tick below."""
        return [(as_number(text), x) for text, x, style in self.texts if "text-anchor: middle" in style]

    def y_ticks(self) -> list[tuple[float, float]]:
        """Label and place of each tick at the left, which is its line's."""
        labels = [as_number(text) for text, _, style in self.texts if "text-anchor: end" in style]
        return list(zip(labels, [places[0, 1] for places in self.stroked("line")], strict=True))


def as_number(label: str) -> float:
    return float(label.replace(",", "").replace("\N{MINUS SIGN}", "-"))


def draw(values, margins=None, **options):
    """The drawing of one curve with a value at each step."""
    margins = np.zeros(len(values)) if margins is None else margins
    points = [Point(step, *each) for step, each in enumerate(zip(values, margins, strict=True))]
    return Drawing(draw_curves("t", [Curve("c", "one", points)], **options).svg)


@pytest.mark.parametrize(("last", "high"), [(12, 0.0204), (7, 0.5), (3040, 33_000.0), (1, 3e-5)])
def test_each_label_is_the_value_of_its_place(last, high):
    points = [Point(0, 0.0), Point(last, high)]
    drawing = Drawing(draw_curves("t", [Curve("c", "one", points)], label="{:.3g}".format).svg)
    [[(x0, y0), (x1, y1)]] = drawing.stroked("one")
    for step, x in drawing.x_ticks():
        assert step == int(step) and x == pytest.approx(x0 + (x1 - x0) * step / last, abs=0.1)
    for value, y in drawing.y_ticks():
        assert y == pytest.approx(y0 + (y1 - y0) * value / high, abs=0.1)
    assert len({value for value, _ in drawing.y_ticks()}) == len(drawing.y_ticks()) >= 3


def test_a_logarithmic_axis_has_equal_factors_at_equal_distances():
    drawing = draw([1.0, 10.0, 100.0, 2000.0], logarithmic=True)
    [curve] = drawing.stroked("one")
    steps = -np.diff(curve[:, 1])
    assert steps == pytest.approx(steps[0] * np.log10([10, 10, 20]), abs=0.1)
    labels = [value for value, _ in drawing.y_ticks()]
    assert len(labels) >= 3 and labels == sorted(labels)


def test_curves_share_their_axes():
    values = {"one": (0.0, 10.0), "two": (5.0, 5.0), "three": (math.nan, math.nan)}
    curves = [Curve("c", color, [Point(*each) for each in enumerate(pair)], "dashed") for color, pair in values.items()]
    drawing = Drawing(draw_curves("t", curves).svg)
    [[(_, low), (_, high)]] = drawing.stroked("one")
    [level] = drawing.stroked("two")
    assert level[:, 1] == pytest.approx((low + high) / 2, abs=0.1)
    assert drawing.stroked("three") == []


def test_intervals_reach_one_margin_to_either_side():
    drawing = draw([0.0, 10.0, 10.0], [0.0, 2.0, 2.0])
    [[(_, y0), (_, y10), _]] = drawing.stroked("one")
    [band] = drawing.bands
    reached = {round((y - y0) / (y10 - y0) * 10, 2) for _, y in band}
    assert {8.0, 12.0} <= reached <= {0.0, 8.0, 12.0}


def test_a_wide_interval_does_not_squeeze_the_curve():
    for margins in ([1e6, 1e6], [math.inf, math.inf]):
        [curve] = draw([1.0, 2.0], margins, logarithmic=True).stroked("one")
        assert abs(curve[1, 1] - curve[0, 1]) > HEIGHT / 2


def test_of_many_points_the_ends_stay_and_neighbours_are_averaged():
    values = np.tile([0.0, 1.0], 2500) + np.linspace(0, 10, 5000)
    values[0], values[-1] = -5.0, 20.0
    [curve] = draw(values).stroked("one")
    assert len(curve) <= MOST_POINTS
    assert (np.diff(curve[:, 0]) >= 0).all()
    assert np.diff(curve[:, 1]).max() < 0.1  # upwards, as means of neighbours go and single values do not
    [(_, y0), *_, (_, y1)] = curve
    [ends] = draw([-5.0, 20.0]).stroked("one")
    assert [y0, y1] == pytest.approx(list(ends[:, 1]), abs=0.1)


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize(
    "values", [[3.0], [2.0, 2.0], [0.0, 0.0], [math.nan, 1.0, math.inf], [1e-9, 1e90], [-1e300, 1e300], [5e-324, 1.0]]
)
@pytest.mark.filterwarnings("error")
def test_a_chart_takes_what_runs_bring(values, logarithmic):
    points = [Point(step, value, math.inf) for step, value in enumerate(values)]
    chart = draw_curves("t", [Curve("c", "one", points)], logarithmic=logarithmic)
    if chart:
        assert not re.search(r"[ \"](nan|inf)", chart.svg)
        Drawing(chart.svg)


def test_nothing_to_draw_makes_no_chart():
    assert draw_curves("t", [Curve("c", "one", [])]) is None
    assert draw_curves("t", [Curve("c", "one", [Point(0, math.nan)])]) is None
    assert draw_curves("t", [Curve("c", "one", [Point(0, -1.0)])], logarithmic=True) is None


def test_the_legend_names_what_is_drawn():
    named, unnamed = Curve("a", "one", [Point(0, 1.0)], "dashed"), Curve("", "two", [Point(0, 1.0)])
    empty = Curve("none", "three", [])
    assert draw_curves("t", [named, unnamed, empty]).legend == [named]


def test_pictures_are_described_and_their_text_is_text():
    chart = draw_curves("t", [Curve('"c" <of>', "one", [Point(0, 1.00001), Point(9, 12000.0)])])
    assert 'aria-label="t: &#34;c&#34; &lt;of&gt; from 1 to 12,000"' in chart.svg and 'role="img"' in chart.svg
    assert {step for step, _ in Drawing(chart.svg).x_ticks()} >= {0, 8}
    assert "<image" not in chart.svg and "<script" not in chart.svg


def test_bars_are_as_high_as_their_counts():
    counts = [("1", 0), ("2", 4), *((str(n), 1) for n in range(3, 17)), ("over 16", 2)]
    drawing = Drawing(draw_histogram("t", counts).svg)
    bars = [places for style, places in drawing.paths if re.search(r"fill: var\(--(one|two)\)", style)]
    heights = np.array([np.ptp(places[:, 1]) for places in bars])
    assert heights / heights[1] * 4 == pytest.approx([count for _, count in counts], abs=0.01)
    assert sum("fill: var(--two)" in style for style, _ in drawing.paths) == 1  # the last
    labels = [text for text, _, style in drawing.texts if "text-anchor: middle" in style]
    assert labels == ["1", "5", "9", "13", "over 16"]


def test_pictures_are_made_where_a_notebook_names_its_own_way_to_show_them():
    """`!python train.py` in a notebook inherits it, and may run in an environment that lacks it."""
    environment = os.environ | {"MPLBACKEND": "no_such_backend"}
    command = [sys.executable, "-c", "import mlm.report.plots, mlm.downstream.plot"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
