"""What people are shown of a comparison: the task, each trial, tables, a sentence to repeat, and a picture."""

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from tqdm import tqdm

from mlm.comparison import POWER, Gain
from mlm.encoding import Encoded
from mlm.report import figure
from mlm.storage import atomic_write
from mlm.tasks import Task
from mlm.trials import Result, Trial

METRIC_TITLES = {"accuracy": "accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1"}


class Outcome(NamedTuple):
    """What came of all trials with one number of training texts a class."""

    task: Task
    size: str
    metric: str  # that the gains are of
    results: dict[str, list[Result]]  # of each model, one a seed
    scores: dict[str, np.ndarray]  # (models, seeds) by each metric
    gains: dict[str, Gain]  # of each model but the first, over it


class Shown(Protocol):
    """What is shown of a candidate."""

    name: str
    dev: Encoded
    test: Encoded
    read_before: int | None


# --------------------------------------------------------------------------------------------------------------- before


def describe_task(task: Task) -> str:
    """What is compared on what."""
    kinds = {"text": "texts", "pair": "pairs of texts", "entities": "sentences with entities"}
    sizes = ", ".join(f"{len(getattr(task, split)):,} to {what}" for split, what in SPLITS)
    lines = [f"task {task.name}: {kinds[task.kind]}; {sizes}; {len(task.classes)} labels"]
    return "\n".join([*lines, *(f"   {note}" for note in task.notes)])


SPLITS = (("train", "train on"), ("dev", "choose settings by"), ("test", "test on"))


def describe_candidates(task: Task, candidates: Sequence[Shown]) -> str:
    """What to know of the models before they are tried."""
    lines = []
    for candidate in candidates:
        tokens = len(candidate.test.chunks.input_ids) / len(task.test)
        line = f"   {candidate.name}: {tokens:.1f} positions a test text"
        if candidate.test.shortened:
            line += f", {candidate.test.shortened:,} longer than sen_max_length"
        lines.append(line)
        if candidate.read_before:
            lines.append(
                f"   warning: {candidate.read_before:,} of the {len(task.test):,} test texts are lines of the text "
                "that it was pre-trained on. It has not seen their labels, but new texts may suit it less"
            )
    return "\n".join(["models", *lines])


# --------------------------------------------------------------------------------------------------------------- during


def trial_bar(trial: Trial, steps: int) -> tqdm:
    """A bar of a trial's steps; drawn on a terminal alone."""
    return tqdm(total=steps, desc=f"seed {trial.seed}", unit="step", leave=False, disable=not sys.stderr.isatty())


def say_result(result: Result, left: int) -> None:
    """A line about a trial that is done."""
    if result.learning_rate is None:
        setting = f"C {result.penalty:g}"
    elif result.best_step:
        setting = f"rate {result.learning_rate:g}, best after step {result.best_step}"
    else:
        setting = f"rate {result.learning_rate:g} diverged"
    to_come = f"; {left} more, about {tqdm.format_interval(left * result.seconds)}" if left else ""
    tqdm.write(
        f"{result.model}, {of_size(result.size)}, seed {result.seed}: {setting}, dev {100 * result.dev_score:.1f}, "
        f"{result.seconds:.0f} s{to_come}"
    )


def of_size(size: str) -> str:
    return "all texts" if size == "all" else f"{size} a class"


def short_names(models: list[str]) -> dict[str, str]:
    """Each model's name without the folders above, and without final, where that tells them apart."""
    short = {}
    for model in models:
        telling = [part for part in Path(model).parts if part not in ("final", "model")]
        short[model] = telling[-1] if telling else model
    return short if len(set(short.values())) == len(models) else {model: model for model in models}


# ---------------------------------------------------------------------------------------------------------------- after


def describe_outcome(outcome: Outcome) -> str:
    """Scores in points, the gains, and a sentence for each."""
    short = short_names(list(outcome.results))
    width = max(map(len, short.values()))
    title = METRIC_TITLES[outcome.metric]
    heading = f"\n{of_size(outcome.size)}: points, the mean of the seeds"
    columns = [METRIC_TITLES[name] for name in outcome.scores]
    lines = [heading, " " * (width + 2) + "".join(f"{column:>10}" for column in columns) + f"   {title} of each seed"]
    for row, name in enumerate(outcome.results):
        means = "".join(f"{100 * scores[row].mean():>10.1f}" for scores in outcome.scores.values())
        seeds = " ".join(f"{100 * score:.1f}" for score in outcome.scores[outcome.metric][row])
        lines.append(f"{short[name]:<{width}}  {means}   {seeds}")
    first = next(iter(short.values()))
    if outcome.gains:
        lines.append(f"\n{title} compared with {first}:")
    for name, gain in outcome.gains.items():
        lines.append(f"  {short[name]}: {sentence(gain)}")
        lines.append(
            f"    difference {100 * gain.mean:+.1f}, 95% interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}, "
            f"p = {gain.p:.3f} by signs of seeds; {_smallest(gain)}"
        )
    return "\n".join(lines)


def sentence(gain: Gain) -> str:
    """The answer, to be repeated."""
    verdict = gain.verdict
    if verdict == "better":
        return f"better by {100 * gain.mean:.1f} ({100 * gain.low:.1f} to {100 * gain.high:.1f})"
    if verdict == "worse":
        return f"worse by {-100 * gain.mean:.1f} ({-100 * gain.high:.1f} to {-100 * gain.low:.1f})"
    if gain.low == gain.mean == gain.high:
        return "cannot tell: both score alike"
    if not np.isfinite(gain.detectable):
        return "cannot tell: with fewer than 6 seeds no gain can be told from chance"
    return f"cannot tell: a gain below {100 * gain.detectable:.1f} would not reliably show"


def _smallest(gain: Gain) -> str:
    if not np.isfinite(gain.detectable):
        return "no gain would show with so few seeds"
    return f"a gain of {100 * gain.detectable:.1f} would show {POWER:.0%} of the time"


class Known(NamedTuple):
    """How well a model knows a text that is not of the task's domain."""

    perplexity: float
    nats_per_character: float


def describe_known(known: dict[str, Known | None], text: str, lines: int) -> str:
    """Each model's perplexity on general text: what adaptation costs."""
    short = short_names(list(known))
    width = max(map(len, short.values()))
    table = [f"\n{text}, {lines:,} line(s), masked as in train.py", f"{'':<{width}}  perplexity  nats per character"]
    for name, of_model in known.items():
        if of_model is None:
            table.append(f"{short[name]:<{width}}  no masked-language-model head to ask")
        else:
            table.append(
                f"{short[name]:<{width}}  {figure(of_model.perplexity):>10}  {of_model.nats_per_character:>18.3f}"
            )
    table.append("(Perplexities compare between models with the same tokenizer; else compare nats.)")
    return "\n".join(table)


def save_known(folder: Path, known: dict[str, Known | None]) -> None:
    """Writes general_text.csv."""
    rows = [{"model": name} | of_model._asdict() for name, of_model in known.items() if of_model]
    if rows:
        _write_csv(folder / "general_text.csv", rows)


def save_outcomes(folder: Path, outcomes: list[Outcome]) -> None:
    """Writes results.csv, a row for each seed, and comparison.csv, a row for each gain."""
    results, gains = [], []
    for outcome in outcomes:
        for row, (name, of_model) in enumerate(outcome.results.items()):
            for column, result in enumerate(of_model):
                scores = {metric: f"{scores[row, column]:.6f}" for metric, scores in outcome.scores.items()}
                results.append(
                    {
                        "examples_per_class": outcome.size, "model": name, "seed": result.seed,
                        "learning_rate": result.learning_rate, "penalty": result.penalty,
                        "best_step": result.best_step, "dev_score": f"{result.dev_score:.6f}", **scores,
                        "seconds": f"{result.seconds:.1f}",
                    }
                )  # fmt: skip
        for name, gain in outcome.gains.items():
            figures = {key: f"{value:.6f}" for key, value in gain._asdict().items()}
            first = next(iter(outcome.results))
            pair = {"examples_per_class": outcome.size, "model": name, "compared_with": first, "metric": outcome.metric}
            gains.append(pair | figures | {"verdict": sentence(gain)})
    for file in ("comparison.csv", "general_text.csv"):  # which an earlier call may have left, about other models
        (folder / file).unlink(missing_ok=True)
    _write_csv(folder / "results.csv", results)
    if gains:
        _write_csv(folder / "comparison.csv", gains)


def _write_csv(path, rows):
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
