"""Masked chunks for the model: with [CLS] and [SEP] around each, packed into rows, and split into parts.

*n* is a number of chunks. *Tokens* are the text's own; *positions* count [CLS], [SEP] and padding too.
"""

import math
from collections.abc import Iterator
from heapq import heapreplace
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from mlm.data.tokenizer import Vocabulary


class MaskedChunks(NamedTuple):
    """Chunks end to end, each between its own [CLS] and [SEP], some of their tokens masked."""

    input_ids: np.ndarray  # (positions,) int64
    position_ids: np.ndarray  # (positions,) int64: restart at 0 with every chunk
    masked: np.ndarray  # (masked,) int64, ascending: where a token is to be predicted
    targets: np.ndarray  # (masked,) int64: that token
    lengths: np.ndarray  # (n,) int64: positions in each chunk, [CLS] and [SEP] included


class Rows(NamedTuple):
    """Chunks packed into rows of one width; a block-diagonal attention mask keeps them apart."""

    input_ids: np.ndarray  # (rows, width) int64
    position_ids: np.ndarray  # (rows, width) int64
    segment_ids: np.ndarray  # (rows, width) int64: 1, 2, ... for the chunks; 0 is padding
    masked: np.ndarray  # (masked,) int64, ascending: indices into the flattened rows
    targets: np.ndarray  # (masked,) int64


class Batch(NamedTuple):
    """A rank's share of the batch of an optimizer step, and what it is a share of."""

    chunks: MaskedChunks  # the rank's share
    masked_tokens: int  # of the whole batch
    tokens: int  # of the whole batch


def frame(
    input_ids: np.ndarray, masked: np.ndarray, targets: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary
) -> MaskedChunks:
    """Returns what `mask` returned with [CLS] and [SEP], which are not to be predicted, around each of n chunks."""
    framed_lengths = lengths + 2
    starts = chunk_bounds(framed_lengths)[:-1]
    inside = np.arange(len(input_ids)) + np.repeat(2 * np.arange(len(lengths)) + 1, lengths)
    framed = np.full(len(input_ids) + 2 * len(lengths), vocabulary.sep_id)
    framed[starts] = vocabulary.cls_id
    framed[inside] = input_ids
    position_ids = np.arange(len(framed)) - np.repeat(starts, framed_lengths)
    return MaskedChunks(framed, position_ids, inside[masked], targets, framed_lengths)


def chunk_bounds(lengths: ArrayLike) -> np.ndarray:
    """Returns where each chunk begins, and where the last ends: (n + 1,) int64 for lengths (n,)."""
    return np.concatenate([[0], np.cumsum(lengths)])


def slice_chunks(chunks: MaskedChunks, bounds: np.ndarray, first: int, after: int) -> MaskedChunks:
    """Returns the chunks from `first` to the one before `after`, as views; bounds: `chunk_bounds` of their lengths."""
    begin, end = bounds[first], bounds[after]
    ids = (chunks.input_ids[begin:end], chunks.position_ids[begin:end])
    predicted = slice(*chunks.masked.searchsorted((begin, end)))
    return MaskedChunks(*ids, chunks.masked[predicted] - begin, chunks.targets[predicted], chunks.lengths[first:after])


def pack(chunks: MaskedChunks, row_positions: int, vocabulary: Vocabulary) -> Rows:
    """Packs chunks into as few rows as hold them, evenly: the longest first, each into the row that holds the least
    (Graham 1969, doi 10.1137/0117039), so that little is padded.

    Rows hold about `row_positions`, at most a chunk more. With no chunk there is one position of padding.
    """
    lengths = chunks.lengths
    rows_needed = max(1, math.ceil(len(chunks.input_ids) / max(row_positions, lengths.max(initial=1))))
    rows_of, offsets = [0] * len(lengths), [0] * len(lengths)
    emptiest = [(0, row) for row in range(rows_needed)]  # a heap of the positions in each row
    longest_first = np.argsort(-lengths, kind="stable")
    for chunk, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        held, row = emptiest[0]
        rows_of[chunk], offsets[chunk] = row, held
        heapreplace(emptiest, (held + length, row))

    width = max(1, max(held for held, _ in emptiest))
    new_starts = np.array(rows_of, dtype=np.int64) * width + np.array(offsets, dtype=np.int64)  # (n,)
    old_starts = chunk_bounds(lengths)[:-1]
    places = np.arange(len(chunks.input_ids)) + np.repeat(new_starts - old_starts, lengths)  # in the flattened rows

    def in_rows(values: np.ndarray, padding: int) -> np.ndarray:
        flat = np.full(rows_needed * width, padding)
        flat[places] = values
        return flat.reshape(rows_needed, width)

    masked = places[chunks.masked]
    ascending = np.argsort(masked)
    return Rows(
        input_ids=in_rows(chunks.input_ids, vocabulary.pad_id),
        position_ids=in_rows(chunks.position_ids, 0),
        segment_ids=in_rows(np.repeat(np.arange(1, len(lengths) + 1), lengths), 0),
        masked=masked[ascending],
        targets=chunks.targets[ascending],
    )


def split_chunks(chunks: MaskedChunks, positions: int) -> Iterator[MaskedChunks]:
    """Yields the chunks, in their order, in parts of at most `positions`, or of one chunk that has more."""
    if len(chunks.input_ids) <= positions:  # which most batches do
        yield chunks
        return
    bounds, first = chunk_bounds(chunks.lengths), 0
    while first < len(chunks.lengths):
        after = int(np.searchsorted(bounds, bounds[first] + positions, side="right")) - 1
        after = max(after, first + 1)
        yield slice_chunks(chunks, bounds, first, after)
        first = after


def split_rows(rows: Rows, positions: int) -> Iterator[Rows]:
    """Yields rows in even parts of at most `positions`, or of one row that has more."""
    height, width = rows.input_ids.shape
    parts = math.ceil(height / max(1, positions // width))
    rows_each = math.ceil(height / parts)
    for first in range(0, height, rows_each):
        part = slice(first, first + rows_each)
        ids = (rows.input_ids[part], rows.position_ids[part], rows.segment_ids[part])
        begin, end = first * width, (first + rows_each) * width
        predicted = slice(*rows.masked.searchsorted((begin, end)))
        yield Rows(*ids, rows.masked[predicted] - begin, rows.targets[predicted])
