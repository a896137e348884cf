"""Law 1: the masking is BERT's. Law 6: evaluation masks depend on a chunk's own tokens alone."""

from math import sqrt

import numpy as np
import pytest
from reference import IGNORED, labelled

import data_process
from data_process import evaluation_batches, training_batches
from mlm.data.chunks import Chunks
from mlm.data.masking import BERT_RULE, MaskRule, content_keys, mask
from mlm.data.randomness import epoch_order, random_bits

SIGMAS = 5  # a counted share lies so many standard deviations around the true one with probability 1 - 6e-7


def assert_share(hits: int, trials: int, share: float) -> None:
    assert abs(hits / trials - share) <= SIGMAS * sqrt(share * (1 - share) / trials), (hits / trials, share)


def chunks_of(length: int, number: int, vocabulary, seed: int = 0):
    """Random ordinary tokens: `number` chunks of `length`."""
    tokens = np.random.default_rng(seed).choice(vocabulary.regular_ids, length * number)
    return tokens, np.full(number, length)


@pytest.mark.parametrize("length", [1, 2, 5, 30, 126])
def test_chosen_share_of_a_chunk_of_n_tokens(vocabulary, length):
    p, number = 0.15, 200_000 // length
    tokens, lengths = chunks_of(length, number, vocabulary)
    _, labels = labelled(*mask(tokens, lengths, random_bits(1, np.arange(number)), vocabulary, BERT_RULE))
    chosen = (labels != IGNORED).reshape(number, length)
    assert chosen.any(axis=1).all()  # every chunk teaches
    assert np.array_equal(labels[labels != IGNORED], tokens[labels != IGNORED])
    assert_share(int(chosen.sum()), chosen.size, p + (1 - p) ** length / length)
    for column in range(0, length, max(1, length // 5)):  # no position is preferred
        assert_share(int(chosen[:, column].sum()), number, p + (1 - p) ** length / length)


def test_tokens_are_chosen_independently(vocabulary):
    tokens, lengths = chunks_of(100, 5000, vocabulary)
    _, labels = labelled(*mask(tokens, lengths, random_bits(2, np.arange(5000)), vocabulary, BERT_RULE))
    chosen = (labels != IGNORED).reshape(5000, 100)
    for distance in (1, 2, 7, 50):
        both = chosen[:, :-distance] & chosen[:, distance:]
        assert_share(int(both.sum()), both.size, 0.15**2)


def test_eighty_ten_ten_and_what_random_tokens_are(vocabulary):
    tokens, lengths = chunks_of(100, 20_000, vocabulary)
    input_ids, labels = labelled(*mask(tokens, lengths, random_bits(3, np.arange(20_000)), vocabulary, BERT_RULE))
    chosen = labels != IGNORED
    assert np.array_equal(input_ids[~chosen], tokens[~chosen])
    masked = chosen & (input_ids == vocabulary.mask_id)
    replaced = chosen & ~masked & (input_ids != tokens)
    ordinary = len(vocabulary.regular_ids)
    assert_share(int(masked.sum()), int(chosen.sum()), 0.8)
    assert_share(int(replaced.sum()), int(chosen.sum()), 0.1 * (1 - 1 / ordinary))  # one draw hits the token itself
    counts = np.bincount(input_ids[replaced], minlength=vocabulary.size)
    assert set(np.flatnonzero(counts)) <= set(vocabulary.regular_ids.tolist())
    for token in vocabulary.regular_ids:  # all drawn alike
        assert_share(int(counts[token]), int(replaced.sum()), 1 / ordinary)


def test_special_and_unused_tokens_are_never_drawn_and_unknown_may_be_chosen(tokenizer, vocabulary):
    never = {tokenizer.convert_tokens_to_ids(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    assert not never & set(vocabulary.regular_ids.tolist())
    assert len(vocabulary.regular_ids) == vocabulary.size - len(never)
    tokens, lengths = np.full(10_000, vocabulary.unk_id), np.array([10_000])
    _, labels = labelled(*mask(tokens, lengths, random_bits(4, np.arange(1)), vocabulary, BERT_RULE))
    assert_share(int((labels == vocabulary.unk_id).sum()), 10_000, 0.15)


def test_shares_follow_the_rule(vocabulary):
    tokens, lengths = chunks_of(100, 2000, vocabulary)
    rule = MaskRule(probability=0.4, mask_share=0.5, random_share=0.5)
    input_ids, labels = labelled(*mask(tokens, lengths, random_bits(5, np.arange(2000)), vocabulary, rule))
    chosen = labels != IGNORED
    assert_share(int(chosen.sum()), tokens.size, 0.4)
    assert_share(int((input_ids[chosen] == vocabulary.mask_id).sum()), int(chosen.sum()), 0.5)
    everything = MaskRule(probability=1.0, mask_share=1.0, random_share=0.0)
    assert (
        mask(tokens, lengths, random_bits(5, np.arange(2000)), vocabulary, everything)[0] == vocabulary.mask_id
    ).all()


def random_words(vocabulary, words_a_chunk: int, number: int):
    """Chunks of words of 1 to 4 tokens: tokens (tokens,), lengths (number,), word lengths (words,), and whether a token
    starts a word (tokens,)."""
    draw = np.random.default_rng(0)
    word_lengths = draw.integers(1, 5, number * words_a_chunk)
    tokens = draw.choice(vocabulary.regular_ids, word_lengths.sum())
    lengths = np.add.reduceat(word_lengths, np.arange(0, len(word_lengths), words_a_chunk))
    first = np.cumsum(word_lengths) - word_lengths
    return tokens, lengths, word_lengths, np.isin(np.arange(len(tokens)), first)


def fate_of_words(tokens, input_ids, labels, word_lengths, vocabulary):
    """Which words are chosen, and which are masked: (words,) bool each. Asserts that no word is partly either."""
    first = np.cumsum(word_lengths) - word_lengths
    shares = []
    for of_token in (labels != IGNORED, input_ids == vocabulary.mask_id):
        shares.append(np.add.reduceat(of_token.astype(int), first) / word_lengths)
        assert set(np.unique(shares[-1])) <= {0.0, 1.0}
    assert np.array_equal(labels[labels != IGNORED], tokens[labels != IGNORED])
    return [share == 1 for share in shares]


def test_whole_words_share_their_fate(vocabulary):
    tokens, lengths, word_lengths, starts_word = random_words(vocabulary, 20, 3000)
    keys = random_bits(6, np.arange(len(lengths)))
    input_ids, labels = labelled(*mask(tokens, lengths, keys, vocabulary, MaskRule(whole_words=True), starts_word))
    chosen, masked = fate_of_words(tokens, input_ids, labels, word_lengths, vocabulary)
    assert_share(int(chosen.sum()), len(chosen), 0.15 + 0.85**20 / 20)
    # A word counts with its tokens, so their share varies as the words' does: by the sum of squared lengths.
    share, spread = 0.15 + 0.85**20 / 20, sqrt(0.15 * 0.85 * (word_lengths**2).sum()) / len(tokens)
    assert abs((labels != IGNORED).mean() - share) <= SIGMAS * spread
    assert_share(int(masked.sum()), int(chosen.sum()), 0.8)
    unmasked = np.repeat((word_lengths > 1) & chosen & ~masked, word_lengths)
    changed = unmasked & (input_ids != tokens)
    assert len(np.unique(input_ids[changed])) > 0.9 * len(vocabulary.regular_ids)  # pieces are replaced one by one
    words = np.repeat(np.arange(len(word_lengths)), word_lengths)
    of_words = np.bincount(words[changed], minlength=len(word_lengths)) > 0
    ordinary = len(vocabulary.regular_ids)  # a word stays as it is by chance where each draw hits its token
    replaced = chosen & ~masked & (word_lengths > 1)
    assert_share(int(of_words.sum()), int((chosen & (word_lengths > 1)).sum()), 0.1 * (1 - ordinary**-2.0))
    assert of_words.sum() < replaced.sum()
    both = changed[1:] & changed[:-1] & (words[1:] == words[:-1])
    assert_share(int((input_ids[1:] == input_ids[:-1])[both].sum()), int(both.sum()), 1 / ordinary)  # each its own draw


@pytest.mark.parametrize("words_a_chunk", [1, 3, 500])
def test_spans_leave_each_word_its_probability_and_have_geometric_lengths(vocabulary, words_a_chunk):
    tokens, lengths, word_lengths, starts_word = random_words(vocabulary, words_a_chunk, 150_000 // words_a_chunk)
    keys = random_bits(8, np.arange(len(lengths)))
    input_ids, labels = labelled(*mask(tokens, lengths, keys, vocabulary, MaskRule(spans=True), starts_word))
    chosen, masked = fate_of_words(tokens, input_ids, labels, word_lengths, vocabulary)
    chosen, masked = (which.reshape(-1, words_a_chunk) for which in (chosen, masked))
    assert chosen.any(axis=1).all()
    goes_on, p = 1 - 1 / 3.8, 0.15
    begins = (1 - goes_on) * p / (1 - p)
    none = (1 - p) * (1 - begins) ** (words_a_chunk - 1)
    for column in range(0, words_a_chunk, max(1, words_a_chunk // 5)):  # no position is preferred
        assert_share(int(chosen[:, column].sum()), len(chosen), p + none / words_a_chunk)
    if words_a_chunk == 500:  # too many for chance to choose none
        assert_share(int((chosen[:, :-1] & chosen[:, 1:]).sum()), int(chosen[:, :-1].sum()), goes_on)
        two = chosen[:, :-2] & chosen[:, 1:-1]  # whatever the length so far: geometric
        assert_share(int((two & chosen[:, 2:]).sum()), int(two.sum()), goes_on)
        together = chosen[:, 1:] & chosen[:, :-1]
        assert np.array_equal(masked[:, 1:][together], masked[:, :-1][together])  # a span shares its fate
        begun = chosen & ~np.pad(chosen, ((0, 0), (1, 0)))[:, :-1]
        assert_share(int((begun & masked).sum()), int(begun.sum()), 0.8)


@pytest.mark.parametrize("kind", ["tokens", "whole_words", "spans"])
def test_masks_are_the_same_in_any_batch(vocabulary, kind):
    rule = BERT_RULE if kind == "tokens" else BERT_RULE._replace(**{kind: True})
    tokens, lengths = chunks_of(50, 400, vocabulary)
    starts_word = np.random.default_rng(0).random(len(tokens)) < 0.7
    keys = random_bits(42, 2, 0, np.arange(400))
    together = labelled(*mask(tokens, lengths, keys, vocabulary, rule, starts_word))
    for chunk in range(400):
        inside, own = slice(chunk * 50, chunk * 50 + 50), slice(chunk, chunk + 1)
        alone = labelled(*mask(tokens[inside], lengths[own], keys[own], vocabulary, rule, starts_word[inside]))
        assert np.array_equal(together[0][inside], alone[0]) and np.array_equal(together[1][inside], alone[1])


def test_masks_are_new_in_every_epoch(vocabulary):
    tokens, lengths = chunks_of(50, 40, vocabulary)
    one, other = (
        np.isin(
            np.arange(2000), mask(tokens, lengths, random_bits(42, 2, epoch, np.arange(40)), vocabulary, BERT_RULE)[1]
        )
        for epoch in (0, 1)
    )
    assert_share(int((one & other).sum()), one.size, 0.15**2)


def test_training_masks_are_keyed_on_seed_epoch_and_chunk(vocabulary):
    tokens, lengths = chunks_of(50, 40, vocabulary)
    chunks = Chunks(tokens.astype(np.uint16), np.concatenate([[0], np.cumsum(lengths)]))

    def masked(step_chunks):
        """The hidden tokens as (chunk, position in it, label)."""
        ids_and_labels = labelled(step_chunks.input_ids, step_chunks.masked, step_chunks.targets)
        ids, labels = (array.reshape(-1, 52)[:, 1:-1] for array in ids_and_labels)
        found = set()
        for row, position in zip(*np.nonzero(labels != IGNORED), strict=True):
            original = np.where(labels[row] != IGNORED, labels[row], ids[row])
            [chunk] = np.flatnonzero((tokens.reshape(40, 50) == original).all(axis=1))
            found.add((int(chunk), int(position), int(labels[row, position])))
        return found

    def step(seed=42, epoch=0, **more):
        return next(training_batches(chunks, vocabulary, BERT_RULE, seed, 40, first_step=epoch, **more))

    drawn, count, seen_tokens = step()
    first = masked(drawn)
    assert len(first) == count and seen_tokens == 2000
    parts = [step for step, _ in zip(training_batches(chunks, vocabulary, BERT_RULE, 42, 7), range(6), strict=False)]
    assert set.union(*(masked(part.chunks) for part in parts)) == first  # batches change no mask
    assert [part.tokens for part in parts] == [350] * 5 + [250]
    [(_, evaluated)] = evaluation_batches(chunks, vocabulary, len(chunks))
    for other in (step(epoch=1).chunks, step(seed=43).chunks, evaluated):
        assert len(first & masked(other)) < 0.4 * count  # a mask drawn afresh shares 15%
    halves = [step(rank=rank, ranks=2) for rank in (0, 1)]
    first_half, second_half = (masked(half.chunks) for half in halves)
    assert first_half | second_half == first and not first_half & second_half
    assert halves[0].masked_tokens == halves[1].masked_tokens == count  # both devices know the count of all


def test_steps_are_the_same_wherever_they_begin_and_however_many_are_masked_at_once(vocabulary, monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    tokens = np.random.default_rng(1).choice(vocabulary.regular_ids, lengths.sum()).astype(np.uint16)
    chunks = Chunks(tokens, np.concatenate([[0], np.cumsum(lengths)]))

    def steps(number, **more):
        made = training_batches(chunks, vocabulary, BERT_RULE, 42, 8, **more)
        return [next(made) for _ in range(number)]

    for rank in (0, 1):
        whole = steps(40, rank=rank, ranks=2)  # 13 an epoch, the last one of four chunks
        monkeypatch.setattr(data_process, "MASKED_AT_ONCE", 500)
        later = steps(22, first_step=18, rank=rank, ranks=2)
        for step, other in zip(whole[18:], later, strict=True):
            assert step[1:] == other[1:]
            assert all(np.array_equal(array, same) for array, same in zip(step.chunks, other.chunks, strict=True))
        monkeypatch.undo()
    assert sum(step.tokens for step in steps(13)) == len(tokens)


def test_evaluation_masks_depend_on_the_chunk_alone(vocabulary):
    tokens, lengths = chunks_of(20, 30, vocabulary)
    keys = content_keys(tokens, lengths)
    assert len(np.unique(keys)) == 30
    backwards = np.concatenate(tokens.reshape(30, 20)[::-1])
    assert np.array_equal(content_keys(backwards, lengths), keys[::-1])
    changed = tokens.copy()
    changed[0], changed[1] = changed[1], changed[0]  # the order of tokens counts
    assert (content_keys(changed, lengths) != keys).sum() == (tokens[0] != tokens[1])


def test_noise_is_splitmix64(vocabulary):
    # First outputs of the published generator for state 0: counter 0 here is its first step.
    assert int(random_bits(0)[0]) == 0xE220A8397B1DCDAF
    assert int(random_bits(0x9E3779B97F4A7C15)[0]) == 0x6E789E6AA1B965F4


def test_epoch_order_is_a_new_permutation_every_epoch_and_seed():
    orders = [epoch_order(seed, epoch, 1000) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.array_equal(orders[0], epoch_order(1, 0, 1000))
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).sum() < 10
