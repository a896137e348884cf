"""What people are shown of a comparison: the task, each trial, tables, a sentence to repeat, and a picture."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mlm.data.text_stats import MANY_UNKNOWN
from mlm.downstream.comparison import Candidate
from mlm.downstream.metrics import OneLabel, count_answers, metrics_of, score_of_one_label
from mlm.downstream.significance import Gain, compare
from mlm.downstream.task import Task, entity_kinds
from mlm.downstream.trials import Result, Trial
from mlm.storage import write_csv
from mlm.terminal import figure, progress_bar

SPLITS = (("train", "train on"), ("dev", "choose settings by (dev)"), ("test", "test on"))
METRIC_TITLES = {"accuracy": "accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1"}


class Outcome(NamedTuple):
    """What came of all trials with one number of training texts a class."""

    task: Task
    size: str
    metric: str  # that the gains are of
    results: dict[str, list[Result]]  # of each model, one a seed
    scores: dict[str, np.ndarray]  # (models, seeds) by each metric
    gains: dict[str, Gain]  # of each model but the first, over it
    one_label: OneLabel | None  # None for entities


def judge(task: Task, metric: str, size: str, results: dict[str, list[Result]]) -> Outcome:
    """Scores of all models and seeds, and each model's gain over the first by the metric of that name."""
    counts = np.stack(
        [[count_answers(task, result.answers, task.test) for result in of_model] for of_model in results.values()]
    )  # (models, seeds, texts, 3, classes)
    scores = {name: score(counts.sum(2)) for name, score in metrics_of(task).items()}  # (models, seeds) each
    gains = dict(zip(list(results)[1:], compare(counts, metrics_of(task)[metric]), strict=True))
    return Outcome(task, size, metric, results, scores, gains, score_of_one_label(task))


# --------------------------------------------------------------------------------------------------------------- before


def describe_task(task: Task) -> str:
    """What is compared on what."""
    kinds = {"text": "texts", "pair": "pairs of texts", "entities": "sentences with entities"}
    sizes = ", ".join(f"{len(getattr(task, split)):,} to {what}" for split, what in SPLITS)
    classes = entity_kinds(task.classes) if task.kind == "entities" else task.classes
    lines = [f"{task.name}: {kinds[task.kind]} of {len(classes)} classes; {sizes}"]
    return "\n".join([*lines, *(f"   {note}" for note in task.notes)])


def describe_candidates(task: Task, candidates: list[Candidate]) -> str:
    """What to know of the models before they are tried."""
    lines = []
    for candidate in candidates:
        inside = candidate.test.words >= 0
        unknown = (candidate.test.chunks.input_ids[inside] == candidate.tokenizer.unk_token_id).mean()
        line = f"   {candidate.name}: {inside.sum() / len(task.test):.1f} tokens a test text"
        if candidate.test.shortened:
            line += f"; {candidate.test.shortened:,} texts longer than sen_max_length"
        lines.append(line)
        if unknown > MANY_UNKNOWN:
            lines.append(f"   warning: {unknown:.0%} of them are [UNK]: its vocabulary is for other texts")
        if candidate.read_before:
            lines.append(
                f"   warning: {candidate.read_before:,} test text(s) stood in the text that it was pre-trained on. "
                "It has not seen their labels, but other texts may suit it less"
            )
    return "\n".join(["models", *lines])


# --------------------------------------------------------------------------------------------------------------- during


def trial_bar(trial: Trial, steps: int) -> tqdm:
    """A bar of a trial's steps; drawn on a terminal alone."""
    return progress_bar(f"seed {trial.seed}", steps, " steps")


def say_result(result: Result, left: int) -> None:
    """A line about a trial that is done."""
    if result.learning_rate is None:
        setting = f"penalty C {result.penalty:g}"
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
    """Scores in percent, the gains, and a sentence for each."""
    short = short_names(list(outcome.results))
    always = f"(always {outcome.one_label.label})" if outcome.one_label else ""
    width = max(map(len, [*short.values(), always]))
    title, seeds = METRIC_TITLES[outcome.metric], len(next(iter(outcome.results.values())))
    columns = "".join(f"{METRIC_TITLES[name]:>10}" for name in outcome.scores)
    lines = [f"\n{of_size(outcome.size)}: mean of {seeds} seed(s), in percent"]
    lines.append(f"{'':<{width}}{columns}   {title} of each seed")
    for row, name in enumerate(short.values()):
        means = "".join(f"{100 * scores[row].mean():>10.1f}" for scores in outcome.scores.values())
        each = " ".join(f"{100 * score:.1f}" for score in outcome.scores[outcome.metric][row])
        lines.append(f"{name:<{width}}{means}   {each}")
    if outcome.one_label:
        means = "".join(f"{100 * score:>10.1f}" for score in outcome.one_label.scores.values())
        lines.append(f"{always:<{width}}{means}")
    lines += _warn_of_failures(outcome, short)
    if outcome.gains:
        lines.append(f"\n{title}, compared with {next(iter(short.values()))}, in points:")
    for name, gain in outcome.gains.items():
        lines.append(f"  {short[name]}: {sentence(gain)}")
        interval = f"95% interval {100 * gain.low:+.1f} to {100 * gain.high:+.1f}"
        lines.append(f"    {100 * gain.mean:+.1f}, {interval}; p = {gain.p:.3f} by chance signs of the seeds")
    return "\n".join(lines)


def _warn_of_failures(outcome: Outcome, short: dict[str, str]) -> list[str]:
    """A warning for each model with seeds that are no better than always giving one label."""
    if not outcome.one_label:
        return []
    lines = []
    for name, accuracies in zip(short.values(), outcome.scores["accuracy"], strict=True):
        failed = int((accuracies <= outcome.one_label.scores["accuracy"] + 1e-9).sum())
        if failed:
            lines.append(
                f"warning: {failed} of {len(accuracies)} seed(s) of {name} did not learn: no better than one label "
                "(more --least_steps, other --learning_rates?)"
            )
    return lines


def sentence(gain: Gain) -> str:
    """The answer, to be repeated."""
    verdict = gain.verdict
    if verdict == "better":
        return f"better by {100 * gain.mean:.1f} ({100 * gain.low:.1f} to {100 * gain.high:.1f})"
    if verdict == "worse":
        return f"worse by {-100 * gain.mean:.1f} ({-100 * gain.high:.1f} to {-100 * gain.low:.1f})"
    if not np.isfinite(gain.detectable):
        return "cannot tell: with fewer than 6 seeds no gain can be told from chance"
    if gain.low > 0 or gain.high < 0:
        return f"cannot tell: {100 * gain.mean:+.1f} in the mean, but the seeds do not agree; more --seeds may tell"
    return f"cannot tell: a gain below {100 * gain.detectable:.1f} would not reliably show"


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
        write_csv(folder / "general_text.csv", list(rows[0]), rows)


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
            gains.append(pair | figures | {"verdict": gain.verdict, "sentence": sentence(gain)})
    for file in ("comparison.csv", "general_text.csv"):  # which an earlier call may have left, about other models
        (folder / file).unlink(missing_ok=True)
    write_csv(folder / "results.csv", list(results[0]), results)
    if gains:
        write_csv(folder / "comparison.csv", list(gains[0]), gains)
