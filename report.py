"""What a run leaves for people: the metrics table, guesses before and after, the closing words."""

import csv
import json
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from storage import whole_file

COLUMNS = ("step", "epoch", "train_loss", "eval_loss", "perplexity", "masked_accuracy", "lr", "tokens_per_s")


class Evaluation(NamedTuple):
    """The model on the test text, masked by BERT's rule at 15% with masks that depend on the text alone."""

    loss: float  # nats per masked token
    accuracy: float  # share of masked tokens whose most likely guess is right
    masked_tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    def columns(self) -> dict[str, float]:
        return {"eval_loss": self.loss, "perplexity": self.perplexity, "masked_accuracy": self.accuracy}

    def __str__(self) -> str:
        return f"perplexity {self.perplexity:,.2f}, masked accuracy {self.accuracy:.1%}, {self.masked_tokens:,} tokens"


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp of more overflows a float


def write_json(path: Path, content: dict) -> None:
    with whole_file(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_metrics(path: Path, rows: list[dict]) -> None:
    """Writes metrics.csv, one row a log line or evaluation; what a row does not measure stays empty."""
    with whole_file(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


class Sentence(NamedTuple):
    """A test sentence and the place in it that is masked to show what the model guesses."""

    ids: list[int]  # between [CLS] and [SEP]
    place: int


def choose_sentences(
    chunks: Iterable[list[int]], tokenizer: PreTrainedTokenizerBase, number: int = 5
) -> list[Sentence]:
    """Up to five short ones of the chunks, spread evenly, each with a whole word near its middle to mask."""
    sentences = []
    for ids in chunks:
        tokens = [*tokenizer.convert_ids_to_tokens(ids), ""]
        words = [
            place
            for place, (token, after) in enumerate(pairwise(tokens))
            if token.isalpha() and (len(token) > 3 or not token.isascii()) and not after.startswith("##")
        ]
        if 8 <= len(ids) <= 24 and words and tokenizer.unk_token not in tokens:
            sentences.append(Sentence(ids, words[len(words) // 2]))
    return sentences[:: max(1, len(sentences) // 5)][:5]


@torch.no_grad()
def guess(model: torch.nn.Module, sentences: list[Sentence], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The model's three likeliest tokens for each sentence's masked place, with their probabilities."""
    device, guesses = next(model.parameters()).device, []
    model.eval()
    for ids, place in sentences:
        ids = [tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]
        ids[place + 1] = tokenizer.mask_token_id
        input_ids = torch.tensor([ids], device=device)  # (1, width)
        positions = torch.arange(len(ids), device=device)[None]
        logits = model(input_ids, positions, torch.ones_like(input_ids), torch.tensor([place + 1], device=device))
        shares, best = logits[0].float().softmax(-1).topk(3)
        words = tokenizer.convert_ids_to_tokens(best.tolist())
        guesses.append(", ".join(f"{word} {share:.0%}" for word, share in zip(words, shares.tolist(), strict=True)))
    return guesses


def compare_guesses(sentences: list[Sentence], before: list[str], after: list[str], tokenizer) -> list[str]:
    """Each sentence with its masked word, and the guesses before and after training."""
    lines = []
    for (ids, place), old, new in zip(sentences, before, after, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(ids)
        answer, tokens[place] = tokens[place], tokenizer.mask_token
        lines += ["", f"  {tokenizer.convert_tokens_to_string(tokens)}   ({answer})"]
        lines += [f"    before  {old}", f"    after   {new}"]
    return lines


def closing_words(before: Evaluation, after: Evaluation, found: dict, guesses: list[str], model: Path) -> str:
    """The end of the log: figures and guesses before and after, and where the model is."""
    tokens_per_character = found["test"]["tokens"] / found["test"]["characters"]
    unigram = found["unigram_perplexity"]
    rows = [
        ("", "before", "after"),
        ("perplexity", f"{before.perplexity:,.2f}", f"{after.perplexity:,.2f}"),
        ("masked accuracy", f"{before.accuracy:.1%}", f"{after.accuracy:.1%}"),
        ("nats per character", *(f"{each.loss * tokens_per_character:.3f}" for each in (before, after))),
        ("unigram perplexity", "", f"{unigram:,.2f}", f"perplexity / unigram = {after.perplexity / unigram:.2f}"),
    ]
    lines = [f"{name:<20}{old:>12}{new:>12}    {''.join(note)}".rstrip() for name, old, new, *note in rows]
    lines.append("(Perplexities compare between runs with the same tokenizer and sen_max_length; else compare nats.)")
    lines += guesses
    if after.loss >= before.loss:
        lines += ["", "warning: the test loss did not fall; the starting model serves this text as well"]
    call = f"""print(pipeline("fill-mask", "{model}")("Your text with a [MASK]."))"""
    return "\n".join([*lines, "", f"The model: {model}", f"  python -c 'from transformers import pipeline; {call}'"])
