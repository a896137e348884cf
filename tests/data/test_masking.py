"""Law 1: the masking is BERT's. Law 6: evaluation masks depend on a chunk's own tokens alone."""

from dataclasses import replace
from itertools import islice
from math import sqrt
from typing import NamedTuple

import numpy as np
import pytest
from reference import IGNORED, labelled

import data_process
from data_process import evaluation_batches, training_batches
from mlm.data.chunks import Chunks
from mlm.data.masking import BERT_RULE, MaskRule, content_keys, mask
from mlm.randomness import mask_keys, random_bits

RULES = {"tokens": BERT_RULE, "whole words": MaskRule(whole_words=True), "spans": MaskRule(spans=True)}
SIGMAS = 5  # a counted share lies so many standard deviations around the true one with probability 1 - 6e-7


def assert_share(hits: int, trials: int, share: float) -> None:
    assert abs(hits / trials - share) <= SIGMAS * sqrt(share * (1 - share) / trials), (hits / trials, share)


def expected_share(p: float, n: int) -> float:
    """The share of chosen units in chunks of n of them, each chosen with probability p."""
    return p + (1 - p) ** n / n  # none chosen: one is


def random_chunks(length: int, number: int, vocabulary, seed: int = 0):
    """Random regular tokens: `number` chunks of `length`."""
    tokens = np.random.default_rng(seed).choice(vocabulary.regular_ids, length * number)
    return tokens, np.full(number, length)


@pytest.mark.parametrize("length", [1, 2, 5, 30, 126])
def test_chosen_share_of_a_chunk_of_n_tokens(vocabulary, length):
    p, number = 0.15, 200_000 // length
    tokens, lengths = random_chunks(length, number, vocabulary)
    _, labels = labelled(*mask(tokens, lengths, random_bits(1, np.arange(number)), vocabulary, BERT_RULE))
    chosen = (labels != IGNORED).reshape(number, length)
    assert chosen.any(axis=1).all()  # every chunk teaches
    assert np.array_equal(labels[labels != IGNORED], tokens[labels != IGNORED])
    assert_share(int(chosen.sum()), chosen.size, expected_share(p, length))
    for column in range(0, length, max(1, length // 5)):  # no position is preferred
        assert_share(int(chosen[:, column].sum()), number, expected_share(p, length))


def test_tokens_are_chosen_independently(vocabulary):
    tokens, lengths = random_chunks(100, 5000, vocabulary)
    _, labels = labelled(*mask(tokens, lengths, random_bits(2, np.arange(5000)), vocabulary, BERT_RULE))
    chosen = (labels != IGNORED).reshape(5000, 100)
    for distance in (1, 2, 7, 50):
        both = chosen[:, :-distance] & chosen[:, distance:]
        assert_share(int(both.sum()), both.size, 0.15**2)


def test_eighty_ten_ten_and_what_random_tokens_are(vocabulary):
    tokens, lengths = random_chunks(100, 20_000, vocabulary)
    input_ids, labels = labelled(*mask(tokens, lengths, random_bits(3, np.arange(20_000)), vocabulary, BERT_RULE))
    chosen = labels != IGNORED
    assert np.array_equal(input_ids[~chosen], tokens[~chosen])
    masked = chosen & (input_ids == vocabulary.mask_id)
    replaced = chosen & ~masked & (input_ids != tokens)
    regular = len(vocabulary.regular_ids)
    assert_share(int(masked.sum()), int(chosen.sum()), 0.8)
    assert_share(int(replaced.sum()), int(chosen.sum()), 0.1 * (1 - 1 / regular))  # a draw may be itself
    counts = np.bincount(input_ids[replaced], minlength=vocabulary.size)
    assert set(np.flatnonzero(counts)) <= set(vocabulary.regular_ids.tolist())
    for token in vocabulary.regular_ids:  # all drawn alike
        assert_share(int(counts[token]), int(replaced.sum()), 1 / regular)


def test_special_and_unused_tokens_are_never_drawn_and_unknown_may_be_chosen(tokenizer, vocabulary):
    never = {tokenizer.convert_tokens_to_ids(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    assert not never & set(vocabulary.regular_ids.tolist())
    assert len(vocabulary.regular_ids) == vocabulary.size - len(never)
    tokens, lengths = np.full(10_000, vocabulary.unk_id), np.array([10_000])
    _, labels = labelled(*mask(tokens, lengths, random_bits(4, np.arange(1)), vocabulary, BERT_RULE))
    assert_share(int((labels == vocabulary.unk_id).sum()), 10_000, 0.15)


def test_shares_follow_the_rule(vocabulary):
    tokens, lengths = random_chunks(100, 2000, vocabulary)
    rule = MaskRule(probability=0.4, mask_share=0.5, random_share=0.5)
    input_ids, labels = labelled(*mask(tokens, lengths, random_bits(5, np.arange(2000)), vocabulary, rule))
    chosen = labels != IGNORED
    assert_share(int(chosen.sum()), tokens.size, 0.4)
    assert_share(int((input_ids[chosen] == vocabulary.mask_id).sum()), int(chosen.sum()), 0.5)
    everything = MaskRule(probability=1.0, mask_share=1.0, random_share=0.0)
    assert (
        mask(tokens, lengths, random_bits(5, np.arange(2000)), vocabulary, everything)[0] == vocabulary.mask_id
    ).all()


class Words(NamedTuple):
    """Chunks of equally many random words of 1 to 4 tokens."""

    tokens: np.ndarray  # (tokens,)
    lengths: np.ndarray  # (chunks,) in tokens
    word_lengths: np.ndarray  # (words,) in tokens

    @property
    def first_tokens(self) -> np.ndarray:
        """Where words start: (words,)."""
        return np.cumsum(self.word_lengths) - self.word_lengths

    def mask(self, vocabulary, rule: MaskRule, seed: int):
        """Input ids and labels, (tokens,) each."""
        keys = random_bits(seed, np.arange(len(self.lengths)))
        starts_word = np.isin(np.arange(len(self.tokens)), self.first_tokens)
        return labelled(*mask(self.tokens, self.lengths, keys, vocabulary, rule, starts_word))

    def whole(self, of_token: np.ndarray) -> np.ndarray:
        """Whether a predicate (tokens,) holds for words: (words,) bool. Asserts that it holds for no word in part."""
        held = np.add.reduceat(of_token.astype(int), self.first_tokens)
        assert ((held == 0) | (held == self.word_lengths)).all()
        return held > 0


def random_words(vocabulary, words_per_chunk: int, number: int) -> Words:
    draw = np.random.default_rng(0)
    word_lengths = draw.integers(1, 5, number * words_per_chunk)
    tokens = draw.choice(vocabulary.regular_ids, word_lengths.sum())
    lengths = np.add.reduceat(word_lengths, np.arange(0, len(word_lengths), words_per_chunk))
    return Words(tokens, lengths, word_lengths)


def test_whole_words_are_chosen_as_one(vocabulary):
    words = random_words(vocabulary, 20, 3000)
    _, labels = words.mask(vocabulary, MaskRule(whole_words=True), seed=6)
    is_predicted = labels != IGNORED
    assert np.array_equal(labels[is_predicted], words.tokens[is_predicted])
    chosen = words.whole(is_predicted)
    assert_share(int(chosen.sum()), len(chosen), expected_share(0.15, 20))
    # A word counts with its tokens, so their share varies as the words' does: by the sum of squared lengths.
    spread = sqrt(0.15 * 0.85 * (words.word_lengths**2).sum()) / len(words.tokens)
    assert abs(is_predicted.mean() - expected_share(0.15, 20)) <= SIGMAS * spread


def test_whole_words_share_their_replacement(vocabulary):
    words, regular = random_words(vocabulary, 20, 3000), len(vocabulary.regular_ids)
    input_ids, labels = words.mask(vocabulary, MaskRule(whole_words=True), seed=6)
    chosen, masked = words.whole(labels != IGNORED), words.whole(input_ids == vocabulary.mask_id)
    assert_share(int(masked.sum()), int(chosen.sum()), 0.8)
    changed = np.logical_or.reduceat(input_ids != words.tokens, words.first_tokens) & ~masked
    several = chosen & (words.word_lengths > 1)
    left_by_chance = regular**-2.0  # each draw is the token itself
    assert_share(int((changed & several).sum()), int(several.sum()), 0.1 * (1 - left_by_chance))
    assert (several & ~masked & ~changed).any()  # the words that stay as they are


def test_random_tokens_of_a_word_are_drawn_one_by_one(vocabulary):
    words, regular = random_words(vocabulary, 20, 3000), len(vocabulary.regular_ids)
    input_ids, _ = words.mask(vocabulary, MaskRule(whole_words=True), seed=6)
    word_of_token = np.repeat(np.arange(len(words.word_lengths)), words.word_lengths)
    changed = (input_ids != words.tokens) & (input_ids != vocabulary.mask_id)
    assert len(np.unique(input_ids[changed])) > 0.9 * regular
    pairs = changed[1:] & changed[:-1] & (word_of_token[1:] == word_of_token[:-1])
    assert_share(int((input_ids[1:] == input_ids[:-1])[pairs].sum()), int(pairs.sum()), 1 / regular)


def mask_spans(vocabulary, words_per_chunk: int) -> tuple[np.ndarray, np.ndarray]:
    """Which words are chosen by spans, and which become [MASK]: (chunks, words_per_chunk) bool each."""
    words = random_words(vocabulary, words_per_chunk, 150_000 // words_per_chunk)
    input_ids, labels = words.mask(vocabulary, MaskRule(spans=True), seed=8)
    assert np.array_equal(labels[labels != IGNORED], words.tokens[labels != IGNORED])
    chosen, masked = words.whole(labels != IGNORED), words.whole(input_ids == vocabulary.mask_id)
    return chosen.reshape(-1, words_per_chunk), masked.reshape(-1, words_per_chunk)


@pytest.mark.parametrize("words_per_chunk", [1, 3, 500])
def test_spans_leave_each_word_its_probability(vocabulary, words_per_chunk):
    chosen, _ = mask_spans(vocabulary, words_per_chunk)
    assert chosen.any(axis=1).all()
    p, goes_on = 0.15, 1 - 1 / 3.8
    begins = (1 - goes_on) * p / (1 - p)  # so that as many words leave spans as enter them
    none = (1 - p) * (1 - begins) ** (words_per_chunk - 1)
    for column in range(0, words_per_chunk, max(1, words_per_chunk // 5)):  # no position is preferred
        assert_share(int(chosen[:, column].sum()), len(chosen), p + none / words_per_chunk)


def test_spans_have_geometric_lengths(vocabulary):
    """Whatever its length so far, a span goes on with the same probability."""
    chosen, _ = mask_spans(vocabulary, 500)  # too many words for chance to choose none
    goes_on = 1 - 1 / 3.8
    assert_share(int((chosen[:, :-1] & chosen[:, 1:]).sum()), int(chosen[:, :-1].sum()), goes_on)
    two = chosen[:, :-2] & chosen[:, 1:-1]
    assert_share(int((two & chosen[:, 2:]).sum()), int(two.sum()), goes_on)


def test_the_words_of_a_span_share_their_replacement(vocabulary):
    chosen, masked = mask_spans(vocabulary, 500)
    together = chosen[:, 1:] & chosen[:, :-1]
    assert np.array_equal(masked[:, 1:][together], masked[:, :-1][together])
    first_of_span = chosen & ~np.pad(chosen, ((0, 0), (1, 0)))[:, :-1]
    assert_share(int((first_of_span & masked).sum()), int(first_of_span.sum()), 0.8)


@pytest.mark.parametrize(
    ("kind", "masked", "replaced_or_kept"),
    [
        ("tokens", [0, 2, 3, 8, 10, 13, 22, 30, 39, 43], [1, 5, 28, 47]),
        ("whole words", [0, 2, 3, 4, 8, 10, 13, 30, 31, 39, 40], [1, 5, 47]),
        ("spans", [1, 2, 3, 4, 9, 13, 14, 15, 16], [0, 5, 10, 47]),
    ],
)
def test_a_seed_draws_the_same_masks_in_every_version(vocabulary, kind, masked, replaced_or_kept):
    """A run that was begun with an older version is resumed with the same masks."""
    lengths = np.array([1, 1, 1, 2, 2, 3, 3, 12, 23])  # in chunks so short often none is chosen at first
    tokens, starts_word = np.full(48, vocabulary.unk_id), np.arange(48) % 3 != 1
    input_ids, chosen, _ = mask(tokens, lengths, mask_keys(42, 0, np.arange(9)), vocabulary, RULES[kind], starts_word)
    assert np.flatnonzero(input_ids == vocabulary.mask_id).tolist() == masked
    assert sorted({*chosen} - {*masked}) == replaced_or_kept


@pytest.mark.parametrize("kind", RULES)
def test_masks_are_the_same_in_any_batch(vocabulary, kind):
    rule = RULES[kind]
    tokens, lengths = random_chunks(50, 400, vocabulary)
    starts_word = np.random.default_rng(0).random(len(tokens)) < 0.7
    keys = mask_keys(42, 0, np.arange(400))
    together = labelled(*mask(tokens, lengths, keys, vocabulary, rule, starts_word))
    for chunk in range(400):
        inside, own = slice(chunk * 50, chunk * 50 + 50), slice(chunk, chunk + 1)
        alone = labelled(*mask(tokens[inside], lengths[own], keys[own], vocabulary, rule, starts_word[inside]))
        assert np.array_equal(together[0][inside], alone[0]) and np.array_equal(together[1][inside], alone[1])


def test_masks_are_new_in_every_epoch(vocabulary):
    tokens, lengths = random_chunks(50, 40, vocabulary)
    chosen = np.zeros((2, 2000), dtype=bool)
    for epoch in (0, 1):
        chosen[epoch, mask(tokens, lengths, mask_keys(42, epoch, np.arange(40)), vocabulary, BERT_RULE)[1]] = True
    assert_share(int(chosen.all(axis=0).sum()), 2000, 0.15**2)


@pytest.fixture
def forty_chunks(vocabulary) -> Chunks:
    """Of 50 tokens each."""
    tokens, lengths = random_chunks(50, 40, vocabulary)
    return Chunks(tokens.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]), np.arange(40))


def hidden_tokens(batch, chunks: Chunks) -> set[tuple[int, int, int]]:
    """The tokens that a batch of some of the forty chunks hides: (chunk, place in it, token)."""
    ids_and_labels = labelled(batch.input_ids, batch.label_positions, batch.targets)
    ids, labels = (array.reshape(-1, 52)[:, 1:-1] for array in ids_and_labels)
    originals = np.where(labels != IGNORED, labels, ids)
    found = set()
    for row, place in zip(*np.nonzero(labels != IGNORED), strict=True):
        [chunk] = np.flatnonzero((chunks.tokens.reshape(40, 50) == originals[row]).all(axis=1))
        found.add((int(chunk), int(place), int(labels[row, place])))
    return found


def test_training_masks_depend_on_seed_and_epoch(vocabulary, forty_chunks):
    def first_step(seed=42, epoch=0):
        steps = training_batches(forty_chunks, vocabulary, BERT_RULE, seed, batch_size=40, first_step=epoch)
        return hidden_tokens(next(steps), forty_chunks)

    hidden = first_step()
    [(_, evaluated)] = evaluation_batches(forty_chunks, vocabulary, np.arange(40))
    for other in (first_step(epoch=1), first_step(seed=43), hidden_tokens(evaluated, forty_chunks)):
        assert len(hidden & other) < 0.4 * len(hidden)  # a mask drawn afresh shares 15%
    assert first_step() == hidden


def test_batches_change_no_mask_and_count_their_tokens(vocabulary, forty_chunks):
    whole = next(training_batches(forty_chunks, vocabulary, BERT_RULE, 42, batch_size=40))
    hidden = hidden_tokens(whole, forty_chunks)
    assert (len(whole.targets), whole.tokens) == (len(hidden), 2000)
    parts = list(islice(training_batches(forty_chunks, vocabulary, BERT_RULE, 42, batch_size=7), 6))
    assert set.union(*(hidden_tokens(part, forty_chunks) for part in parts)) == hidden
    assert [part.tokens for part in parts] == [350] * 5 + [250]


def test_ranks_share_a_batch(vocabulary, forty_chunks):
    whole, *halves = (
        next(training_batches(forty_chunks, vocabulary, BERT_RULE, 42, batch_size=40, rank=rank, ranks=ranks))
        for rank, ranks in ((0, 1), (0, 2), (1, 2))
    )
    hidden = hidden_tokens(whole, forty_chunks)
    first_half, second_half = (hidden_tokens(half, forty_chunks) for half in halves)
    assert first_half | second_half == hidden and not first_half & second_half


@pytest.mark.parametrize("at_once", [1, 2**20])  # steps one by one, and all of an epoch
@pytest.mark.parametrize("kind", RULES)
def test_each_step_has_its_own_probability(vocabulary, monkeypatch, kind, at_once):
    """From 0.5 in the first of nine steps to 0.1 in the last: four epochs of two steps, and one step more."""
    monkeypatch.setattr(data_process, "MASKED_AT_ONCE", at_once)
    tokens, _ = random_chunks(50, 4000, vocabulary)
    marked = tokens.astype(np.uint16) | np.tile(np.array([1, 0], np.uint16) << 15, 100_000)  # 25 words of two tokens
    chunks = Chunks(marked, 50 * np.arange(4001), np.arange(4000))
    rule = RULES[kind]._replace(probability=0.5, probability_end=0.1, steps=9)
    steps = list(islice(training_batches(chunks, vocabulary, rule, seed=42, batch_size=2000), 10))
    probabilities = (0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.1)  # after the last it stays
    for step, p in zip(steps, probabilities, strict=True):
        chosen = np.zeros(2000 * 52, dtype=bool)
        chosen[step.label_positions] = True
        units = chosen.reshape(2000, 52)[:, 1:-1]
        if kind != "tokens":
            assert np.array_equal(units[:, ::2], units[:, 1::2])
            units = units[:, ::2]
        if kind == "spans":  # the words of which are not independent of each other
            none = (1 - p) * (1 - p / (1 - p) / 3.8) ** 24
            for column in (0, 12, 24):
                assert_share(int(units[:, column].sum()), 2000, p + none / 25)
        else:
            assert_share(int(units.sum()), units.size, expected_share(p, units.shape[1]))


@pytest.mark.parametrize("kind", RULES)
def test_a_probability_that_ends_where_it_began_masks_as_one_that_stays(vocabulary, forty_chunks, kind):
    rule, chunks = RULES[kind], replace(forty_chunks, tokens=forty_chunks.tokens | np.uint16(1 << 15))  # all are words
    for changes in (False, True):
        end = rule._replace(probability_end=0.3 if changes else 0.15, steps=4)
        pairs = zip(*(training_batches(chunks, vocabulary, each, 42, 16) for each in (rule, end)), strict=True)
        same = [np.array_equal(one.label_positions, two.label_positions) for one, two in islice(pairs, 4)]
        assert same == [True, *[not changes] * 3]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("rule", [BERT_RULE, MaskRule(probability_end=0.4, steps=40)], ids=["constant", "varying"])
def test_steps_are_the_same_wherever_training_begins(vocabulary, monkeypatch, rule, rank):
    """And however many of them are masked at once."""
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    tokens = np.random.default_rng(1).choice(vocabulary.regular_ids, lengths.sum()).astype(np.uint16)
    chunks = Chunks(tokens, np.concatenate([[0], np.cumsum(lengths)]), np.arange(100))

    def steps(number, rank=rank, **more):
        return list(islice(training_batches(chunks, vocabulary, rule, 42, 8, rank=rank, ranks=2, **more), number))

    whole = steps(40)  # 13 an epoch, the last one of four chunks
    assert sum(step.tokens for step in whole[:13] + steps(13, rank=1 - rank)) == len(tokens)
    monkeypatch.setattr(data_process, "MASKED_AT_ONCE", 500)
    for step, other in zip(whole[18:], steps(22, first_step=18), strict=True):
        assert all(np.array_equal(array, same) for array, same in zip(step, other, strict=True))


def test_evaluation_masks_depend_on_the_chunk_alone(vocabulary):
    tokens, lengths = random_chunks(20, 30, vocabulary)
    keys = content_keys(tokens, lengths)
    assert len(np.unique(keys)) == 30
    backwards = np.concatenate(tokens.reshape(30, 20)[::-1])
    assert np.array_equal(content_keys(backwards, lengths), keys[::-1])
    changed = tokens.copy()
    changed[0], changed[1] = changed[1], changed[0]  # the order of tokens counts
    assert (content_keys(changed, lengths) != keys).sum() == (tokens[0] != tokens[1])
