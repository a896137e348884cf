"""What a model fills in for hidden tokens: its guesses for a hidden word, and predictions.csv."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import BertForMaskedLM, PreTrainedTokenizerBase

from mlm.data.chunks import Corpus
from mlm.data.masking import BERT_RULE, content_keys, mask
from mlm.data.words import make_encoders
from mlm.evaluation.hidden_words import Guess, HiddenWord, first_chunk
from mlm.storage import write_csv

MOST_LINES = 100  # of predictions.csv
# Every chosen token becomes [MASK]: a reader would not see that one which stays as it is was chosen.
ALL_BECOME_MASK = BERT_RULE._replace(mask_share=1.0, random_share=0.0)


def token_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Returns the ids (tokens,) that a token has, ascending: a model may have rows that no token has."""
    return torch.tensor(sorted(tokenizer.get_vocab().values()))


@torch.no_grad()
def fill_in(model: BertForMaskedLM, input_ids: np.ndarray, places: np.ndarray, candidates: Tensor) -> Tensor:
    """Returns the probability (places, candidates) that each candidate, a token's id, stands at a place of a text.

    input_ids: the text, (positions,); places: indices into it, (places,).
    """
    logits = model.eval()(torch.from_numpy(input_ids).to(model.device)[None]).logits  # (1, positions, vocabulary)
    return logits[0, places].float().cpu()[:, candidates].softmax(-1)


def guess(model: BertForMaskedLM, hidden: list[HiddenWord], tokenizer: PreTrainedTokenizerBase) -> list[list[Guess]]:
    """Returns the model's three likeliest words for the [MASK] of each line."""
    guesses, candidates, encoder = [], token_ids(tokenizer), make_encoders(tokenizer).any_line
    for line, _ in hidden:
        before, after = (
            encoder.encode(part, add_special_tokens=False).ids for part in line.split(tokenizer.mask_token)
        )
        ids = [tokenizer.cls_token_id, *before, tokenizer.mask_token_id, *after, tokenizer.sep_token_id]
        [probabilities] = fill_in(model, np.array(ids), np.array([1 + len(before)]), candidates)
        top = probabilities.topk(3)
        likeliest = zip(candidates[top.indices].tolist(), top.values.tolist(), strict=True)
        guesses.append([Guess(str(tokenizer.decode([token])), probability) for token, probability in likeliest])
    return guesses


def save_predictions(path: Path, model: BertForMaskedLM, corpus: Corpus, sen_max_length: int) -> None:
    """Writes a CSV of the first test lines, or of the first chunk of those that are longer."""
    write_csv(path, ("src", "mask", "pred"), islice(predict(model, corpus, sen_max_length), MOST_LINES))


def predict(model: BertForMaskedLM, corpus: Corpus, sen_max_length: int) -> Iterator[dict[str, str]]:
    """Yields each test line, or its first chunk: as it is, with the tokens hidden that evaluations hide, and with the
    model's likeliest tokens in their places."""
    tokenizer, vocabulary, candidates = corpus.tokenizer, corpus.vocabulary, token_ids(corpus.tokenizer)
    encoder = make_encoders(tokenizer).any_line
    for whole_line in corpus.text.test():
        line, tokens, spans = first_chunk(whole_line, sen_max_length - 2, encoder, vocabulary)
        if not len(tokens):
            continue
        lengths = np.array([len(tokens)])
        ids, masked, _ = mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, ALL_BECOME_MASK)
        framed = np.concatenate([[vocabulary.cls_id], ids, [vocabulary.sep_id]])
        likeliest = candidates[fill_in(model, framed, masked + 1, candidates).argmax(-1)].tolist()
        guessed = [token.removeprefix("##") for token in tokenizer.convert_ids_to_tokens(likeliest)]
        spans = [spans[place] for place in masked]
        yield {
            "src": line,
            "mask": _replace(line, spans, [tokenizer.mask_token] * len(spans)),
            "pred": _replace(line, spans, guessed),
        }


def _replace(line: str, spans: list[tuple[int, int]], parts: list[str]) -> str:
    """Returns the line with a part in the place of each span."""
    for (start, end), part in reversed(list(zip(spans, parts, strict=True))):
        line = line[:start] + part + line[end:]
    return line
