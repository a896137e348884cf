"""The order of an epoch: a permutation for every size, uniform, computed where it is needed and never held."""

import itertools
import math
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from scipy.stats import chisquare

import data_process
from data_process import training_batches
from mlm.data.chunks import Chunks
from mlm.data.masking import BERT_RULE
from mlm.randomness import epoch_order, evaluation_sample, random_bits

UNLIKELY = 1e-4  # of a chi-square test; the seeds are fixed, so that it fails always or never


def whole_order(chunks: int, seed: int = 42, epoch: int = 0) -> np.ndarray:
    return epoch_order(seed, epoch, chunks, np.arange(chunks))


def test_noise_is_splitmix64():
    # First outputs of the published generator for state 0: counter 0 here is its first step.
    assert int(random_bits(0)[0]) == 0xE220A8397B1DCDAF
    assert int(random_bits(0x9E3779B97F4A7C15)[0]) == 0x6E789E6AA1B965F4


def test_an_order_is_a_permutation_of_any_number_of_chunks():
    for chunks in [*range(1, 5001), 2**16, 2**16 + 1, 999_983, 2**20 - 1]:
        assert np.array_equal(np.bincount(whole_order(chunks), minlength=chunks), np.ones(chunks)), chunks


@pytest.mark.parametrize("chunks", [2**31 - 1, 10**9, 10**12 + 39, 2**47 + 5])
def test_an_order_of_more_than_memory_holds_repeats_nothing_and_leaves_no_chunk_out(chunks):
    places = np.concatenate([np.arange(50_000), chunks - 1 - np.arange(50_000)])
    indices = epoch_order(42, 0, chunks, places)
    assert len(np.unique(indices)) == 100_000 and indices.min() >= 0 and indices.max() < chunks
    shares = np.bincount(indices // -(-chunks // 100), minlength=100)
    assert chisquare(shares).pvalue > UNLIKELY


@pytest.mark.parametrize("chunks", [2, 3, 4, 5, 6])
def test_all_orders_of_a_few_chunks_are_equally_likely(chunks):
    orders = itertools.permutations(range(chunks))
    seeds = max(2000, 8 * math.factorial(chunks))
    found = Counter(tuple(whole_order(chunks, seed).tolist()) for seed in range(seeds))
    assert chisquare([found[order] for order in orders]).pvalue > UNLIKELY


@pytest.mark.parametrize("chunks", [97, 1000, 4097])
def test_each_place_takes_each_chunk_as_often_and_neighbours_are_no_neighbours_in_the_text(chunks):
    orders = np.array([whole_order(chunks, seed) for seed in range(600)])  # (seeds, chunks)
    for place in (0, 1, chunks // 2, chunks - 1):
        found = np.bincount(orders[:, place] * 20 // chunks, minlength=20)
        assert chisquare(found, equally(chunks, 20, draws=600)).pvalue > UNLIKELY
    steps = np.diff(orders, axis=1) % chunks  # 1 to chunks - 1, equally likely
    assert chisquare(np.bincount(steps.ravel(), minlength=chunks)[1:]).pvalue > UNLIKELY
    first, second = (orders[:, place] * 5 // chunks for place in (0, 1))  # the one says nothing of the other
    share = equally(chunks, 5, draws=1)
    expected = 600 * np.outer(share, share).ravel()
    assert chisquare(np.bincount(first * 5 + second, minlength=25), expected).pvalue > UNLIKELY


def equally(values: int, bins: int, draws: int) -> np.ndarray:
    """How often each bin is expected to hold a value of 0 to values - 1, of so many draws."""
    return np.bincount(np.arange(values) * bins // values) * draws / values


@pytest.mark.parametrize("chunks", [7, 9, 49])
def test_half_of_the_orders_are_even_permutations(chunks):
    """Shifts along rows of odd lengths alone would make all of them even."""
    upper = np.triu_indices(chunks, 1)
    inversions = [
        int((order[upper[0]] > order[upper[1]]).sum()) for order in (whole_order(chunks, s) for s in range(2000))
    ]
    assert chisquare(np.bincount(np.array(inversions) % 2, minlength=2)).pvalue > UNLIKELY


def test_every_epoch_and_seed_has_an_order_of_its_own():
    orders = [whole_order(1000, seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0))]
    assert np.array_equal(orders[0], whole_order(1000, 1))
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10


def test_any_part_of_an_order_is_that_of_the_whole():
    whole = whole_order(999)
    for places in (np.arange(990, 999), np.array([998, 0, 500]), np.arange(0)):
        assert np.array_equal(epoch_order(42, 0, 999, places), whole[places])


def test_a_smaller_sample_of_test_chunks_is_the_beginning_of_a_larger_one():
    sample = evaluation_sample(1000, 1000)
    assert np.array_equal(np.sort(sample), np.arange(1000))
    assert abs(np.corrcoef(sample, np.arange(1000))[0, 1]) < 0.1  # it does not follow the text
    assert np.array_equal(evaluation_sample(1000, 10), sample[:10])


class Multiples:
    """Offsets of chunks of 25 tokens each, as an array that is not there."""

    def __init__(self, size: int):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, indices):
        return 25 * indices


def stand_in(chunks: int) -> Chunks:
    """So many chunks of 25 equal tokens, none of which is held."""
    tokens = np.broadcast_to(np.uint16(20), 25 * chunks)
    return Chunks(tokens, Multiples(chunks + 1), np.broadcast_to(np.uint64(0), chunks))


@pytest.mark.parametrize("first_step", [0, 29_000_000, 31_250_000])  # the last one is of the second epoch
def test_a_step_of_a_billion_chunks_takes_no_memory_by_their_number(vocabulary, first_step):
    chunks = stand_in(10**9)
    tracemalloc.start()
    try:
        step = next(training_batches(chunks, vocabulary, BERT_RULE, 42, batch_size=32, first_step=first_step))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert step.tokens == 32 * 25 and peak_bytes < 2e7


@pytest.mark.parametrize("ranks", [1, 8, 512])
def test_a_rank_masks_its_own_share_alone(vocabulary, monkeypatch, ranks):
    """However many others there are: 16 chunks of 25 tokens a step."""
    mask, masked = data_process.mask, []

    def watched(tokens, *others):
        masked.append(len(tokens))
        return mask(tokens, *others)

    monkeypatch.setattr(data_process, "mask", watched)
    batch = {"batch_size": 16 * ranks, "rank": ranks // 2, "ranks": ranks}
    steps = list(islice(training_batches(stand_in(10**6), vocabulary, BERT_RULE, 42, **batch), 100))
    assert [step.tokens for step in steps] == [400] * 100
    assert sum(masked) < 100 * 400 + data_process.MASKED_AT_ONCE


def test_a_rank_without_a_chunk_in_a_step_has_an_empty_share(vocabulary):
    """Three chunks a step over four ranks, and one chunk in the last."""
    shares = [
        list(islice(training_batches(stand_in(10), vocabulary, BERT_RULE, 42, 3, rank=rank, ranks=4), 4))
        for rank in range(4)
    ]
    assert [[len(step.lengths) for step in of_rank] for of_rank in shares] == [
        [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1],
    ]  # fmt: skip
