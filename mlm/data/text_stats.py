"""Statistics of the text, collected while it is prepared, and warnings by them."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mlm.data.words import SplitWord

MANY_UNKNOWN = 0.05  # share of [UNK] that is worth a warning
SHOWN_SPLIT_WORDS = 30  # the most frequent


@dataclass(frozen=True)
class SplitStats:
    """Counts of one split of the text."""

    lines: int
    blank: int  # lines
    duplicate: int  # lines that repeat an earlier one, blank ones aside
    dropped: int  # lines without a token, blank ones aside
    characters: int
    tokens: int
    unknown: int  # tokens that are [UNK]
    chunks: int
    line_lengths: list[int]  # lines by their tokens, binned by `length_bins`, and those longer than a chunk


@dataclass(frozen=True)
class TextStats:
    """Statistics of both splits."""

    train: SplitStats
    test: SplitStats
    test_lines_in_train: int
    unigram_perplexity: float  # on the test tokens, each predicted by its frequency in the training text
    split_words: list[SplitWord]  # words that the vocabulary has no token for, the most frequent first

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TextStats":
        """Reads what dataclasses.asdict and JSON made of it."""
        splits = {name: SplitStats(**content[name]) for name in ("train", "test")}
        words = content.pop("broken_words" if "broken_words" in content else "split_words")  # as they once were called
        return cls(**content | splits | {"split_words": [SplitWord(*word) for word in words]})


def length_bins(body_length: int) -> list[int]:
    """Returns the bounds of at most 16 bins of equal width, from 1 on, for the tokens of a line that fits a chunk."""
    width = math.ceil(body_length / 16)
    return [*range(1, body_length + 1, width), body_length + 1]


def histogram(split: SplitStats, sen_max_length: int) -> list[tuple[str, int]]:
    """Returns each bin of lines by their tokens: label and lines. Those of the last are too long for a chunk."""
    bounds = length_bins(sen_max_length - 2)
    labels = [f"{first} to {after - 1}" if after - 1 > first else str(first) for first, after in pairwise(bounds)]
    return list(zip([*labels, f"over {bounds[-1] - 1}"], split.line_lengths, strict=True))


def used_splits(stats: TextStats, only_test: bool) -> dict[str, SplitStats]:
    """Returns the splits that a run uses, by name."""
    return {"test": stats.test} if only_test else {"train": stats.train, "test": stats.test}


def text_warnings(stats: TextStats, tokenizer_name: str, only_test: bool) -> list[str]:
    """Returns a line for each thing that looks wrong with the text, or with the tokenizer for it."""
    warnings = [
        f"warning: {split.unknown / split.tokens:.0%} of the {name} tokens are [UNK]. Most likely {tokenizer_name} is "
        "for another language; for Chinese set initial_pretrain_model and initial_pretrain_tokenizer to "
        "bert-base-chinese"
        for name, split in used_splits(stats, only_test).items()
        if split.unknown / split.tokens > MANY_UNKNOWN
    ]
    if stats.test_lines_in_train and not only_test:
        warnings.append("warning: the model is tested on lines it is trained on, so its perplexity will flatter it")
    return warnings
