"""Accuracy and F1 of predictions, for labels or for entities, from counts that a bootstrap can weigh."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from mlm.downstream.task import Task, entity_types
from mlm.downstream.task_files import Example
from mlm.errors import UserError

TRUE_POSITIVES, PREDICTED, ACTUAL = 0, 1, 2  # the three counts of each class


def count_predictions(task: Task, predictions: list[int], examples: list[Example]) -> np.ndarray:
    """Returns the counts (examples, 3, classes) of true positives, predicted and actual labels in each example.

    predictions: the class id of each example; for entities, that of each word's tag, sentence after sentence. Entities
    are those of CoNLL-2000's evaluation, by seqeval, and the classes their types.
    """
    if task.kind == "entities":
        return _count_entities(task, predictions, examples)
    class_ids = task.class_ids
    labels = [class_ids[example.labels[0]] for example in examples]
    one_hot = np.eye(len(class_ids), dtype=bool)
    predicted, actual = one_hot[predictions], one_hot[labels]  # (examples, classes)
    return np.stack([predicted & actual, predicted, actual], axis=1).astype(np.float32)


def _count_entities(task: Task, predictions: list[int], examples: list[Example]) -> np.ndarray:
    types = entity_types(task.classes)
    counts = np.zeros((len(examples), 3, len(types)), dtype=np.float32)
    tags = iter(task.classes[prediction] for prediction in predictions)
    for number, example in enumerate(examples):
        predicted = set(get_entities([next(tags) for _ in example.labels]))
        actual = set(get_entities(list(example.labels)))
        for count, entities in ((TRUE_POSITIVES, predicted & actual), (PREDICTED, predicted), (ACTUAL, actual)):
            for entity_type, *_ in entities:
                counts[number, count, types.index(entity_type)] += 1
    return counts


# ------------------------------------------------------------------------------------ from counts, summed over examples


def accuracy(counts: np.ndarray) -> np.ndarray:
    """Returns the share of correct predictions (...), for counts (..., 3, classes)."""
    return counts[..., TRUE_POSITIVES, :].sum(-1) / np.maximum(counts[..., ACTUAL, :].sum(-1), 1)


def micro_f1(counts: np.ndarray) -> np.ndarray:
    """Returns F1 over all classes together (...), for counts (..., 3, classes)."""
    return _f1(counts.sum(-1, keepdims=True))[..., 0]


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """Returns the mean (...) of the F1 of all classes that are predicted or actual, for counts (..., 3, classes)."""
    present = counts[..., PREDICTED, :] + counts[..., ACTUAL, :] > 0
    return (_f1(counts) * present).sum(-1) / np.maximum(present.sum(-1), 1)


def _f1(counts: np.ndarray) -> np.ndarray:
    """F1 of each class (..., classes); 0 where nothing is predicted or actual."""
    return 2 * counts[..., TRUE_POSITIVES, :] / np.maximum(counts[..., PREDICTED, :] + counts[..., ACTUAL, :], 1)


Metric = Callable[[np.ndarray], np.ndarray]

LABEL_METRICS: dict[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1, "micro_f1": micro_f1}
ENTITY_METRICS: dict[str, Metric] = {"micro_f1": micro_f1, "macro_f1": macro_f1}


def task_metrics(task: Task) -> dict[str, Metric]:
    """Returns the metrics that suit the task; the first is the usual one."""
    return ENTITY_METRICS if task.kind == "entities" else LABEL_METRICS


def choose_metric(task: Task, wanted: str) -> str:
    """Returns the name of the metric that models are compared by. Raises UserError where the task has no such one."""
    names = list(task_metrics(task))
    if wanted == "auto":
        return names[0]
    if wanted not in names:
        raise UserError(f"metric: {wanted} is not for entities; choose {' or '.join(names)}")
    return wanted


class MajorityBaseline(NamedTuple):
    """The test scores of always predicting the most frequent training label."""

    label: str
    scores: dict[str, float]  # by each metric


def score_majority_baseline(task: Task) -> MajorityBaseline | None:
    """Returns the baseline that a model should beat; None for entities, where the most frequent tag finds none."""
    if task.kind == "entities":
        return None
    [(label, _)] = Counter(example.labels[0] for example in task.train).most_common(1)
    counts = count_predictions(task, [task.class_ids[label]] * len(task.test), task.test).sum(0)
    return MajorityBaseline(label, {name: float(metric(counts)) for name, metric in LABEL_METRICS.items()})
