"""Scores against scikit-learn's and seqeval's."""

import numpy as np
import pytest
from seqeval import metrics as seqeval_metrics
from sklearn import metrics as sklearn_metrics

from mlm.downstream.metrics import accuracy, choose_metric, count_predictions, macro_f1, micro_f1
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example
from mlm.errors import UserError


def make_task(kind, classes, test):
    return Task("t", kind, classes, train=[], dev=[], test=test, notes=[])


def test_scores_of_labels_are_scikit_learns():
    draw = np.random.default_rng(0)
    classes = ["a", "b", "c", "never"]
    actual, predicted = draw.integers(0, 3, 200), draw.integers(0, 3, 200)
    examples = [Example(("text",), (classes[label],)) for label in actual]
    counts = count_predictions(make_task("text", classes, examples), predicted.tolist(), examples)
    summed = counts.sum(0)
    assert accuracy(summed) == pytest.approx(sklearn_metrics.accuracy_score(actual, predicted))
    assert macro_f1(summed) == pytest.approx(sklearn_metrics.f1_score(actual, predicted, average="macro"))
    assert micro_f1(summed) == pytest.approx(sklearn_metrics.f1_score(actual, predicted, average="micro"))

    weights = draw.integers(0, 4, 200)  # as the bootstrap repeats and leaves out texts
    expected = sklearn_metrics.f1_score(actual, predicted, average="macro", sample_weight=weights)
    assert macro_f1(np.tensordot(weights, counts, 1)) == pytest.approx(expected)


def test_scores_of_entities_are_seqevals():
    draw = np.random.default_rng(0)
    tags = ["B-drug", "B-gene", "I-drug", "I-gene", "O"]
    actual = [draw.choice(tags, draw.integers(1, 12)).tolist() for _ in range(80)]
    predicted = [draw.choice(tags, len(sentence)).tolist() for sentence in actual]
    examples = [Example(("word",) * len(sentence), tuple(sentence)) for sentence in actual]
    predictions = [tags.index(tag) for sentence in predicted for tag in sentence]
    summed = count_predictions(make_task("entities", tags, examples), predictions, examples).sum(0)
    assert micro_f1(summed) == pytest.approx(seqeval_metrics.f1_score(actual, predicted, average="micro"))
    assert macro_f1(summed) == pytest.approx(seqeval_metrics.f1_score(actual, predicted, average="macro"))


def test_a_metric_that_the_task_lacks_is_named():
    entities = make_task("entities", ["B-a", "O"], [])
    assert choose_metric(entities, "auto") == "micro_f1"
    assert choose_metric(make_task("text", ["a", "b"], []), "auto") == "accuracy"
    with pytest.raises(UserError, match="metric: accuracy"):
        choose_metric(entities, "accuracy")
