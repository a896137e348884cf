"""Lines -> token chunks (cached, memory-mapped) -> masked, packed batches.

A *chunk* is a line, or a part of a line too long for `sen_max_length`. Stored tokens are the text's alone: [CLS] and
[SEP] are put around each chunk when a batch is packed. *n* is a number of chunks, *tokens* the tokens in all of them.
"""

import json
import math
from array import array
from collections.abc import Iterator
from functools import partial
from heapq import heapreplace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from Config import MOST_AUTOMATIC_WORDS, Config, UserError
from storage import digest, once
from text import Text, line_hash
from vocabulary import Vocabulary, read_vocabulary
from words import WordCounts, describe_words, make_encoders, make_segmenter, read_words, tokenize

SPAN_WORDS = 3.8  # the mean length of a span
MASKED_AT_ONCE = 1 << 15  # tokens: enough that numpy's calls cost little, few enough for the cache
CACHE_FORMAT = 2  # raise when what the cache holds changes

# ------------------------------------------------------------------------------------------------ lines -> chunks


class Chunks(NamedTuple):
    """The chunks of one split: chunk i is tokens[offsets[i]:offsets[i + 1]], one token or more."""

    tokens: np.ndarray  # (tokens,) uint16 or uint32, memory-mapped; the highest bit: whether the token starts a word
    offsets: np.ndarray  # (chunks + 1,) int64

    @classmethod
    def read(cls, path: Path) -> "Chunks":
        column = Dataset.from_file(str(path)).data.column("tokens").chunk(0)
        return cls(*(array.to_numpy(zero_copy_only=True) for array in (column.values, column.offsets)))

    @property
    def number(self) -> int:
        return len(self.offsets) - 1

    def lengths(self, indices: np.ndarray) -> np.ndarray:
        """The tokens in each of the chunks at `indices` (n,): (n,)."""
        return self.offsets[indices + 1] - self.offsets[indices]


def prepare(
    config: Config, text: Text, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> tuple[Chunks, Chunks, dict]:
    """The training chunks, the test chunks and what was found in the text (see `describe_text`).

    Tokenized and cut once for each text, tokenizer and `sen_max_length`, and kept on disk. Raises UserError where a
    split holds no token.
    """
    encoders = make_encoders(tokenizer)
    user_words = read_words(config.user_words, "user_words")
    versions = [version(name) for name in ("tokenizers", "rjieba")]
    key = digest(CACHE_FORMAT, versions, text.digest, config.sen_max_length, encoders.any_line.to_str(), user_words)

    def make(folder):
        folder.mkdir()
        body_length = config.sen_max_length - 2  # without [CLS] and [SEP]
        write = partial(_write_chunks, encoders, make_segmenter(user_words), vocabulary, body_length)
        train_counts, train_lines, train_tokens, train_words = write(text.train(), folder / "train.arrow")
        test_counts, test_lines, test_tokens, _ = write(text.test(), folder / "test.arrow")
        log_share = np.log((train_tokens + 1) / (train_tokens + 1).sum())
        found = {
            "train": train_counts,
            "test": test_counts,
            "test_lines_in_train": int(np.isin(test_lines, train_lines).sum()),
            "unigram_perplexity": math.exp(-(test_tokens @ log_share) / test_tokens.sum()),
            "broken_words": train_words.broken(encoders.any_line, MOST_AUTOMATIC_WORDS),
        }
        (folder / "found.json").write_text(json.dumps(found))

    folder = once(Path(config.path_model_save) / ".cache" / f"text-{key}", make)
    train, test = (Chunks.read(folder / f"{split}.arrow") for split in ("train", "test"))
    return train, test, json.loads((folder / "found.json").read_text())


def _write_chunks(encoders, segmenter, vocabulary, body_length, lines, path):
    """Tokenizes and cuts the lines into an Arrow file: one column, one list of tokens a chunk, all in one record batch.

    One batch makes one flat array to index, so the tokens go to a plain file first: memory stays small for any text.
    Returns the counts to report, the hashes of the lines that are not blank, how often each token occurs, and how often
    words do.
    """
    dtype = np.uint16 if vocabulary.size <= 1 << 15 else np.uint32  # as compact as the vocabulary and a bit allow
    counts = dict.fromkeys(("lines", "blank", "dropped", "characters"), 0)
    hashes, lengths = array("Q"), array("q")
    occurrences, word_counts = np.zeros(vocabulary.size, dtype=np.int64), WordCounts()
    tokens_file = path.with_suffix(".tokens")
    with open(tokens_file, "wb") as file:
        for block in _blocks(lines):
            texts = [line for line in block if line]
            counts["lines"] += len(block)
            counts["blank"] += len(block) - len(texts)
            counts["characters"] += sum(map(len, texts))
            hashes.extend(map(line_hash, texts))
            tokens, line_lengths, starts_word, words = tokenize(texts, encoders, vocabulary.continues_word, segmenter)
            (tokens.astype(dtype) | starts_word.astype(dtype) << _highest_bit(dtype)).tofile(file)
            occurrences += np.bincount(tokens, minlength=vocabulary.size)
            word_counts.update(tokens, vocabulary.continues_word, words)
            for length, end in zip(line_lengths.tolist(), np.cumsum(line_lengths).tolist(), strict=True):
                if length > body_length:
                    lengths.extend(cut(starts_word[end - length : end], body_length))
                elif length:
                    lengths.append(length)
                else:
                    counts["dropped"] += 1
    if not lengths:
        raise UserError(f"path_datasets: no line of {path.stem}*.txt holds a token to train or test on")
    counts["duplicate"] = len(hashes) - len(np.unique(hashes))
    counts["tokens"] = sum(lengths)
    counts["unknown"] = int(occurrences[vocabulary.unk_id])
    counts["chunks"] = len(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    column = pa.LargeListArray.from_arrays(offsets, np.memmap(tokens_file, dtype, mode="r"))
    table = pa.table({"tokens": column})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    tokens_file.unlink()
    return counts, hashes, occurrences, word_counts


def _highest_bit(dtype) -> int:
    return 8 * np.dtype(dtype).itemsize - 1


def _blocks(lines: Iterator[str], characters: int = 1 << 19) -> Iterator[list[str]]:
    """Groups lines into blocks of about so many characters, enough to keep every core busy and memory small."""
    block, size = [], 0
    for line in lines:
        block.append(line)
        size += len(line) + 1
        if size >= characters:
            yield block
            block, size = [], 0
    if block:
        yield block


def cut(starts_word: np.ndarray, limit: int) -> list[int]:
    """The lengths of the chunks that a line is cut into.

    starts_word: (tokens,) bool, whether a token starts a word. A chunk has at most `limit` tokens and ends where a word
    does; only a word that is longer than `limit` by itself is cut inside.
    """
    if len(starts_word) <= limit:
        return [len(starts_word)] if len(starts_word) else []
    word_starts = np.append(np.flatnonzero(starts_word), len(starts_word))
    cuts = [0]
    while cuts[-1] < len(starts_word):
        furthest = cuts[-1] + limit
        word_start = int(word_starts[np.searchsorted(word_starts, furthest, side="right") - 1])
        cuts.append(word_start if word_start > cuts[-1] else furthest)
    return [end - start for start, end in pairwise(cuts)]


def words_to_add(config: Config, text: Text, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The words that `add_words` names: a file's, or those of the text that the tokenizer breaks most often."""
    if config.automatic_words is None:
        return read_words(config.add_words, "add_words")
    _, _, found = prepare(config, text, tokenizer, read_vocabulary(tokenizer))
    return [word for word, *_ in found["broken_words"][: config.automatic_words]]


def describe_text(found: dict, tokenizer_name: str) -> str:
    """What `prepare` found, for people: a line a split, then warnings."""
    lines, warnings = [], []
    for split in ("train", "test"):
        counts = found[split]
        unknown = counts["unknown"] / counts["tokens"]
        per_line = counts["tokens"] / (counts["lines"] - counts["blank"])
        numbers = ", ".join(f"{counts[kind]:,} {kind}" for kind in ("lines", "blank", "duplicate", "dropped"))
        lines.append(
            f"   {split:<5}  {numbers}; {counts['tokens']:,} tokens, {per_line:.1f} a line, {unknown:.2%} [UNK]; "
            f"{counts['chunks']:,} chunks"
        )
        if unknown > 0.05:
            warnings.append(
                f"warning: {unknown:.0%} of the {split} tokens are [UNK]. Most likely {tokenizer_name} is for another "
                "language; for Chinese set initial_pretrain_model and initial_pretrain_tokenizer to bert-base-chinese"
            )
    overlap = found["test_lines_in_train"]
    lines.append(f"   test lines that are also training lines: {overlap:,}")
    if overlap:
        warnings.append("warning: the model is tested on lines it is trained on, so its perplexity will flatter it")
    return "\n".join([*lines, describe_words(found["broken_words"]), *warnings])


# --------------------------------------------------------------------------------------- chunks -> masked batches


class MaskRule(NamedTuple):
    """How tokens are chosen and replaced (Devlin et al., BERT, arXiv 1810.04805, section 3.1 and appendix A.1)."""

    probability: float = 0.15  # that a token, or a word, is chosen
    mask_share: float = 0.8  # of the chosen: become [MASK]
    random_share: float = 0.1  # of the chosen: become a random ordinary token; the rest stay
    whole_words: bool = False
    spans: bool = False  # of whole words


BERT_RULE = MaskRule()


class MaskedChunks(NamedTuple):
    """Chunks end to end, each between its own [CLS] and [SEP], some of their tokens hidden."""

    input_ids: np.ndarray  # (positions,) int64
    position_ids: np.ndarray  # (positions,) int64: restart at 0 with every chunk
    masked: np.ndarray  # (masked,) int64, ascending: where a token is to be predicted
    targets: np.ndarray  # (masked,) int64: that token
    lengths: np.ndarray  # (n,) int64: positions in each chunk, [CLS] and [SEP] included


class Rows(NamedTuple):
    """Chunks packed into rows of one width."""

    input_ids: np.ndarray  # (rows, width) int64
    position_ids: np.ndarray  # (rows, width) int64
    sequence_ids: np.ndarray  # (rows, width) int64: 1, 2, ... number the chunks; 0 is padding
    masked: np.ndarray  # (masked,) int64, ascending: indices into the flattened rows
    targets: np.ndarray  # (masked,) int64


ORDER, MASKS = 1, 2  # streams of random numbers that must not meet
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _mix(bits: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit integers: the finaliser of SplitMix64 (Steele, Lea and Flood, doi 10.1145/2660193.2660195)."""
    for shift, factor in MIX:
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def noise(*counters: int | np.ndarray, after: np.ndarray | None = None) -> np.ndarray:
    """64 random bits for each tuple of counters, which broadcast against each other. No state: a hash, chained.

    A mask drawn from (seed, epoch, chunk, position) is the same whatever the batch, the device or an interruption.
    noise(a, b) is noise(b, after=noise(a)).
    """
    bits = np.zeros(1, dtype=np.uint64) if after is None else after
    for counter in counters:
        bits = _mix(bits + np.uint64(0x9E3779B97F4A7C15) + np.asarray(counter).astype(np.uint64))
    return bits


def _bound(probability: float) -> np.uint64:
    """What 64 random bits are below with this probability. To compare integers is faster than to make fractions."""
    return np.uint64(min(round(probability * 2**64), 2**64 - 1))


def epoch_order(seed: int, epoch: int, number: int) -> np.ndarray:
    """The order in which an epoch visits the chunks: a permutation (number,) of their indices."""
    return np.argsort(noise(seed, ORDER, epoch, np.arange(number)), kind="stable")


def take(chunks: Chunks, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tokens (tokens,) int64 of some chunks end to end, the chunks' lengths (n,), and whether each token starts a
    word (tokens,) bool."""
    lengths = chunks.lengths(indices)
    skipped = chunks.offsets[indices] - (np.cumsum(lengths) - lengths)
    marked = chunks.tokens[np.arange(lengths.sum()) + np.repeat(skipped, lengths)]
    highest = _highest_bit(marked.dtype)
    return (marked & ((1 << highest) - 1)).astype(np.int64), lengths, (marked >> highest).astype(bool)


def mask(
    tokens: np.ndarray,
    lengths: np.ndarray,
    keys: np.ndarray,
    vocabulary: Vocabulary,
    rule: MaskRule,
    starts_word: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chooses tokens to predict and hides them.

    tokens (tokens,) of chunks end to end, their lengths (n,) and their keys (n,); key and position decide a token's
    mask. Each token (word) is chosen with the rule's probability by itself; a chunk without any has the one with the
    smallest draw chosen. A rule for words needs starts_word (tokens,) bool. Returns the input ids (tokens,), the chosen
    tokens' indices (masked,), ascending, and these tokens (masked,).
    """
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    own_bits = bits = noise(positions, after=np.repeat(noise(keys), lengths))
    if rule.whole_words or rule.spans:  # a word's pieces share its first piece's bits, and so its fate
        first_piece = starts_word | (positions == 0)
        word_of = np.cumsum(first_piece) - 1  # (tokens,)
        word_bits = own_bits[first_piece]
        if rule.spans:
            word_bits = _spans(word_bits, positions[first_piece] == 0, rule.probability)
        bits = word_bits[word_of]
    bounds = np.maximum(_bound(rule.probability), np.minimum.reduceat(bits, starts) + np.uint64(1))  # (n,)
    chosen = np.flatnonzero(bits < np.repeat(bounds, lengths))
    targets = tokens[chosen]

    fate = noise(bits[chosen], 1)
    ordinary = vocabulary.ordinary_ids
    place = (noise(own_bits[chosen], 2) >> np.uint64(32)) * np.uint64(len(ordinary)) >> np.uint64(32)
    replaced = fate < _bound(rule.mask_share + rule.random_share)
    input_ids = tokens.copy()
    input_ids[chosen] = np.where(replaced, ordinary[place], targets)
    input_ids[chosen[fate < _bound(rule.mask_share)]] = vocabulary.mask_id
    return input_ids, chosen, targets


def _spans(bits: np.ndarray, starts_chunk: np.ndarray, probability: float) -> np.ndarray:
    """Random bits for words, (words,), by which the chosen come in spans that share their bits, and so their fate.

    Along a chunk a chain of two states decides: a span goes on with the chance that makes its length geometric with
    SpanBERT's mean (Joshi et al., arXiv 1907.10529), and begins with the one that leaves each word its probability.
    SpanBERT's spans end after ten words at the latest; these do not, so that the probability is exact.
    """
    goes_on = 1 - 1 / SPAN_WORDS
    begins = (1 - goes_on) * probability / (1 - probability)
    is_chosen = bits < np.where(starts_chunk, _bound(probability), _bound(begins))
    decides = starts_chunk | is_chosen | (bits >= _bound(goes_on))  # else a word does what the one before it did
    number = np.arange(len(bits))
    is_chosen = is_chosen[np.maximum.accumulate(np.where(decides, number, 0))]
    follows = is_chosen & np.append(False, is_chosen[:-1]) & ~starts_chunk
    first = np.maximum.accumulate(np.where(follows, 0, number))  # of each word's span
    return np.where(is_chosen, bits[first], noise(bits, 3) | np.uint64(1 << 63))  # the others' are above the bound


def content_keys(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mask keys (n,) that depend on each chunk's own tokens alone, for evaluations that compare between runs."""
    starts = np.cumsum(lengths) - lengths
    positions = np.arange(len(tokens)) - np.repeat(starts, lengths)
    return noise(np.add.reduceat(noise(tokens, positions), starts))


def frame(
    input_ids: np.ndarray, masked: np.ndarray, targets: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary
) -> MaskedChunks:
    """Puts [CLS] and [SEP], which are not to be predicted, around each chunk (n,) of what `mask` returned."""
    framed = lengths + 2
    ends = np.cumsum(framed)
    starts = ends - framed
    positions = len(input_ids) + 2 * len(lengths)
    inside = np.arange(len(input_ids)) + np.repeat(2 * np.arange(len(lengths)) + 1, lengths)
    chunks = MaskedChunks(
        input_ids=np.full(positions, vocabulary.sep_id),
        position_ids=np.arange(positions) - np.repeat(starts, framed),
        masked=inside[masked],
        targets=targets,
        lengths=framed,
    )
    chunks.input_ids[starts] = vocabulary.cls_id
    chunks.input_ids[inside] = input_ids
    return chunks


def pack(chunks: MaskedChunks, row_length: int, vocabulary: Vocabulary) -> Rows:
    """Lays chunks end to end into as few rows as hold them, evenly: the longest first, each into the row that holds the
    least (Graham 1969, doi 10.1137/0117039), so that little is padded.

    Rows hold about `row_length` positions, less than a chunk more. With no chunk there is one position of padding.
    """
    lengths = chunks.lengths
    number = max(1, math.ceil(len(chunks.input_ids) / max(row_length, lengths.max(initial=1))))
    row_of, offset_of = [0] * len(lengths), [0] * len(lengths)
    emptiest = [(0, row) for row in range(number)]  # a heap of the positions in each row
    longest_first = np.argsort(-lengths, kind="stable")
    for chunk, length in zip(longest_first.tolist(), lengths[longest_first].tolist(), strict=True):
        held, row = emptiest[0]
        row_of[chunk], offset_of[chunk] = row, held
        heapreplace(emptiest, (held + length, row))

    shape = (number, max(1, max(held for held, _ in emptiest)))
    row_of, offset_of = np.array([row_of, offset_of], dtype=np.int64)
    moved = row_of * shape[1] + offset_of - (np.cumsum(lengths) - lengths)
    places = np.arange(len(chunks.input_ids)) + np.repeat(moved, lengths)  # (positions,) in the flattened rows
    masked = places[chunks.masked]
    ascending = np.argsort(masked)
    rows = Rows(
        input_ids=np.full(shape, vocabulary.pad_id),
        position_ids=np.zeros(shape, dtype=np.int64),
        sequence_ids=np.zeros(shape, dtype=np.int64),
        masked=masked[ascending],
        targets=chunks.targets[ascending],
    )
    rows.input_ids.reshape(-1)[places] = chunks.input_ids
    rows.position_ids.reshape(-1)[places] = chunks.position_ids
    rows.sequence_ids.reshape(-1)[places] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return rows


def split(chunks: MaskedChunks, positions: int) -> Iterator[MaskedChunks]:
    """Cuts a sequence of chunks into parts of at most so many positions, or of one chunk that has more."""
    if len(chunks.input_ids) <= positions:  # which most batches do
        yield chunks
        return
    begins, first = chunk_bounds(chunks.lengths), 0
    while first < len(chunks.lengths):
        after = int(np.searchsorted(begins, begins[first] + positions, side="right")) - 1
        after = max(after, first + 1)
        yield _part(chunks, begins, first, after)
        first = after


def chunk_bounds(lengths: np.ndarray) -> np.ndarray:
    """The position at which each chunk begins, and the end of the last: (n + 1,) int64 for lengths (n,)."""
    bounds = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=bounds[1:])
    return bounds


def _part(chunks, bounds, first, after):
    begin, end = bounds[first], bounds[after]
    some = slice(*chunks.masked.searchsorted((begin, end)))
    return MaskedChunks(
        input_ids=chunks.input_ids[begin:end],
        position_ids=chunks.position_ids[begin:end],
        masked=chunks.masked[some] - begin,
        targets=chunks.targets[some],
        lengths=chunks.lengths[first:after],
    )


def split_rows(rows: Rows, positions: int) -> Iterator[Rows]:
    """Cuts rows evenly into parts of at most so many positions, or of one row that has more."""
    number, width = rows.input_ids.shape
    parts = math.ceil(number / max(1, positions // width))
    each = math.ceil(number / parts)
    for first in range(0, number, each):
        begin = first * width
        some = slice(*rows.masked.searchsorted((begin, begin + each * width)))
        ids = (array[first : first + each] for array in rows[:3])
        yield Rows(*ids, rows.masked[some] - begin, rows.targets[some])


def evaluation_chunks(chunks: Chunks, indices: np.ndarray, vocabulary: Vocabulary) -> MaskedChunks:
    """The chunks at `indices` (n,), masked by BERT's rule as each chunk's own tokens decide."""
    tokens, lengths, _ = take(chunks, indices)
    return frame(*mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, BERT_RULE), lengths, vocabulary)


class Step(NamedTuple):
    """What one device needs for an optimizer step."""

    chunks: MaskedChunks  # its share of the batch
    masked_tokens: int  # over all devices
    tokens: int  # the text's own, over all devices


def training_steps(
    chunks: Chunks,
    vocabulary: Vocabulary,
    rule: MaskRule,
    seed: int,
    batch_size: int,
    first: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Step]:
    """The steps of training from number `first` on, without end: the epochs one after the other, each in its own order
    and with its own masks, cut into batches of `batch_size` chunks, of which every rank has its share.

    Many steps are masked at once, as numpy's calls cost more than their work on one batch of short lines.
    """
    steps_per_epoch = math.ceil(chunks.number / batch_size)
    steps_at_once = max(1, MASKED_AT_ONCE * chunks.number // (len(chunks.tokens) * batch_size))
    epoch, place = divmod(first, steps_per_epoch)
    while True:
        order = epoch_order(seed, epoch, chunks.number)  # (chunks,)
        keys_of_epoch = noise(seed, MASKS, epoch)
        for start in range(place, steps_per_epoch, steps_at_once):
            indices = order[start * batch_size : (start + steps_at_once) * batch_size]  # (n,) of many steps
            tokens, lengths, starts_word = take(chunks, indices)
            keys = noise(indices, after=keys_of_epoch)
            drawn = frame(*mask(tokens, lengths, keys, vocabulary, rule, starts_word), lengths, vocabulary)
            bounds = chunk_bounds(drawn.lengths)
            for begin in range(0, len(indices), batch_size):
                number = min(batch_size, len(indices) - begin)
                share = batch = _part(drawn, bounds, begin, begin + number)
                if ranks > 1:
                    first, after = (begin + number * each // ranks for each in (rank, rank + 1))
                    share = _part(drawn, bounds, first, after)
                yield Step(share, len(batch.targets), len(batch.input_ids) - 2 * number)
        epoch, place = epoch + 1, 0
