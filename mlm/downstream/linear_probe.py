"""Linear probe: logistic regression on the features of a model that is not trained."""

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

from mlm.data.chunks import chunk_bounds
from mlm.data.micro_batches import MicroBatcher
from mlm.downstream.encoding import Encoded
from mlm.downstream.finetuning import split_chunks
from mlm.downstream.task import Task, group_by, stratum

REGULARIZATION_C = (0.001, 0.01, 0.1)  # LogisticRegression's C, an inverse strength, on features of unit variance


@torch.no_grad()
def features(encoder: nn.Module, encoded: Encoded, accelerator: Accelerator, micro_batcher: MicroBatcher) -> np.ndarray:
    """Returns the mean of the last hidden states over the tokens of each text, or word: (targets, hidden) float32."""
    encoder.eval()
    inside = np.flatnonzero(encoded.word_ids >= 0)
    pooled = encoded.chunks._replace(label_positions=inside, targets=encoded.word_ids[inside])
    tokens = np.bincount(encoded.word_ids[inside], minlength=len(encoded.chunks.targets))
    sums = torch.zeros(0)
    for inputs, words in split_chunks(pooled, micro_batcher):
        with accelerator.autocast():
            hidden = encoder(**inputs).float()  # (tokens, hidden)
        if not len(sums):
            sums = torch.zeros(len(tokens), hidden.shape[1], device=hidden.device)
        sums.index_add_(0, words, hidden)
    return sums.cpu().numpy() / np.maximum(tokens, 1)[:, None].astype(np.float32)  # a text without a token keeps zeros


def resample(task: Task, drawn: list[int], seed: int) -> list[int]:
    """Returns as many of the drawn training examples, drawn again with replacement within each class.

    So that seeds differ, though nothing in logistic regression is random: they show how much the training texts matter.
    (scikit-learn's `resample` takes no seed of 2**32 or more.)
    """
    rng = np.random.default_rng([seed, 3])
    by_class = group_by(drawn, lambda index: stratum(task.train[index], task.kind))
    return [index for members in by_class.values() for index in rng.choice(members, len(members)).tolist()]


def select_rows(task: Task, drawn: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows of the drawn examples in the features of all training texts, or words, and their class ids: (n,)
    each."""
    bounds = chunk_bounds(np.array([len(example.labels) for example in task.train]))
    rows = np.concatenate([np.arange(bounds[index], bounds[index + 1]) for index in drawn])
    return rows, np.array(task.targets(task.train))[rows]


def fit(
    train: np.ndarray, targets: np.ndarray, dev: np.ndarray, score_on_dev: Callable[[list[int]], float]
) -> tuple[ClassifierMixin, float, float]:
    """Fits logistic regression to features (n, hidden) and their class ids (n,), with the C that is best on dev.
    Returns the classifier, its C, and its score on dev."""
    if len(np.unique(targets)) == 1:  # by chance none but O was drawn
        constant = DummyClassifier().fit(train, targets)
        return constant, 0.0, score_on_dev(constant.predict(dev).tolist())
    fitted = []
    for c in REGULARIZATION_C:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300)).fit(train, targets)
        fitted.append((classifier, c, score_on_dev(classifier.predict(dev).tolist())))
    return max(fitted, key=lambda candidate: candidate[2])  # the strongest regularization of equals
