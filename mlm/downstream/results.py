"""Text and tables for people about a comparison: the task, the models, each trial, scores and verdicts."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from mlm.data.text_stats import MANY_UNKNOWN
from mlm.downstream.comparison import Candidate
from mlm.downstream.metrics import MajorityBaseline, count_predictions, score_majority_baseline, task_metrics
from mlm.downstream.significance import Difference, compare
from mlm.downstream.task import Task, entity_types
from mlm.downstream.trials import Result
from mlm.storage import write_csv
from mlm.terminal import figure, table

SPLIT_USES = {"train": "train on", "dev": "choose settings by (dev)", "test": "test on"}
METRIC_TITLES = {"accuracy": "accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1"}


class Outcome(NamedTuple):
    """The results of all trials with one number of training texts per class."""

    task: Task
    size: str
    metric: str  # that models are compared by
    results: dict[str, list[Result]]  # of each model, one per seed
    scores: dict[str, np.ndarray]  # (models, seeds) by each metric
    differences: dict[str, Difference]  # of each model but the first, from the first
    baseline: MajorityBaseline | None  # None for entities


def summarize(task: Task, metric: str, size: str, results: dict[str, list[Result]]) -> Outcome:
    """Scores all models and seeds, and compares each model with the first by the named metric."""
    counts = np.stack(
        [
            [count_predictions(task, result.predictions, task.test) for result in model_results]
            for model_results in results.values()
        ]
    )  # (models, seeds, texts, 3, classes)
    metrics = task_metrics(task)
    scores = {name: score(counts.sum(2)) for name, score in metrics.items()}
    differences = dict(zip(list(results)[1:], compare(counts, metrics[metric]), strict=True))
    return Outcome(task, size, metric, results, scores, differences, score_majority_baseline(task))


# --------------------------------------------------------------------------------------------------------------- before


def describe_task(task: Task) -> str:
    """Returns the kind and size of the task, and what its files made worth a note."""
    kinds = {"text": "texts", "pair": "pairs of texts", "entities": "sentences with entities"}
    sizes = ", ".join(f"{len(getattr(task, split)):,} to {use}" for split, use in SPLIT_USES.items())
    classes = entity_types(task.classes) if task.kind == "entities" else task.classes
    lines = [f"{task.name}: {kinds[task.kind]} of {len(classes)} classes; {sizes}"]
    return "\n".join([*lines, *(f"   {note}" for note in task.notes)])


def describe_candidates(task: Task, candidates: list[Candidate]) -> str:
    """Returns how each model's tokenizer takes the texts, and warnings about models that may do badly or too well."""
    lines = ["models"]
    for candidate in candidates:
        inside = candidate.test.word_ids >= 0
        unknown = (candidate.test.chunks.input_ids[inside] == candidate.tokenizer.unk_token_id).mean()
        line = f"   {candidate.name}: {inside.sum() / len(task.test):.1f} tokens per test text"
        if candidate.test.shortened:
            line += f"; {candidate.test.shortened:,} texts longer than sen_max_length"
        lines.append(line)
        if unknown > MANY_UNKNOWN:
            lines.append(f"   warning: {unknown:.0%} of them are [UNK]: its vocabulary is for other texts")
        if candidate.contaminated:
            lines.append(
                f"   warning: {candidate.contaminated:,} test text(s) stood in the text that it was pre-trained on. "
                "It has not seen their labels, but other texts may suit it less"
            )
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------------- during


def say_result(result: Result, left: int) -> None:
    """Prints a line about a trial that is done, above the bars."""
    trial = result.trial
    if trial.learning_rate is None:
        setting = f"C = {result.regularization_c:g}"
    elif result.best_step:
        setting = f"rate {trial.learning_rate:g}, best after step {result.best_step}"
    else:
        setting = f"rate {trial.learning_rate:g} diverged"
    to_come = f"; {left} more, about {tqdm.format_interval(left * result.seconds)}" if left else ""
    tqdm.write(
        f"{trial.model}, {describe_size(trial.size)}, seed {trial.seed}: {setting}, "
        f"dev {100 * result.dev_score:.1f}, {result.seconds:.0f} s{to_come}"
    )


def describe_size(size: str) -> str:
    return "all texts" if size == "all" else f"{size} per class"


def short_names(models: list[str]) -> dict[str, str]:
    """Returns each model's name without the folders above, and without final, where that tells them apart."""
    short = {}
    for model in models:
        telling = [part for part in Path(model).parts if part not in ("final", "model")]
        short[model] = telling[-1] if telling else model
    return short if len(set(short.values())) == len(models) else {model: model for model in models}


# ---------------------------------------------------------------------------------------------------------------- after


def describe_outcome(outcome: Outcome) -> str:
    """Returns a table of scores in percent, warnings, and each difference from the first model with its verdict."""
    short = short_names(list(outcome.results))
    title, num_seeds = METRIC_TITLES[outcome.metric], len(next(iter(outcome.results.values())))
    rows = [["", *(METRIC_TITLES[name] for name in outcome.scores), f"{title} of each seed"]]
    for number, name in enumerate(short.values()):
        means = [_percent(scores[number].mean()) for scores in outcome.scores.values()]
        rows.append([name, *means, " ".join(map(_percent, outcome.scores[outcome.metric][number]))])
    if outcome.baseline:
        rows.append([f"(always {outcome.baseline.label})", *map(_percent, outcome.baseline.scores.values())])
    lines = [f"\n{describe_size(outcome.size)}: mean of {num_seeds} seed(s), in percent"]
    lines.append(table(rows, "<" + ">" * len(outcome.scores) + "<"))
    lines += _warn_of_failures(outcome, short)
    if outcome.differences:
        lines.append(f"\n{title}, compared with {next(iter(short.values()))}, in points:")
    for name, difference in outcome.differences.items():
        lines.append(f"  {short[name]}: {describe_verdict(difference)}")
        interval = f"95% interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
        test = f"p = {difference.p:.3f} (sign-flip permutation test over seeds)"
        lines.append(f"    {100 * difference.mean:+.1f}, {interval}; {test}")
    return "\n".join(lines)


def _percent(score: float) -> str:
    return f"{100 * score:.1f}"


def _warn_of_failures(outcome: Outcome, short: dict[str, str]) -> list[str]:
    """Returns a warning for each model with seeds that do not beat the majority baseline."""
    if not outcome.baseline:
        return []
    lines = []
    for name, accuracies in zip(short.values(), outcome.scores["accuracy"], strict=True):
        failed = int((accuracies <= outcome.baseline.scores["accuracy"] + 1e-9).sum())
        if failed:
            lines.append(
                f"warning: {failed} of {len(accuracies)} seed(s) of {name} did not learn: no better than one label "
                "(more --min_steps, other --learning_rates?)"
            )
    return lines


def describe_verdict(difference: Difference) -> str:
    """Returns the verdict as a sentence, to be repeated."""
    mean, low, high, _, detectable = (100 * value for value in difference)
    if difference.verdict == "better":
        return f"better by {mean:.1f} ({low:.1f} to {high:.1f})"
    if difference.verdict == "worse":
        return f"worse by {-mean:.1f} ({-high:.1f} to {-low:.1f})"
    if not np.isfinite(detectable):
        return "cannot tell: with fewer than 6 seeds no difference can be told from chance"
    if low > 0 or high < 0:
        return f"cannot tell: {mean:+.1f} in the mean, but the seeds do not agree; more --num_seeds may tell"
    return f"cannot tell: a difference below {detectable:.1f} would not reliably show"


class GeneralPerplexity(NamedTuple):
    """How well a model predicts hidden words of text that is not of the task's domain."""

    perplexity: float
    nats_per_character: float


def describe_general_perplexity(perplexities: dict[str, GeneralPerplexity | None], text: str, num_lines: int) -> str:
    """Returns a table of each model's perplexity on general text."""
    short = short_names(list(perplexities))
    rows = [["", "perplexity", "nats per character", ""]]
    for name, scores in perplexities.items():
        if scores:
            rows.append([short[name], figure(scores.perplexity), f"{scores.nats_per_character:.3f}"])
        else:
            rows.append([short[name], "", "", "no masked-language-model head"])
    closing = "(Perplexities compare between models with the same tokenizer; else compare nats.)"
    return "\n".join([f"\n{text}, {num_lines:,} line(s), masked as in train.py", table(rows, "<>><"), closing])


def save_general_perplexity(folder: Path, perplexities: dict[str, GeneralPerplexity | None]) -> None:
    """Writes general_text.csv."""
    rows = [{"model": name} | scores._asdict() for name, scores in perplexities.items() if scores]
    if rows:
        write_csv(folder / "general_text.csv", list(rows[0]), rows)


def save_outcomes(folder: Path, outcomes: list[Outcome]) -> None:
    """Writes results.csv, with a row per model and seed, and comparison.csv, with a row per difference."""
    results, differences = [], []
    for outcome in outcomes:
        for model, model_results in enumerate(outcome.results.values()):
            for seed, result in enumerate(model_results):
                scores = {metric: f"{scores[model, seed]:.6f}" for metric, scores in outcome.scores.items()}
                results.append(
                    {
                        "examples_per_class": outcome.size, "model": result.trial.model, "seed": result.trial.seed,
                        "learning_rate": result.trial.learning_rate, "regularization_c": result.regularization_c,
                        "best_step": result.best_step, "dev_score": f"{result.dev_score:.6f}", **scores,
                        "seconds": f"{result.seconds:.1f}",
                    }
                )  # fmt: skip
        first = next(iter(outcome.results))
        for name, difference in outcome.differences.items():
            pair = {"examples_per_class": outcome.size, "model": name, "compared_with": first, "metric": outcome.metric}
            figures = {key: f"{value:.6f}" for key, value in difference._asdict().items()}
            verdict = {"verdict": difference.verdict, "sentence": describe_verdict(difference)}
            differences.append(pair | figures | verdict)
    for file in ("comparison.csv", "general_text.csv"):  # which an earlier call may have left, about other models
        (folder / file).unlink(missing_ok=True)
    write_csv(folder / "results.csv", list(results[0]), results)
    if differences:
        write_csv(folder / "comparison.csv", list(differences[0]), differences)
