"""Scores of answers: accuracy and F1, of labels or of entities, from counts that a bootstrap can weigh."""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from seqeval.metrics.sequence_labeling import get_entities

from mlm.downstream.task import Task, entity_kinds
from mlm.downstream.task_files import Example
from mlm.errors import UserError

RIGHT, GIVEN, TRUE = 0, 1, 2  # the three counts of a class: right answers, answers, and true labels or entities


def count_answers(task: Task, answers: list[int], examples: list[Example]) -> np.ndarray:
    """Counts (examples, 3, classes) of each example's answers that are right, of all, and of what is true.

    answers: the class of each example; for entities, the tag of each word, sentence after sentence. Entities are those
    of CoNLL-2000's evaluation, by seqeval, and the classes their kinds.
    """
    if task.kind == "entities":
        return _count_entities(task, answers, examples)
    classes = np.arange(len(task.classes))
    numbers = {name: number for number, name in enumerate(task.classes)}
    given = np.array(answers)[:, None] == classes  # (examples, classes)
    true = np.array([numbers[example.labels[0]] for example in examples])[:, None] == classes
    return np.stack([given & true, given, true], axis=1).astype(np.float32)


def _count_entities(task: Task, answers: list[int], examples: list[Example]) -> np.ndarray:
    kinds = entity_kinds(task.classes)
    numbers = {kind: number for number, kind in enumerate(kinds)}
    counts = np.zeros((len(examples), 3, len(kinds)), dtype=np.float32)
    start = 0
    for of_example, example in zip(counts, examples, strict=True):
        tags = [task.classes[answer] for answer in answers[start : start + len(example.labels)]]
        start += len(example.labels)
        given, true = set(get_entities(tags)), set(get_entities(list(example.labels)))
        for which, entities in ((RIGHT, given & true), (GIVEN, given), (TRUE, true)):
            for kind, *_ in entities:
                of_example[which, numbers[kind]] += 1
    return counts


# ------------------------------------------------------------------------------------ from counts, summed over examples


def accuracy(counts: np.ndarray) -> np.ndarray:
    """The share of right answers (...), for counts (..., 3, classes)."""
    return counts[..., RIGHT, :].sum(-1) / np.maximum(counts[..., TRUE, :].sum(-1), 1)


def micro_f1(counts: np.ndarray) -> np.ndarray:
    """F1 over all classes together (...), for counts (..., 3, classes)."""
    return _f1(counts.sum(-1, keepdims=True))[..., 0]


def macro_f1(counts: np.ndarray) -> np.ndarray:
    """The mean of the classes' F1 (...), for counts (..., 3, classes); of the classes that are true or given at all."""
    present = counts[..., GIVEN, :] + counts[..., TRUE, :] > 0
    return (_f1(counts) * present).sum(-1) / np.maximum(present.sum(-1), 1)


def _f1(counts: np.ndarray) -> np.ndarray:
    """(..., classes): 2 right / (given + true), and 0 where there is neither."""
    return 2 * counts[..., RIGHT, :] / np.maximum(counts[..., GIVEN, :] + counts[..., TRUE, :], 1)


Metric = Callable[[np.ndarray], np.ndarray]

OF_LABELS: dict[str, Metric] = {"accuracy": accuracy, "macro_f1": macro_f1, "micro_f1": micro_f1}
OF_ENTITIES: dict[str, Metric] = {"micro_f1": micro_f1, "macro_f1": macro_f1}


def metrics_of(task: Task) -> dict[str, Metric]:
    """The metrics that suit the task; the first is the usual one."""
    return OF_ENTITIES if task.kind == "entities" else OF_LABELS


class OneLabel(NamedTuple):
    """What always giving the commonest training label scores on the test."""

    label: str
    scores: dict[str, float]


def score_of_one_label(task: Task) -> OneLabel | None:
    """The least that a model should do better than; None for entities, of which the commonest tag finds none."""
    if task.kind == "entities":
        return None
    [(label, _)] = Counter(example.labels[0] for example in task.train).most_common(1)
    counts = count_answers(task, [task.classes.index(label)] * len(task.test), task.test).sum(0)
    return OneLabel(label, {name: float(metric(counts)) for name, metric in OF_LABELS.items()})


def choose_metric(task: Task, wanted: str) -> str:
    """The name of the metric that the models are compared by. Raises UserError where the task has none of that name."""
    names = list(metrics_of(task))
    if wanted == "auto":
        return names[0]
    if wanted not in names:
        raise UserError(f"metric: {wanted} is not for entities; choose {' or '.join(names)}")
    return wanted
