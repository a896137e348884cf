"""Text and tables for people about a comparison: the task, the models, each trial, scores and verdicts."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlm.data.text_stats import MANY_UNKNOWN
from mlm.downstream.comparison import Candidate
from mlm.downstream.metrics import count_predictions, score_majority_baseline, task_metrics
from mlm.downstream.significance import Difference, compare
from mlm.downstream.task import Task, entity_types, list_names
from mlm.downstream.trials import Result, describe_size
from mlm.storage import write_csv
from mlm.terminal import figure, render, table

METRIC_TITLES = {"accuracy": "accuracy", "macro_f1": "macro F1", "micro_f1": "micro F1"}


class Outcome(NamedTuple):
    """The results of all trials with one number of training texts per class."""

    task: Task
    size: str
    metric: str  # that models are compared by
    results: dict[str, list[Result]]  # of each model, one per seed
    scores: dict[str, np.ndarray]  # (models, seeds) by each metric
    differences: dict[str, Difference]  # of each model but the first, from the first


def summarize(task: Task, metric: str, size: str, results: dict[str, list[Result]]) -> Outcome:
    """Scores all models and seeds, and compares each model with the first by the named metric."""
    counts = np.stack(
        [[count_predictions(task, result.predictions, task.test) for result in tried] for tried in results.values()]
    )  # (models, seeds, texts, 3, classes)
    metrics = task_metrics(task)
    scores = {name: score(counts.sum(2)) for name, score in metrics.items()}
    differences = dict(zip(list(results)[1:], compare(counts, metrics[metric]), strict=True))
    return Outcome(task, size, metric, results, scores, differences)


def describe_task(task: Task) -> str:
    """Returns what the task's files were taken for: kind, classes, splits, columns; and what is worth a note."""
    classes = entity_types(task.classes) if task.kind == "entities" else task.classes
    values = {"task": task, "num_classes": len(classes), "classes": list_names(classes)}
    return render("downstream/templates/task.txt", **values).rstrip()


def describe_candidates(task: Task, candidates: list[Candidate]) -> str:
    """Returns how each model's tokenizer takes the texts, and warnings about models that may do badly or too well."""
    described = []
    for candidate in candidates:
        inside = candidate.test.word_ids >= 0
        unknown = (candidate.test.chunks.input_ids[inside] == candidate.tokenizer.unk_token_id).mean()
        described.append((candidate, inside.sum() / len(task.test), unknown))
    return render("downstream/templates/candidates.txt", candidates=described, many_unknown=MANY_UNKNOWN).rstrip()


def short_names(models: Iterable[str]) -> list[str]:
    """Returns each model's name without the folders above, and without final, where that tells them apart."""
    full = list(models)
    telling = [[part for part in Path(model).parts if part not in ("final", "model")] for model in full]
    short = [parts[-1] if parts else model for parts, model in zip(telling, full, strict=True)]
    return short if len({*short}) == len(full) else full


def describe_outcome(outcome: Outcome) -> str:
    """Returns a table of scores in percent, a warning for each model with seeds that do not beat the majority baseline,
    and each difference from the first model with its verdict."""
    names = short_names(outcome.results)
    title = METRIC_TITLES[outcome.metric]
    rows = [["", *(METRIC_TITLES[name] for name in outcome.scores), f"{title} of each seed"]]
    for number, name in enumerate(names):
        means = [_percent(scores[number].mean()) for scores in outcome.scores.values()]
        rows.append([name, *means, " ".join(map(_percent, outcome.scores[outcome.metric][number]))])
    failed = np.zeros(len(names), dtype=int)
    label, baseline = score_majority_baseline(outcome.task)
    if baseline:
        rows.append([f"(always {label})", *map(_percent, baseline.values())])
        failed = (outcome.scores[outcome.metric] <= baseline[outcome.metric] + 1e-9).sum(1)
    return render(
        "downstream/templates/outcome.txt",
        size=describe_size(outcome.size),
        num_seeds=outcome.scores[outcome.metric].shape[1],
        scores=table(rows, "<" + ">" * len(outcome.scores) + "<"),
        failed_seeds=list(zip(names, failed, strict=True)),
        title=title,
        first=names[0],
        differences=list(zip(names[1:], outcome.differences.values(), strict=True)),
    ).rstrip()


def _percent(score: float) -> str:
    return f"{100 * score:.1f}"


def describe_general_perplexity(perplexities: dict[str, dict[str, float] | None], heading: str) -> str:
    """Returns a table of each model's perplexity and nats_per_character on general text, where it has them."""
    rows = [["", "perplexity", "nats per character", ""]]
    for name, scores in zip(short_names(perplexities), perplexities.values(), strict=True):
        if scores:
            rows.append([name, figure(scores["perplexity"]), f"{scores['nats_per_character']:.3f}"])
        else:
            rows.append([name, "", "", "not measured: no masked-language-model head, or not as many rows as tokens"])
    closing = "(Perplexities compare between models with the same tokenizer; else compare nats.)"
    return "\n".join([f"\n{heading}", table(rows, "<>><"), closing])


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
            verdict = {"verdict": difference.verdict, "sentence": difference.sentence}
            differences.append(pair | figures | verdict)
    for file in ("comparison.csv", "general_text.csv"):  # which an earlier call may have left, about other models
        (folder / file).unlink(missing_ok=True)
    write_csv(folder / "results.csv", list(results[0]), results)
    if differences:
        write_csv(folder / "comparison.csv", list(differences[0]), differences)
