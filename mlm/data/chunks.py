"""Lines cut into chunks of tokens, and the files that hold them: written once, memory-mapped by every run after.

A *chunk* is a line, or a part of a line too long for `sen_max_length`. Stored tokens are the text's alone: [CLS] and
[SEP] are put around each chunk when a batch is made. A token's highest bit says whether the token starts a word.
"""

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlm.data.text_stats import TextStats
from mlm.data.tokenizer import Vocabulary
from mlm.text.files import Text

COUNTED_AT_ONCE = 1 << 24  # tokens


@dataclass(frozen=True)
class Chunks:
    """The chunks of one split: chunk i is tokens[offsets[i]:offsets[i + 1]], one token or more."""

    tokens: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped; the highest bit: whether the token starts a word
    offsets: np.ndarray  # (chunks + 1,) int64
    lines: np.ndarray  # (chunks,) uint64, memory-mapped; a hash of the line that a chunk is from

    @classmethod
    def read(cls, path: Path) -> "Chunks":
        """Memory-maps the files of one split."""
        return cls(*(np.asarray(np.load(path / f"{field.name}.npy", mmap_mode="r")) for field in fields(cls)))

    def __len__(self) -> int:
        return len(self.offsets) - 1


def chunk_bounds(lengths: np.ndarray) -> np.ndarray:
    """Returns where each chunk begins, and where the last ends: (n + 1,) int64 for lengths (n,) end to end."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


def take(chunks: Chunks, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the tokens (tokens,) int64 of the chunks at `indices` (n,) end to end, the chunks' lengths (n,), and
    whether each token starts a word (tokens,) bool."""
    lengths = chunks.offsets[indices + 1] - chunks.offsets[indices]
    skipped = chunks.offsets[indices] - chunk_bounds(lengths)[:-1]
    marked = chunks.tokens[np.arange(lengths.sum()) + np.repeat(skipped, lengths)]
    word_bit = _word_bit(marked.dtype)
    return (marked & ((1 << word_bit) - 1)).astype(np.int64), lengths, (marked >> word_bit).astype(bool)


def count_tokens(chunks: Chunks, vocabulary_size: int) -> np.ndarray:
    """Returns how often each token occurs in the chunks: (vocabulary,) int64."""
    counts = np.zeros(vocabulary_size, dtype=np.int64)
    ids = (1 << _word_bit(chunks.tokens.dtype)) - 1
    for start in range(0, len(chunks.tokens), COUNTED_AT_ONCE):
        counts += np.bincount(chunks.tokens[start : start + COUNTED_AT_ONCE] & ids, minlength=vocabulary_size)
    return counts


def token_dtype(vocabulary_size: int) -> np.dtype:
    """Returns the type of stored tokens, whose highest bit says where words start."""
    return np.dtype(np.uint16 if vocabulary_size <= 2**15 else np.uint32)


def with_word_bits(tokens: np.ndarray, starts_word: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """Returns tokens (tokens,) as they are stored, with whether each starts a word (tokens,) bool."""
    dtype = token_dtype(vocabulary_size)
    return tokens.astype(dtype) | np.left_shift(starts_word.astype(dtype), _word_bit(dtype))


def _word_bit(dtype: Any) -> int:
    """Returns the number of the highest bit."""
    return 8 * np.dtype(dtype).itemsize - 1


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Returns how many batches an epoch is; the last may be smaller."""
    return math.ceil(examples / batch_size)


def cut_line(starts_word: np.ndarray, limit: int) -> list[int]:
    """Returns the lengths of the chunks that a line is cut into.

    starts_word: (tokens,) bool, whether a token starts a word. A chunk has at most `limit` tokens and ends where a word
    does; only a word that is longer than `limit` by itself is cut inside.
    """
    if len(starts_word) <= limit:
        return [len(starts_word)] if len(starts_word) else []
    word_starts = np.append(np.flatnonzero(starts_word), len(starts_word))
    bounds = [0]
    while bounds[-1] < len(starts_word):
        furthest = bounds[-1] + limit
        last_word_start = int(word_starts[np.searchsorted(word_starts, furthest, side="right") - 1])
        bounds.append(last_word_start if last_word_start > bounds[-1] else furthest)
    return [end - start for start, end in pairwise(bounds)]


class GeneralText(NamedTuple):
    """Text that is not of the domain, by which it is measured what a model forgets."""

    digest: str
    train: Chunks  # what is replayed; the test text's where nothing is
    test: Chunks
    stats: TextStats


class Corpus(NamedTuple):
    """The text of a run, its tokenizer, its chunks and its statistics."""

    text: Text
    tokenizer: PreTrainedTokenizerBase
    added_words: dict[str, list[int]]  # to the tokenizer, each with the ids of its subwords
    vocabulary: Vocabulary
    train: Chunks
    test: Chunks
    stats: TextStats
    general: GeneralText | None = None
