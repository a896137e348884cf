"""Labelled examples -> chunks for the model, and the order in which batches take them.

They are packed as training text is (mlm/data/packing.py). Here the label positions are where the model's hidden
states are classified: [CLS] of each text, or the first subword of each word. Its `targets` are their class ids.
"""

from collections.abc import Iterator
from itertools import chain, count
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlm.data.chunks import chunk_bounds
from mlm.data.packing import Sequences, slice_chunks
from mlm.data.tokenizer import Vocabulary, read_vocabulary
from mlm.data.words import make_encoders
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example
from mlm.randomness import epoch_order


class Encoded(NamedTuple):
    """Examples as chunks: a text or a pair is one; a sentence of words, too, unless it is too long for one."""

    chunks: Sequences
    bounds: np.ndarray  # (examples + 1,) int64: the first chunk of each example, and the end of the last
    word_ids: np.ndarray  # (positions,) int64: index of the text or word at each position; -1 for [CLS] and [SEP]
    shortened: int  # examples longer than `sen_max_length`: texts lose their end, sentences become two chunks or more


Chunk = tuple[list[int], list[int]]  # input ids, with [CLS] and [SEP], and word ids as in Encoded


def encode(examples: list[Example], task: Task, tokenizer: PreTrainedTokenizerBase, sen_max_length: int) -> Encoded:
    """Encodes examples as chunks of at most `sen_max_length` positions. Text that spells [SEP] is text."""
    vocabulary = read_vocabulary(tokenizer)
    encoder = make_encoders(tokenizer).any_line
    is_sentence = task.kind == "entities"
    parts = [
        f" {part}" if is_sentence and number else part  # words of a sentence by themselves, each with the space before
        for example in examples
        for number, part in enumerate(example.parts)
    ]
    encodings = iter(encoder.encode_batch_fast(parts, add_special_tokens=False))
    chunks: list[Chunk] = []
    bounds = [0]
    words = shortened = 0
    for example in examples:
        ids = [next(encodings).ids for _ in example.parts]
        if is_sentence:
            chunks += _split_words(ids, words, vocabulary, sen_max_length)
            shortened += len(chunks) - bounds[-1] > 1
        else:
            chunks.append(_truncate_text(ids, words, vocabulary, sen_max_length))
            shortened += len(chunks[-1][0]) < sum(map(len, ids)) + _special_tokens(len(ids), vocabulary)
        bounds.append(len(chunks))
        words += len(example.labels)

    lengths = np.array([len(input_ids) for input_ids, _ in chunks])
    starts = chunk_bounds(lengths)[:-1]
    input_ids, word_ids = (np.array(list(chain.from_iterable(lists))) for lists in zip(*chunks, strict=True))
    first_subwords = np.unique(word_ids, return_index=True)[1][1:]  # behind that of -1
    packed = Sequences(
        input_ids=input_ids,
        position_ids=np.arange(lengths.sum()) - np.repeat(starts, lengths),
        label_positions=first_subwords if task.kind == "entities" else starts,
        targets=np.array(task.targets(examples)),
        lengths=lengths,
    )
    return Encoded(packed, np.array(bounds), word_ids, shortened)


def _split_words(words: list[list[int]], first_id: int, vocabulary: Vocabulary, max_length: int) -> Iterator[Chunk]:
    """Yields words in as many chunks as they need.

    words: ids of each word's subwords. A word without one is [UNK], or [MASK] where there is no such token; one longer
    than a chunk loses its end.
    """
    room = max_length - 2
    fitting: dict[int, list[int]] = {}
    for word_id, subwords in enumerate(words, start=first_id):
        subwords = subwords[:room] or [vocabulary.unk_id if vocabulary.unk_id >= 0 else vocabulary.mask_id]
        if sum(map(len, fitting.values())) + len(subwords) > room:
            yield _frame([fitting], vocabulary)
            fitting = {}
        fitting[word_id] = subwords
    yield _frame([fitting], vocabulary)


def _truncate_text(parts: list[list[int]], word_id: int, vocabulary: Vocabulary, max_length: int) -> Chunk:
    """Returns one or two texts (ids of each) in one chunk; where they are too long, the longer one loses its end."""
    room = max(0, max_length - _special_tokens(len(parts), vocabulary))
    keep = [len(part) for part in parts]
    while sum(keep) > room:
        keep[keep.index(max(keep))] -= 1
    return _frame([{word_id: part[:kept]} for part, kept in zip(parts, keep, strict=True)], vocabulary)


def _special_tokens(parts: int, vocabulary: Vocabulary) -> int:
    """Returns how many special tokens stand around and between one or two texts."""
    return 2 + (parts - 1) * vocabulary.separators


def _frame(segments: list[dict[int, list[int]]], vocabulary: Vocabulary) -> Chunk:
    """Returns [CLS], then each segment (from word ids to the ids of subwords) and [SEP]; two between segments where a
    family has two."""
    input_ids, word_ids = [vocabulary.cls_id], [-1]
    for number, segment in enumerate(segments):
        if number:
            input_ids += [vocabulary.sep_id] * (vocabulary.separators - 1)
            word_ids += [-1] * (vocabulary.separators - 1)
        for word_id, subwords in segment.items():
            input_ids += subwords
            word_ids += [word_id] * len(subwords)
        input_ids.append(vocabulary.sep_id)
        word_ids.append(-1)
    return input_ids, word_ids


def select(encoded: Encoded, indices: np.ndarray) -> Sequences:
    """Returns the chunks of the examples at some indices (n,), in that order."""
    positions = chunk_bounds(encoded.chunks.lengths)
    parts, before = [], 0
    for index in indices:
        part = slice_chunks(encoded.chunks, positions, encoded.bounds[index], encoded.bounds[index + 1])
        parts.append(part._replace(label_positions=part.label_positions + before))
        before += len(part.input_ids)
    return Sequences(*map(np.concatenate, zip(*parts, strict=True)))


def training_order(encoded: Encoded, batch_size: int, seed: int) -> Iterator[Sequences]:
    """Yields batches of examples without end, in a new order every epoch. The seed alone decides it: all models see the
    same, however many tokens or chunks an example is to each."""
    examples = len(encoded.bounds) - 1
    for epoch in count():
        order = epoch_order(seed, epoch, examples, np.arange(examples))
        for start in range(0, examples, batch_size):
            yield select(encoded, order[start : start + batch_size])
