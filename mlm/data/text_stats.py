"""Statistics of the text, collected while it is prepared, and warnings by them."""

import math
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer

from mlm.data.tokenizer import is_wordpiece
from mlm.data.words import SplitWord

MANY_UNKNOWN = 0.05  # share of [UNK] that is worth a warning
SHOWN_SPLIT_WORDS = 30  # the most frequent
WORTH_NAMING = 0.2  # share of the [UNK] that have the same cause
SAMPLED_CHARACTERS = 4096  # of the lines with [UNK] among those that are tokenized at once
UNCASED = BertNormalizer(lowercase=True)

# Why words are [UNK], beside the scripts of the letters that no token has.
LONG, LOWER_CASE, CAPITALS, SIGN, PIECES = "long", "lower case", "capitals", "sign", "pieces"
CAUSES = {
    LONG: "words of more than 100 characters, which are one [UNK] each, whatever the vocabulary",
    LOWER_CASE: 'words that it has in lower case and without accents alone: say "do_lower_case": true in the '
    "tokenizer_config.json",
    CAPITALS: 'words that it has with their capitals, which the tokenizer removes: say "do_lower_case": false in the '
    "tokenizer_config.json",
    SIGN: "signs, such as emoji, that it lacks",
    PIECES: "words that no tokens of it make up",
}


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
    unknown_causes: dict[str, int] = field(default_factory=dict)  # words that are [UNK] in a sample, by why


@dataclass(frozen=True)
class TextStats:
    """Statistics of both splits."""

    train: SplitStats
    test: SplitStats
    test_lines_in_train: int
    unigram_perplexity: float  # on the test tokens, each predicted by its frequency in the training text
    split_words: list[SplitWord]  # words that the vocabulary has no token for, the most frequent first
    removable_lines: int = 0  # of the training text, that repeat an earlier one or stand in the test text

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "TextStats":
        """Reads what dataclasses.asdict and JSON made of it."""
        splits = {name: SplitStats(**content[name]) for name in ("train", "test")}
        words = content.pop("broken_words" if "broken_words" in content else "split_words")  # as they once were called
        return cls(**content | splits | {"split_words": [SplitWord(*word) for word in words]})


def add_stats(one: SplitStats, other: SplitStats) -> SplitStats:
    """Returns the counts of two parts of a split together."""
    added = {name: count + getattr(other, name) for name, count in vars(one).items() if isinstance(count, int)}
    line_lengths = [sum(pair) for pair in zip(one.line_lengths, other.line_lengths, strict=True)]
    causes = Counter(one.unknown_causes) + Counter(other.unknown_causes)
    return SplitStats(**added, line_lengths=line_lengths, unknown_causes=dict(causes))


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


def unknown_causes(lines: list[str], encoder: Tokenizer) -> Counter[str]:
    """Counts the words that are [UNK] by their cause, a key of `CAUSES` or a script, in a sample of lines; none but of
    WordPiece, of which it is known."""
    if not is_wordpiece(encoder):
        return Counter()
    sample = "\n".join(lines)[:SAMPLED_CHARACTERS]
    encoding = encoder.encode(sample, add_special_tokens=False)
    unknown = encoder.token_to_id(encoder.model.unk_token)
    spans = [span for span, token in zip(encoding.offsets, encoding.ids, strict=True) if token == unknown]
    causes: Counter[str] = Counter()
    for word, count in Counter(sample[first:after] for first, after in spans).items():
        causes[_unknown_cause(word, encoder)] += count
    return causes


def _unknown_cause(word: str, encoder: Tokenizer) -> str:
    model = encoder.model

    def is_known(form: str) -> bool:
        tokens = [token.value for token in model.tokenize(form)]
        return bool(tokens) and model.unk_token not in tokens

    seen = encoder.normalizer.normalize_str(word).strip() if encoder.normalizer else word
    if len(seen) > model.max_input_chars_per_word:
        return LONG
    if is_known(UNCASED.normalize_str(seen).strip()):
        return LOWER_CASE
    if is_known(word):
        return CAPITALS
    prefix = model.continuing_subword_prefix
    lacking = [c for c in seen if encoder.token_to_id(c) is None and encoder.token_to_id(prefix + c) is None]
    letters = filter(str.isalpha, lacking)
    scripts = (unicodedata.name(letter, "another").partition(" ")[0] for letter in letters)
    return next(scripts, SIGN if lacking else PIECES)


def describe_equal_lines(stats: TextStats, are_left_out: bool) -> str:
    """Returns what `drop_duplicates` does to the text, or would do; "" where that is nothing."""
    if not stats.removable_lines:
        return ""
    lines = f"{stats.removable_lines:,} training line(s) that repeat an earlier one or stand in the test text"
    return f"left out: {lines}" if are_left_out else f"--drop_duplicates would leave out {lines}"


def text_warnings(stats: TextStats, tokenizer_name: str, only_test: bool) -> list[str]:
    """Returns a line for each thing that looks wrong with the text, or with the tokenizer for it."""
    warnings = [
        f"warning: {split.unknown / split.tokens:.0%} of the {name} tokens are [UNK]{_explain(split, tokenizer_name)}"
        for name, split in used_splits(stats, only_test).items()
        if split.unknown / split.tokens > MANY_UNKNOWN
    ]
    if stats.test_lines_in_train and not only_test:
        warnings.append("warning: the model is tested on lines it is trained on, so its perplexity will flatter it")
    return warnings


def _explain(split: SplitStats, tokenizer_name: str) -> str:
    """Returns the rest of a sentence that says of what kinds the [UNK] are, as far as that was counted."""
    vocabulary = "the learned vocabulary" if tokenizer_name == "corpus" else f"the vocabulary of {tokenizer_name}"
    all_causes = sum(split.unknown_causes.values())
    kinds = []
    for cause, count in sorted(split.unknown_causes.items(), key=lambda item: -item[1]):
        if count < WORTH_NAMING * all_causes:
            continue
        remedy = "" if tokenizer_name == "corpus" else ", so it is most likely for another language"
        if remedy and cause == "CJK":
            remedy += "; for Chinese set initial_pretrain_model and initial_pretrain_tokenizer to bert-base-chinese"
        kind = CAUSES.get(
            cause, f"words with {cause if cause == 'CJK' else cause.capitalize()} letters that it lacks{remedy}"
        )
        kinds.append(f"{count / all_causes:.0%} {kind}")
    return f". Of a sample, seen by {vocabulary}: {'; '.join(kinds)}" if kinds else ""
