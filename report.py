"""What a run leaves for people: the metrics table, guesses before and after, the closing words."""

import csv
import json
import math
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
        return f"perplexity {self.perplexity:,.2f}, masked accuracy {self.accuracy:.1%} on {self.masked_tokens:,} tokens"


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


def choose_sentences(chunks: list[list[int]], tokenizer: PreTrainedTokenizerBase, number: int = 5) -> list[Sentence]:
    """Up to `number` of the chunks, spread evenly, each with a whole word in its middle to mask."""
    sentences = []
    for ids in chunks:
        tokens = tokenizer.convert_ids_to_tokens(ids) + [""]
        words = [
            place
            for place, (token, after) in enumerate(zip(tokens, tokens[1:], strict=False))
            if token.isalpha() and (len(token) > 3 or not token.isascii()) and not after.startswith("##")
        ]
        if 8 <= len(ids) <= 24 and words and tokenizer.unk_token not in tokens:
            sentences.append(Sentence(ids, words[len(words) // 2]))
    step = max(1, len(sentences) // number)
    return sentences[::step][:number]


@torch.no_grad()
def guess(model: torch.nn.Module, sentences: list[Sentence], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The model's three likeliest tokens for each sentence's masked place, with their probabilities."""
    device, guesses = next(model.parameters()).device, []
    model.eval()
    for ids, place in sentences:
        hidden = ids[:place] + [tokenizer.mask_token_id] + ids[place + 1 :]
        input_ids = torch.tensor([[tokenizer.cls_token_id, *hidden, tokenizer.sep_token_id]], device=device)  # (1, width)
        positions = torch.arange(input_ids.shape[1], device=device)[None]
        logits = model(input_ids, positions, torch.ones_like(input_ids), torch.tensor([place + 1], device=device))
        shares, best = logits[0].float().softmax(-1).topk(3)
        words = tokenizer.convert_ids_to_tokens(best.tolist())
        guesses.append(", ".join(f"{word} {share:.0%}" for word, share in zip(words, shares.tolist(), strict=True)))
    return guesses


def closing_words(
    before: Evaluation,
    after: Evaluation,
    found: dict,
    sentences: list[Sentence],
    guesses: tuple[list[str], list[str]],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
) -> str:
    """The end of the log: figures and guesses before and after, and where the model is."""
    tokens_per_character = found["test"]["tokens"] / found["test"]["characters"]
    lines = [f"{'':<22}{'before':>12}{'after':>12}"]
    lines.append(f"{'perplexity':<22}{before.perplexity:>12,.2f}{after.perplexity:>12,.2f}")
    lines.append(f"{'masked accuracy':<22}{before.accuracy:>12.1%}{after.accuracy:>12.1%}")
    nats = [evaluation.loss * tokens_per_character for evaluation in (before, after)]
    lines.append(f"{'nats per character':<22}{nats[0]:>12.3f}{nats[1]:>12.3f}")
    unigram = found["unigram_perplexity"]
    lines.append(f"unigram perplexity of the same test text: {unigram:,.2f} (after / unigram = {after.perplexity / unigram:.2f})")
    lines.append("Perplexities compare only between runs with the same tokenizer and sen_max_length; else compare nats.")
    for sentence, old, new in zip(sentences, *guesses, strict=True):
        tokens = tokenizer.convert_ids_to_tokens(sentence.ids)
        answer, tokens[sentence.place] = tokens[sentence.place], tokenizer.mask_token
        lines.append(f"\n  {tokenizer.convert_tokens_to_string(tokens)}   ({answer})")
        lines.append(f"    before  {old}\n    after   {new}")
    if after.loss >= before.loss:
        lines.append("\nwarning: training did not lower the test loss; the starting model serves this text as well")
    lines.append(f'\nThe model: {folder}\n  from transformers import pipeline; pipeline("fill-mask", model="{folder}")')
    return "\n".join(lines)
