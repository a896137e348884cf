"""predictions.csv: lines of the test text, the same with hidden tokens, and what the finished model fills in."""

import csv
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from transformers import BatchEncoding

from mlm.masking import BERT_RULE, content_keys, mask
from mlm.state import Run
from mlm.storage import atomic_write

MOST_LINES = 100
SEEN_AS_MASKS = BERT_RULE._replace(mask_share=1.0, random_share=0.0)  # else a kept token would not be seen to be hidden


class Prediction(NamedTuple):
    """A line as it is, with some tokens hidden, and with the model's likeliest token in their places."""

    src: str
    mask: str
    pred: str


def save_predictions(run: Run) -> None:
    """Writes a CSV of the first test lines that fit a chunk; the hidden tokens are those of evaluations."""
    tokenizer, longest = run.data.tokenizer, run.config.sen_max_length - 2  # without [CLS] and [SEP]
    options = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    encoded = ((line, tokenizer(line, **options)) for line in run.data.text.test())
    fitting = ((line, tokens) for line, tokens in encoded if 0 < len(tokens["input_ids"]) <= longest)
    run.bert.eval()
    path = run.folder / "predictions.csv"
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Prediction._fields)
        writer.writerows(predict(run, line, tokens) for line, tokens in islice(fitting, MOST_LINES))


@torch.no_grad()
def predict(run: Run, line: str, encoded: BatchEncoding) -> Prediction:
    """Hides the tokens of a line that an evaluation hides, and has the model fill them in."""
    tokenizer, vocabulary = run.data.tokenizer, run.data.vocabulary
    tokens = np.array(encoded["input_ids"], dtype=np.int64)
    lengths = np.array([len(tokens)])
    ids, masked, _ = mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, SEEN_AS_MASKS)
    framed = torch.tensor([[vocabulary.cls_id, *ids.tolist(), vocabulary.sep_id]], device=run.bert.device)
    logits = run.bert(framed).logits[0, 1:-1]  # (tokens, vocabulary)
    likeliest = tokenizer.convert_ids_to_tokens(logits[masked].argmax(-1).tolist())
    spans = [encoded["offset_mapping"][place] for place in masked]
    return Prediction(
        src=line,
        mask=_fill(line, spans, [tokenizer.mask_token] * len(spans)),
        pred=_fill(line, spans, [token.removeprefix("##") for token in likeliest]),
    )


def _fill(line: str, spans: list[tuple[int, int]], parts: list[str]) -> str:
    """The line with a part in the place of each span."""
    for (start, end), part in reversed(list(zip(spans, parts, strict=True))):
        line = line[:start] + part + line[end:]
    return line
