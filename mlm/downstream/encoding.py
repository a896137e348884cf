"""Labelled examples -> chunks for the model, and the order in which batches take them.

They are packed as training text is (mlm/data/packing.py): `masked` are the positions at which something is read off the
model, and `targets` what belongs there.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlm.data.packing import MaskedChunks, chunk_bounds, slice_chunks
from mlm.data.randomness import epoch_order
from mlm.data.tokenizer import Vocabulary, read_vocabulary
from mlm.data.words import make_encoders
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example


class Encoded(NamedTuple):
    """Examples as chunks: a text or a pair is one; a sentence of words, too, unless it is too long for one."""

    chunks: MaskedChunks  # masked: where each text's [CLS], or each word's first piece stands; targets: its class
    bounds: np.ndarray  # (examples + 1,) int64: the first chunk of each example, and the end of the last
    words: np.ndarray  # (positions,) int64: the number of the text or word that a position is of; -1 for [CLS], [SEP]
    answers: int  # texts, or words: as many as masked
    shortened: int  # examples that `sen_max_length` cut: texts lose their end, sentences become two chunks or more


def encode(examples: list[Example], task: Task, tokenizer: PreTrainedTokenizerBase, sen_max_length: int) -> Encoded:
    """Encodes examples as chunks of at most `sen_max_length` positions. Text that spells [SEP] is text."""
    vocabulary = read_vocabulary(tokenizer)
    encoder = make_encoders(tokenizer).any_line
    flat = [part for example in examples for part in example.parts]
    pieces = iter(encoder.encode_batch_fast(flat, add_special_tokens=False))
    ids: list[list[int]] = []
    words: list[list[int]] = []
    read_at: list[list[int]] = []  # in each chunk
    bounds = [0]
    answers = shortened = 0
    for example in examples:
        parts = [next(pieces).ids for _ in example.parts]
        if task.kind == "entities":
            framed = list(_frame_words(parts, answers, vocabulary, sen_max_length))
            answers += len(parts)
            shortened += len(framed) > 1
        else:
            framed = [_frame_text(parts, answers, vocabulary, sen_max_length)]
            answers += 1
            shortened += len(framed[0][0]) < sum(map(len, parts)) + len(parts) + 1
        for chunk_ids, chunk_words, chunk_read_at in framed:
            ids.append(chunk_ids)
            words.append(chunk_words)
            read_at.append(chunk_read_at)
        bounds.append(len(ids))
    lengths = np.array([len(chunk) for chunk in ids], dtype=np.int64)
    starts = chunk_bounds(lengths)[:-1]
    classes = {name: number for number, name in enumerate(task.classes)}
    chunks = MaskedChunks(
        input_ids=_join(ids),
        position_ids=np.arange(lengths.sum()) - np.repeat(starts, lengths),
        masked=_join(read_at) + np.repeat(starts, [len(chunk) for chunk in read_at]),
        targets=np.array([classes[label] for example in examples for label in example.labels], dtype=np.int64),
        lengths=lengths,
    )
    return Encoded(chunks, np.array(bounds), _join(words), answers, shortened)


def _join(lists: Iterable[list[int]]) -> np.ndarray:
    return np.array([value for some in lists for value in some], dtype=np.int64)


Framed = tuple[list[int], list[int], list[int]]  # a chunk's ids, the text or word of each, and where answers are read


def _frame_text(parts: list[list[int]], number: int, vocabulary: Vocabulary, longest: int) -> Framed:
    """[CLS] text [SEP], or [CLS] text [SEP] text [SEP]; of what is too long the longer text loses its end."""
    room = longest - 1 - len(parts)
    keep = [len(part) for part in parts]
    while sum(keep) > room:
        keep[keep.index(max(keep))] -= 1
    ids, words = [vocabulary.cls_id], [-1]
    for part, kept in zip(parts, keep, strict=True):
        ids += [*part[:kept], vocabulary.sep_id]
        words += [number] * kept + [-1]
    return ids, words, [0]


def _frame_words(parts: list[list[int]], number: int, vocabulary: Vocabulary, longest: int) -> Iterator[Framed]:
    """Words in as many chunks as they need. A word without a token is [UNK]; one longer than a chunk loses its end."""
    ids, words = [vocabulary.cls_id], [-1]
    read_at: list[int] = []
    for word, pieces in enumerate(parts, start=number):
        pieces = pieces[: longest - 2] or [vocabulary.unk_id]
        if len(ids) + len(pieces) + 1 > longest:
            yield [*ids, vocabulary.sep_id], [*words, -1], read_at
            ids, words, read_at = [vocabulary.cls_id], [-1], []
        read_at.append(len(ids))
        ids += pieces
        words += [word] * len(pieces)
    yield [*ids, vocabulary.sep_id], [*words, -1], read_at


def select(encoded: Encoded, indices: np.ndarray) -> MaskedChunks:
    """The chunks of the examples at some indices (n,), in that order."""
    positions = chunk_bounds(encoded.chunks.lengths)
    parts = [
        slice_chunks(encoded.chunks, positions, first, after)
        for first, after in zip(encoded.bounds[indices].tolist(), encoded.bounds[indices + 1].tolist(), strict=True)
    ]
    offsets = chunk_bounds(np.array([len(part.input_ids) for part in parts]))[:-1]
    return MaskedChunks(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        position_ids=np.concatenate([part.position_ids for part in parts]),
        masked=np.concatenate([part.masked + offset for part, offset in zip(parts, offsets, strict=True)]),
        targets=np.concatenate([part.targets for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
    )


def training_order(encoded: Encoded, batch_size: int, seed: int) -> Iterator[MaskedChunks]:
    """Batches of examples without end, in a new order every epoch. The seed alone decides it: all models see the same,
    however many tokens or chunks an example is to each."""
    examples, epoch = len(encoded.bounds) - 1, 0
    while True:
        order = epoch_order(seed, epoch, examples)
        for start in range(0, examples, batch_size):
            yield select(encoded, order[start : start + batch_size])
        epoch += 1
