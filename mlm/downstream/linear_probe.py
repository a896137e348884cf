"""A quick look: what logistic regression makes of a model's features, without training the model."""

from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from sklearn.base import ClassifierMixin
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from mlm.data.micro_batches import MicroBatcher
from mlm.downstream.encoding import Encoded
from mlm.downstream.finetuning import blocks
from mlm.downstream.task import Task

INVERSE_PENALTIES = (0.001, 0.01, 0.1)  # LogisticRegression's C, on features of unit variance


@torch.no_grad()
def features(encoder: nn.Module, encoded: Encoded, accelerator: Accelerator, micro_batcher: MicroBatcher) -> np.ndarray:
    """The mean of the last hidden states over each text's tokens, or each word's: (answers, hidden) float32."""
    encoder.eval()
    inside = np.flatnonzero(encoded.words >= 0)
    pooled = encoded.chunks._replace(masked=inside, targets=encoded.words[inside])
    sums, counts = torch.zeros(0), torch.zeros(0)
    for inputs, words in blocks(pooled, micro_batcher):
        with accelerator.autocast():
            hidden = encoder(**inputs).float()  # (tokens, hidden)
        if not len(sums):
            sums = torch.zeros(encoded.answers, hidden.shape[1], device=hidden.device)
            counts = torch.zeros(encoded.answers, 1, device=hidden.device)
        sums.index_add_(0, words, hidden)
        counts.index_add_(0, words, torch.ones_like(hidden[:, :1]))
    return (sums / counts.clamp(min=1)).cpu().numpy()  # a text without a token keeps zeros


def resample(task: Task, drawn: list[int], seed: int) -> list[int]:
    """As many of the drawn training examples again, drawn from them with replacement, each class by itself.

    So that seeds differ, though nothing in logistic regression is random: they show how much the training texts matter.
    """
    draw = np.random.default_rng([seed, 3])
    of_class: dict[str, list[int]] = {}
    for index in drawn:
        of_class.setdefault("" if task.kind == "entities" else task.train[index].labels[0], []).append(index)
    return [index for members in of_class.values() for index in draw.choice(members, len(members)).tolist()]


def rows_of(task: Task, drawn: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the texts, or words, of the drawn training examples stand among those of all, and their classes: (n,)."""
    numbers = {name: number for number, name in enumerate(task.classes)}
    classes = [[numbers[label] for label in example.labels] for example in task.train]
    ends = np.cumsum([len(of_example) for of_example in classes])  # (examples,)
    rows = [np.arange(ends[index] - len(classes[index]), ends[index]) for index in drawn]
    return np.concatenate(rows), np.concatenate([classes[index] for index in drawn])


def fit(
    train: np.ndarray, classes: np.ndarray, dev: np.ndarray, score_on_dev: Callable[[list[int]], float]
) -> tuple[ClassifierMixin, float, float]:
    """Logistic regression on features (n, hidden) and their classes (n,), its penalty chosen on dev.

    Returns the classifier, the inverse of the penalty, and its score on dev.
    """
    if len(np.unique(classes)) == 1:  # by chance none but O was drawn
        constant = DummyClassifier().fit(train, classes)
        return constant, 0.0, score_on_dev(constant.predict(dev).tolist())
    best = None
    for inverse_penalty in INVERSE_PENALTIES:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_penalty, max_iter=300))
        classifier.fit(train, classes)
        score = score_on_dev(classifier.predict(dev).tolist())
        if best is None or score > best[2]:
            best = (classifier, inverse_penalty, score)
    assert best
    return best
