"""What a run leaves for people: the metrics table, guesses before and after, the closing words."""

import csv
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from transformers import BertForMaskedLM, PreTrainedTokenizerBase, pipeline

from storage import whole

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
        return (
            f"perplexity {figure(self.perplexity)}, masked accuracy {self.accuracy:.1%}, {self.masked_tokens:,} tokens"
        )


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))  # exp of more overflows a float


def figure(value: float) -> str:
    return f"{value:,.2f}" if value < 1e8 else f"{value:.2e}"


def write_json(path: Path, content: dict) -> None:
    with whole(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_metrics(path: Path, rows: list[dict]) -> None:
    """Writes metrics.csv, one row a log line or evaluation; what a row does not measure stays empty."""
    with whole(path) as beside, open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def hide_words(lines: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """Up to five short lines, spread evenly, each with a one-token word near its middle masked: (line, word)."""
    hidden = []
    for line in lines:
        if not 20 <= len(line) <= 90 or tokenizer.mask_token in line:
            continue
        words = re.finditer(r"[\u4e00-\u9fff]|[^\W\d_\u4e00-\u9fff]{4,}", line)  # a Chinese character, or four letters
        words = [word for word in words if len(tokenizer.tokenize(word[0])) == 1]
        if words and tokenizer.unk_token not in tokenizer.tokenize(line):
            start, end = words[len(words) // 2].span()
            hidden.append((line[:start] + tokenizer.mask_token + line[end:], line[start:end]))
    return hidden[:: max(1, len(hidden) // 5)][:5]


def guess(model: BertForMaskedLM, hidden: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The model's three likeliest words for the masked place of each line, with their probabilities."""
    fill_mask = pipeline("fill-mask", model=model.eval(), tokenizer=tokenizer, device=model.device, top_k=3)
    guesses = [fill_mask(line) for line, _ in hidden]
    return ["   ".join(f"{each['token_str']} {each['score']:.0%}" for each in three) for three in guesses]


def closing_words(
    before: dict,
    after: dict,
    found: dict,
    skipped: int,
    guesses: Iterable[tuple[tuple[str, str], str, str]],
    model: Path,
) -> str:
    """The end of the log: the first and the last row of metrics.csv, each hidden word with its guesses, the model.

    found: see data_process.prepare. skipped: steps that trained nothing.
    """
    tokens_per_character = found["test"]["tokens"] / found["test"]["characters"]
    unigram = found["unigram_perplexity"]
    rows = [
        ("", "before", "after"),
        ("perplexity", *(figure(each["perplexity"]) for each in (before, after))),
        ("masked accuracy", *(f"{each['masked_accuracy']:.1%}" for each in (before, after))),
        ("nats per character", *(f"{each['eval_loss'] * tokens_per_character:.3f}" for each in (before, after))),
        ("unigram perplexity", "", figure(unigram), f"perplexity / unigram = {figure(after['perplexity'] / unigram)}"),
    ]
    lines = [f"{name:<20}{old:>12}{new:>12}    {''.join(note)}".rstrip() for name, old, new, *note in rows]
    lines.append("(Perplexities compare between runs with the same tokenizer and sen_max_length; else compare nats.)")
    for (line, word), old, new in guesses:
        lines += ["", f"  {line}   ({word})", f"    before  {old}", f"    after   {new}"]
    if not after["eval_loss"] < before["eval_loss"]:
        lines += ["", "warning: the test loss did not fall; the starting model serves this text as well"]
    if skipped:
        lines += ["", f"warning: steps skipped, as their loss or gradient was not finite: {skipped:,}"]
    call = f"""print(pipeline("fill-mask", "{model}")("Your text with a [MASK]."))"""
    return "\n".join([*lines, "", f"The model: {model}", f"  python -c 'from transformers import pipeline; {call}'"])
