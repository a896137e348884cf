"""Scores against scikit-learn's and seqeval's."""

import numpy as np
import pytest
from seqeval import metrics as seqeval_metrics
from sklearn import metrics as sklearn_metrics

from mlm.downstream.metrics import accuracy, choose_metric, count_predictions, macro_f1, micro_f1
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example
from mlm.errors import UserError


def task_of(kind, classes, test):
    return Task("t", kind, classes, train=[], dev=[], test=test, notes=[])


def test_scores_of_labels_are_scikit_learns():
    draw = np.random.default_rng(0)
    classes = ["a", "b", "c", "never"]
    true, given = draw.integers(0, 3, 200), draw.integers(0, 3, 200)
    examples = [Example(("text",), (classes[label],)) for label in true]
    counts = count_predictions(task_of("text", classes, examples), given.tolist(), examples)
    summed = counts.sum(0)
    assert accuracy(summed) == pytest.approx(sklearn_metrics.accuracy_score(true, given))
    assert macro_f1(summed) == pytest.approx(sklearn_metrics.f1_score(true, given, average="macro"))
    assert micro_f1(summed) == pytest.approx(sklearn_metrics.f1_score(true, given, average="micro"))

    weights = draw.integers(0, 4, 200)  # as the bootstrap repeats and leaves out texts
    expected = sklearn_metrics.f1_score(true, given, average="macro", sample_weight=weights)
    assert macro_f1(np.tensordot(weights, counts, 1)) == pytest.approx(expected)


def test_scores_of_entities_are_seqevals():
    draw = np.random.default_rng(0)
    tags = ["B-drug", "B-gene", "I-drug", "I-gene", "O"]
    true = [draw.choice(tags, draw.integers(1, 12)).tolist() for _ in range(80)]
    given = [draw.choice(tags, len(sentence)).tolist() for sentence in true]
    examples = [Example(("word",) * len(sentence), tuple(sentence)) for sentence in true]
    answers = [tags.index(tag) for sentence in given for tag in sentence]
    summed = count_predictions(task_of("entities", tags, examples), answers, examples).sum(0)
    assert micro_f1(summed) == pytest.approx(seqeval_metrics.f1_score(true, given, average="micro"))
    assert macro_f1(summed) == pytest.approx(seqeval_metrics.f1_score(true, given, average="macro"))


def test_a_metric_that_the_task_lacks_is_named():
    entities = task_of("entities", ["B-a", "O"], [])
    assert choose_metric(entities, "auto") == "micro_f1"
    assert choose_metric(task_of("text", ["a", "b"], []), "auto") == "accuracy"
    with pytest.raises(UserError, match="metric: accuracy"):
        choose_metric(entities, "accuracy")
