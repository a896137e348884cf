"""Masked chunks for the model: with [CLS] and [SEP] around each, packed into rows, and split into parts.

*n* is a number of chunks. *Tokens* are the text's own; *positions* count [CLS], [SEP] and padding too.
"""

import math
from collections.abc import Iterator
from heapq import heapreplace
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlm.data.chunks import chunk_bounds
from mlm.data.tokenizer import Vocabulary

# Rows are as wide as a multiple of this. The CPU's library of 16-bit kernels compiles and keeps one for every new
# shape, so shapes should come again; and it is a width that neither its kernels nor a GPU's have to round up.
WIDTH_STEP = 16


class Sequences(NamedTuple):
    """Chunks end to end, each between its own [CLS] and [SEP], and what is to be predicted of them."""

    input_ids: np.ndarray  # (positions,) int64
    position_ids: np.ndarray  # (positions,) int64: restart at 0 with every chunk
    label_positions: np.ndarray  # (targets,) int64, ascending: where something is to be predicted
    targets: np.ndarray  # (targets,) int64: what, such as the token that was masked there
    lengths: np.ndarray  # (n,) int64: positions in each chunk, [CLS] and [SEP] included

    @property
    def tokens(self) -> int:
        """The text's own."""
        return len(self.input_ids) - 2 * len(self.lengths)


class Rows(NamedTuple):
    """Chunks packed into rows of one width; a block-diagonal attention mask keeps them apart."""

    input_ids: np.ndarray  # (rows, width) int64
    position_ids: np.ndarray  # (rows, width) int64
    segment_ids: np.ndarray  # (rows, width) int64: 1, 2, ... for the chunks; 0 is padding
    label_positions: np.ndarray  # (targets,) int64, ascending: indices into the flattened rows
    targets: np.ndarray  # (targets,) int64


def frame(
    input_ids: np.ndarray, masked: np.ndarray, targets: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary
) -> Sequences:
    """Returns what `mask` returned with [CLS] and [SEP], which are not to be predicted, around each of n chunks."""
    framed = lengths + 2
    starts = chunk_bounds(framed)[:-1]
    positions = len(input_ids) + 2 * len(lengths)
    inside = np.arange(len(input_ids)) + np.repeat(2 * np.arange(len(lengths)) + 1, lengths)
    chunks = Sequences(
        input_ids=np.full(positions, vocabulary.sep_id),
        position_ids=np.arange(positions) - np.repeat(starts, framed),
        label_positions=inside[masked],
        targets=targets,
        lengths=framed,
    )
    chunks.input_ids[starts] = vocabulary.cls_id
    chunks.input_ids[inside] = input_ids
    return chunks


def slice_chunks(chunks: Sequences, bounds: np.ndarray, first: int, after: int) -> Sequences:
    """Returns the chunks from `first` to the one before `after`, as views; bounds: `chunk_bounds` of their lengths."""
    begin, end = bounds[first], bounds[after]
    predicted = slice(*chunks.label_positions.searchsorted((begin, end)))
    return Sequences(
        input_ids=chunks.input_ids[begin:end],
        position_ids=chunks.position_ids[begin:end],
        label_positions=chunks.label_positions[predicted] - begin,
        targets=chunks.targets[predicted],
        lengths=chunks.lengths[first:after],
    )


def slice_shares(chunks: Sequences, bounds: np.ndarray) -> Iterator[Sequences]:
    """Yields the chunks in shares, as views; bounds: (shares + 1,) the first chunk of each, and where the last ends."""
    positions = chunk_bounds(chunks.lengths)
    for first, after in pairwise(bounds.tolist()):
        yield slice_chunks(chunks, positions, first, after)


def join(one: Sequences, other: Sequences) -> Sequences:
    """Returns the chunks of both."""
    label_positions = other.label_positions + len(one.input_ids)
    pairs = zip(one, other._replace(label_positions=label_positions), strict=True)
    return Sequences(*map(np.concatenate, pairs))


def pack(chunks: Sequences, row_positions: int, vocabulary: Vocabulary) -> Rows:
    """Packs chunks into as few rows as hold them, evenly: the longest first, each into the row that holds the least
    (Graham 1969, doi 10.1137/0117039), so that little is padded.

    Rows hold about `row_positions`, at most a chunk more, and are padded to a multiple of WIDTH_STEP.
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

    width = WIDTH_STEP * math.ceil(max(1, max(held for held, _ in emptiest)) / WIDTH_STEP)
    shape = (rows_needed, width)
    new_starts = np.array(rows_of, dtype=np.int64) * width + np.array(offsets, dtype=np.int64)  # (n,)
    old_starts = chunk_bounds(lengths)[:-1]
    places = np.arange(len(chunks.input_ids)) + np.repeat(new_starts - old_starts, lengths)  # in the flattened rows
    label_positions = places[chunks.label_positions]
    ascending = np.argsort(label_positions)
    rows = Rows(
        input_ids=np.full(shape, vocabulary.pad_id),
        position_ids=np.zeros(shape, dtype=np.int64),
        segment_ids=np.zeros(shape, dtype=np.int64),
        label_positions=label_positions[ascending],
        targets=chunks.targets[ascending],
    )
    rows.input_ids.reshape(-1)[places] = chunks.input_ids
    rows.position_ids.reshape(-1)[places] = chunks.position_ids
    rows.segment_ids.reshape(-1)[places] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return rows


def split_chunks(chunks: Sequences, positions: int) -> Iterator[Sequences]:
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
        some_rows = slice(first, first + rows_each)
        begin = first * width
        predicted = slice(*rows.label_positions.searchsorted((begin, begin + rows_each * width)))
        yield Rows(
            input_ids=rows.input_ids[some_rows],
            position_ids=rows.position_ids[some_rows],
            segment_ids=rows.segment_ids[some_rows],
            label_positions=rows.label_positions[predicted] - begin,
            targets=rows.targets[predicted],
        )
