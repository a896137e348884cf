"""The reference that packed training and evaluation are held to: transformers' own BERT on padded chunks, one a row.

It knows nothing of how the product frames, packs and divides chunks.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BertForMaskedLM

from mlm.data.tokenizer import Vocabulary

IGNORED = -100  # the label of a position where nothing is predicted, in transformers


class Padded(NamedTuple):
    """Chunks as the stock model takes them, (chunks, longest) each."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Score(NamedTuple):
    """What a model makes of padded chunks."""

    loss: Tensor  # the mean over the masked tokens
    right: int
    masked_tokens: int


def labelled(input_ids: np.ndarray, masked: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The input ids, and labels of their shape as the stock models take them."""
    assert (np.diff(masked) > 0).all()
    labels = np.full(input_ids.size, IGNORED)
    labels[masked] = targets
    return input_ids, labels.reshape(input_ids.shape)


def pad(
    input_ids: np.ndarray, masked: np.ndarray, targets: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary
) -> Padded:
    """One chunk a row, between [CLS] and [SEP], padded to the longest; takes what `mask` returns, and the lengths."""
    _, labels = labelled(input_ids, masked, targets)
    shape = len(lengths), int(lengths.max()) + 2
    padded = Padded(
        torch.full(shape, vocabulary.pad_id), torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED)
    )
    start = 0
    for row, length in enumerate(lengths.tolist()):
        inside = slice(start, start + length)
        ids = [vocabulary.cls_id, *input_ids[inside].tolist(), vocabulary.sep_id]
        padded.input_ids[row, : length + 2] = torch.tensor(ids)
        padded.attention_mask[row, : length + 2] = 1
        padded.labels[row, 1 : length + 1] = torch.from_numpy(labels[inside])
        start += length
    return padded


def score(model: BertForMaskedLM, padded: Padded) -> Score:
    """By the stock forward pass and its own loss, which look at every position."""
    output = model(**padded._asdict())
    right = (output.logits.argmax(-1) == padded.labels).sum().item()
    return Score(output.loss, right, int((padded.labels != IGNORED).sum()))
