"""Accuracy and F1 of predictions, for labels or for entities, from counts that a bootstrap can weigh."""

from collections import Counter
from collections.abc import Callable

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
    if task.kind != "entities":
        one_hot = np.eye(len(task.classes), dtype=bool)
        predicted, actual = one_hot[predictions], one_hot[task.targets(examples)]  # (examples, classes)
        return np.stack([predicted & actual, predicted, actual], axis=1).astype(np.float32)
    types = entity_types(task.classes)
    counts = np.zeros((len(examples), 3, len(types)), dtype=np.float32)
    tags = iter(task.classes[prediction] for prediction in predictions)
    for number, example in enumerate(examples):
        found = set(get_entities([next(tags) for _ in example.labels]))
        true = set(get_entities(list(example.labels)))
        for count, entities in ((TRUE_POSITIVES, found & true), (PREDICTED, found), (ACTUAL, true)):
            for entity_type, *_ in entities:
                counts[number, count, types.index(entity_type)] += 1
    return counts


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


def task_metrics(task: Task) -> dict[str, Metric]:
    """Returns the metrics that suit the task; the first is the usual one."""
    if task.kind == "entities":
        return {"micro_f1": micro_f1, "macro_f1": macro_f1}
    return {"accuracy": accuracy, "macro_f1": macro_f1, "micro_f1": micro_f1}


def choose_metric(task: Task, wanted: str) -> str:
    """Returns the name of the metric that models are compared by. Raises UserError where the task has no such one."""
    names = list(task_metrics(task))
    if wanted == "auto":
        return names[0]
    if wanted not in names:
        raise UserError(f"metric: {wanted} is not for entities; choose {' or '.join(names)}")
    return wanted


def score_majority_baseline(task: Task) -> tuple[str, dict[str, float]]:
    """Returns the most frequent training label, and the test scores, by metric, of always predicting it.

    There are none for entities, of which the most frequent tag finds none.
    """
    [(class_id, _)] = Counter(task.targets(task.train)).most_common(1)
    if task.kind == "entities":
        return task.classes[class_id], {}
    counts = count_predictions(task, [class_id] * len(task.test), task.test).sum(0)
    return task.classes[class_id], {name: float(metric(counts)) for name, metric in task_metrics(task).items()}
