"""The reference that packed training and evaluation are held to: transformers' own BERT on padded chunks, one a row.

It knows nothing of how the product frames, packs and divides chunks.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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


def attention_by_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    longest_query: int,
    longest_key: int,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """What torch's kernels for variable lengths compute, for want of a GPU as a loop of its attention; as strict as
    they are about what comes in. States are (tokens, heads, head size)."""
    assert query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    assert query_starts is key_starts and query_starts.dtype == torch.int32
    assert query_starts[0] == 0 and query_starts[-1] == len(query)
    assert longest_query == longest_key == query_starts.diff().max()
    before, after = (longest_query if size < 0 else size for size in window_size)
    parts = []
    for start, end in query_starts.unfold(0, 2, 1):
        chunk = (states[start:end].transpose(0, 1) for states in (query, key, value))
        distance = torch.arange(end - start) - torch.arange(end - start)[:, None]  # from a query to a key behind it
        is_near = (-before <= distance) & (distance <= after)
        parts.append(F.scaled_dot_product_attention(*chunk, attn_mask=is_near).transpose(0, 1))
    return torch.cat(parts)


def score(model: BertForMaskedLM, padded: Padded) -> Score:
    """By the stock forward pass and its own loss, which look at every position."""
    output = model(**padded._asdict())
    right = (output.logits.argmax(-1) == padded.labels).sum().item()
    return Score(output.loss, right, int((padded.labels != IGNORED).sum()))
