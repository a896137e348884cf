"""predictions.csv: lines of the test text, the same with hidden tokens, and what the finished model fills in."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import BatchEncoding, BertForMaskedLM, PreTrainedTokenizerBase

from mlm.masking import BERT_RULE, content_keys, mask
from mlm.storage import atomic_write
from mlm.vocabulary import Vocabulary

MOST_LINES = 100
LINES_AT_ONCE = 4  # few, as the logits of every position need much memory
SEEN_AS_MASKS = BERT_RULE._replace(mask_share=1.0, random_share=0.0)  # else a kept token would not be seen to be hidden


class Prediction(NamedTuple):
    """A line as it is, with some tokens hidden, and with the model's likeliest token in their places."""

    src: str
    mask: str
    pred: str


class _HiddenLine(NamedTuple):
    line: str
    ids: list[int]  # framed by [CLS] and [SEP], some of them [MASK]
    masked: list[int]  # places in `ids`
    spans: list[tuple[int, int]]  # of these tokens, in the line


def save_predictions(
    path: Path,
    lines: Iterable[str],
    model: BertForMaskedLM,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: Vocabulary,
    sen_max_length: int,
) -> None:
    """Writes a CSV of the first lines that fit a chunk; the hidden tokens are those of evaluations."""
    hidden: list[_HiddenLine] = []
    for line in lines:
        if len(hidden) == MOST_LINES:
            break
        encoded = tokenizer(line, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if 0 < len(encoded["input_ids"]) <= sen_max_length - 2:
            hidden.append(_hide(line, encoded, vocabulary))
    predictions: list[Prediction] = []
    for start in range(0, len(hidden), LINES_AT_ONCE):
        predictions += _predict(hidden[start : start + LINES_AT_ONCE], model, tokenizer)
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Prediction._fields)
        writer.writerows(predictions)


def _hide(line: str, encoded: BatchEncoding, vocabulary: Vocabulary) -> _HiddenLine:
    """Hides the tokens that an evaluation hides."""
    tokens = np.array(encoded["input_ids"], dtype=np.int64)
    lengths = np.array([len(tokens)])
    ids, masked, _ = mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, SEEN_AS_MASKS)
    framed = [vocabulary.cls_id, *ids.tolist(), vocabulary.sep_id]
    return _HiddenLine(line, framed, (masked + 1).tolist(), [encoded["offset_mapping"][place] for place in masked])


@torch.no_grad()
def _predict(hidden: list[_HiddenLine], model: BertForMaskedLM, tokenizer: PreTrainedTokenizerBase) -> list[Prediction]:
    padded = tokenizer.pad({"input_ids": [each.ids for each in hidden]}, return_tensors="pt").to(model.device)
    logits = model.eval()(**padded).logits  # (lines, positions, vocabulary)
    found = []
    for each, scores in zip(hidden, logits, strict=True):
        likeliest = tokenizer.convert_ids_to_tokens(scores[each.masked].argmax(-1).tolist())
        pieces = [token.removeprefix("##") for token in likeliest]
        masks = [tokenizer.mask_token] * len(pieces)
        found.append(Prediction(each.line, _fill(each.line, each.spans, masks), _fill(each.line, each.spans, pieces)))
    return found


def _fill(line: str, spans: list[tuple[int, int]], parts: list[str]) -> str:
    """The line with a part in the place of each span."""
    for (start, end), part in reversed(list(zip(spans, parts, strict=True))):
        line = line[:start] + part + line[end:]
    return line
