"""The picture of a comparison: every seed's score, and the differences with their intervals."""

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

os.environ["MPLBACKEND"] = "agg"  # nothing is shown; a notebook names a backend that may be missing here

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlm.downstream.results import METRIC_TITLES, Outcome, short_names
from mlm.downstream.trials import describe_size
from mlm.storage import atomic_write


def save_picture(path: Path, outcomes: list[Outcome]) -> None:
    """Writes an SVG whose text is text, so that its reader's fonts show names in any script."""
    models = outcomes[0].results
    rows = len(outcomes) * max(1, len(models) - 1)
    options: dict[Any, Any] = {"svg.fonttype": "none", "text.parse_math": False}  # a $ in a name is a $
    with matplotlib.rc_context(options), warnings.catch_warnings(), atomic_write(path) as temporary:
        warnings.filterwarnings("ignore", "Glyph")  # that matplotlib's own font lacks, and is not to draw
        figure = Figure(figsize=(10, 2.2 + 0.5 * max(4, rows)), layout="constrained")
        axes = figure.subplots(1, min(2, len(models)), squeeze=False)[0]
        _draw_scores(axes[0], outcomes)
        if len(models) > 1:
            _draw_differences(axes[1], outcomes)
        figure.savefig(temporary, format="svg")


def _draw_scores(axes: Axes, outcomes: list[Outcome]) -> None:
    """Draws each model's scores, every seed a dot and the mean a bar, by number of training texts."""
    names = short_names(outcomes[0].results)
    for number, name in enumerate(names):
        color, offset = f"C{number}", (number - (len(names) - 1) / 2) * 0.6 / len(names)
        scores = np.array([100 * outcome.scores[outcome.metric][number] for outcome in outcomes])  # (sizes, seeds)
        at = np.arange(len(outcomes)) + offset  # (sizes,)
        beside = np.linspace(-0.06, 0.06, scores.shape[1])  # so that equal seeds can be told apart
        axes.plot((at[:, None] + beside).flatten(), scores.flatten(), "o", color=color, alpha=0.4, markersize=5)
        axes.plot(at, scores.mean(1), "_-", markersize=20, markeredgewidth=2, linewidth=0.7, color=color, label=name)
    axes.set_xticks(range(len(outcomes)), [describe_size(outcome.size) for outcome in outcomes])
    axes.set_xlim(-0.6, len(outcomes) - 0.4)
    axes.set_ylabel(f"{METRIC_TITLES[outcomes[0].metric]}, points; a dot is a seed")
    axes.set_title(outcomes[0].task.name)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), fontsize="small", frameon=False)


def _draw_differences(axes: Axes, outcomes: list[Outcome]) -> None:
    """Draws each model's difference from the first with its interval, in the colour of its scores; a line at 0."""
    first, *others = short_names(outcomes[0].results)
    ticks: list[str] = []
    for outcome in outcomes:
        for number, (name, difference) in enumerate(zip(others, outcome.differences.values(), strict=True), start=1):
            mean, low, high = (100 * value for value in difference[:3])
            margins = [[mean - low], [high - mean]]
            axes.errorbar(mean, -len(ticks), xerr=margins, fmt="o", capsize=4, color=f"C{number}")
            ticks.append(f"{name}\n{describe_size(outcome.size)}")
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(-np.arange(len(ticks)), ticks, fontsize="small")
    axes.set_ylim(0.6 - len(ticks), 0.6)
    axes.set_xlabel(f"points of {METRIC_TITLES[outcomes[0].metric]}, 95% intervals")
    axes.set_title(f"difference from {first} (right of 0: better)")
