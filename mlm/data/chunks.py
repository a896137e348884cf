"""Lines cut into chunks of tokens, and the files that hold them: written once, memory-mapped by every run after.

A *chunk* is a line, or a part of a line too long for `sen_max_length`. Stored tokens are the text's alone: [CLS] and
[SEP] are put around each chunk when a batch is made. A token's highest bit says whether the token starts a word.
"""

import math
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlm.data.chinese import Segmenter
from mlm.data.text_files import Text, distinct, line_hash
from mlm.data.text_stats import SplitStats, TextStats, length_bins, unknown_causes
from mlm.data.tokenizer import Vocabulary
from mlm.data.words import Encoders, WordCounts, tokenize
from mlm.errors import UserError

COUNTED_AT_ONCE = 1 << 24  # tokens


@dataclass(frozen=True)
class Chunks:
    """The chunks of one split: chunk i is tokens[offsets[i]:offsets[i + 1]], one token or more."""

    tokens: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped; the highest bit: whether the token starts a word
    offsets: np.ndarray  # (chunks + 1,) int64
    lines: np.ndarray  # (chunks,) uint64, memory-mapped; a hash of the line that a chunk is from

    @classmethod
    def read(cls, path: Path) -> "Chunks":
        """Memory-maps what `write_chunks` wrote."""
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


def _word_bit(dtype: Any) -> int:
    """Returns the number of the highest bit."""
    return 8 * np.dtype(dtype).itemsize - 1


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Returns how many batches an epoch is; the last may be smaller."""
    return math.ceil(examples / batch_size)


class WrittenSplit(NamedTuple):
    """What `write_chunks` counts beside the chunks that it writes."""

    stats: SplitStats
    line_hashes: array  # (lines that are not blank,) uint64
    occurrences: np.ndarray  # (vocabulary,) int64: how often each token occurs
    words: WordCounts


def write_chunks(
    lines: Iterator[str], path: Path, body_length: int, encoders: Encoders, segmenter: Segmenter, vocabulary: Vocabulary
) -> WrittenSplit:
    """Tokenizes the lines, cuts them into chunks of at most `body_length` tokens and writes these to a new folder.

    Raw files come first, so that memory stays small for any text. Raises UserError where there is none.
    """
    path.mkdir()
    dtype = np.uint16 if vocabulary.size <= 2**15 else np.uint32  # the highest bit tells where words start
    all_lines = characters = 0
    causes: Counter[str] = Counter()
    line_hashes, line_lengths, chunk_lengths = array("Q"), array("q"), array("q")
    occurrences, words = np.zeros(vocabulary.size, dtype=np.int64), WordCounts()
    tokens_file, lines_file = path / "tokens", path / "lines"
    with open(tokens_file, "wb") as to_tokens, open(lines_file, "wb") as to_lines:
        for block in _blocks(lines):
            filled = list(filter(None, block))
            tokenized = tokenize(filled, encoders, vocabulary, segmenter)
            word_bits = np.left_shift(tokenized.starts_word.astype(dtype), _word_bit(dtype))
            (tokenized.tokens.astype(dtype) | word_bits).tofile(to_tokens)
            of_lines = np.split(tokenized.starts_word, np.cumsum(tokenized.lengths)[:-1])
            lengths = [cut_line(starts_word, body_length) for starts_word in of_lines]  # of each line's chunks
            hashes = np.array([line_hash(line) for line in filled], dtype=np.uint64)
            np.repeat(hashes, list(map(len, lengths))).tofile(to_lines)
            chunk_lengths.extend(chain.from_iterable(lengths))
            line_hashes.extend(hashes.tolist())
            all_lines += len(block)
            characters += sum(map(len, block))
            line_lengths.extend(tokenized.lengths.tolist())
            occurrences += np.bincount(tokenized.tokens, minlength=vocabulary.size)
            is_unknown = tokenized.tokens == vocabulary.unk_id
            if is_unknown.any():
                of_unknown = np.repeat(np.arange(len(filled)), tokenized.lengths)[is_unknown]  # their lines
                causes += unknown_causes([filled[line] for line in np.unique(of_unknown)], encoders.any_line)
            words.update(tokenized.tokens, tokenized.starts_spaced, vocabulary, tokenized.segmented)
    if not chunk_lengths:
        raise UserError(f"path_datasets: no line of {path.stem}* holds a token to train or test on")
    np.save(path / "offsets.npy", chunk_bounds(np.array(chunk_lengths)))
    for file, kind in ((tokens_file, dtype), (lines_file, np.uint64)):
        np.save(file.with_suffix(".npy"), np.memmap(file, kind, mode="r"))
        file.unlink()
    binned = np.histogram(line_lengths, [*length_bins(body_length), math.inf])[0]  # lines with a token, by their tokens
    stats = SplitStats(
        lines=all_lines,
        blank=all_lines - len(line_hashes),
        duplicate=len(line_hashes) - len(distinct(line_hashes)),
        dropped=len(line_hashes) - int(binned.sum()),
        characters=characters,
        tokens=int(occurrences.sum()),
        unknown=int(occurrences[vocabulary.unk_id]) if vocabulary.unk_id >= 0 else 0,
        chunks=len(chunk_lengths),
        line_lengths=binned.tolist(),
        unknown_causes=dict(causes),
    )
    return WrittenSplit(stats, line_hashes, occurrences, words)


def _blocks(lines: Iterator[str], characters: int = 1 << 19) -> Iterator[list[str]]:
    """Yields blocks of lines, of about `characters` each: enough to keep every core busy, and memory small."""
    block, size = [], 0
    for line in lines:
        block.append(line)
        size += len(line) + 1
        if size >= characters:
            yield block
            block, size = [], 0
    if block:
        yield block


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
