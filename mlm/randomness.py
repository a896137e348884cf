"""Random numbers without state: each is a hash of what it is for, so no generator has to be saved, shared or replayed.

A mask drawn from (seed, epoch, chunk, place) is the same whatever the batch, the device or an interruption. Every
stream of random numbers of a run has its number here, so that no two of them are the same. Beside them, `seed` decides
the new weights of a model (model.py).
"""

import math
from enum import IntEnum

import numpy as np

LARGEST_BELOW_2_64 = 2.0**64 - 2.0**11  # of float64
ROUNDS = 16  # of a permutation: with 8 some orders of five things come twice as often as others


class Stream(IntEnum):
    """A stream of random numbers for each use. Hashed after the run's seed."""

    ORDER = 1  # of the chunks in an epoch
    MASKS = 2  # which tokens are chosen, and what replaces them
    DROPOUT = 3
    EVALUATION = 4  # which test chunks are scored where not all are
    GENERAL = 5  # the seed of general text's own order and masks
    HELD_OUT = 6  # which lines are tested on, where there is no test text


class Draw(IntEnum):
    """Further random bits, derived from a token's bits of Stream.MASKS, which decide whether it is chosen."""

    REPLACEMENT = 1  # of a chosen token: [MASK], a random token, or the token itself
    RANDOM_TOKEN = 2
    NOT_CHOSEN = 3  # bits of a word outside spans, the smallest of which is chosen where no other is


def _mix(bits: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit integers: the finaliser of SplitMix64 (Steele, Lea and Flood, doi 10.1145/2660193.2660195)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def random_bits(*counters: int | np.ndarray, after: np.ndarray | None = None) -> np.ndarray:
    """Returns 64 random bits (uint64) for each tuple of counters, which broadcast: a chained hash of them.
    random_bits(a, b) is random_bits(b, after=random_bits(a))."""
    bits = np.zeros(1, dtype=np.uint64) if after is None else after
    for counter in counters:
        bits = _mix(bits + np.uint64(0x9E3779B97F4A7C15) + np.asarray(counter).astype(np.uint64))
    return bits


def threshold(probability: float | np.ndarray) -> np.ndarray:
    """Returns what 64 random bits are below with this probability, or each of these: integers compare faster than
    fractions."""
    return np.minimum(np.rint(np.multiply(probability, 2.0**64)), LARGEST_BELOW_2_64).astype(np.uint64)


def epoch_order(seed: int, epoch: int, chunks: int, places: np.ndarray) -> np.ndarray:
    """Returns which of the chunks an epoch visits at these places (n,) of its order: their indices (n,) int64."""
    return _permute(places, chunks, random_bits(seed, Stream.ORDER, epoch))


def evaluation_sample(chunks: int, size: int) -> np.ndarray:
    """Returns which test chunks an evaluation of so many scores: their indices (size,) int64, in the order of which it
    takes them. The same for every seed of a run, and a smaller sample is the beginning of a larger one."""
    return _permute(np.arange(size), chunks, random_bits(0, Stream.EVALUATION))


def _permute(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Returns what a permutation of 0 to size - 1, decided by a key (1,) uint64, has at these places (n,): (n,) int64.

    It is computed and not held, so that no text is too long for it: by a Feistel network over the cells of a rectangle,
    of which there are a few more than `size`; what falls on one of these goes through it again, until it does not
    (Black and Rogaway, Ciphers with Arbitrary Finite Domains, doi 10.1007/3-540-45760-7_9).
    """
    rows = math.isqrt(size - 1) + 1
    columns = 2 * math.ceil(size / (2 * rows))  # even, as cycles of odd lengths would make even permutations alone
    keys = random_bits(np.arange(ROUNDS), after=key)
    cells = places.astype(np.uint64)
    remaining = np.arange(len(cells))
    while len(remaining):
        row, column = np.divmod(cells[remaining], np.uint64(columns))
        for for_row, for_column in keys.reshape(-1, 2):
            row = _shift(row, column + for_row, rows)
            column = _shift(column, row + for_column, columns)
        cells[remaining] = row * np.uint64(columns) + column
        remaining = remaining[cells[remaining] >= size]
    return cells.astype(np.int64)


def _shift(values: np.ndarray, counters: np.ndarray, limit: int) -> np.ndarray:
    """Returns values (n,) below a limit, which has at most 32 bits, each shifted by a hash of its counter, modulo that
    limit. Two multiplications, which many rounds make up for, and no division."""
    bits = counters * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    shifted = values + ((bits >> np.uint64(32)) * np.uint64(limit) >> np.uint64(32))
    return np.minimum(shifted, shifted - np.uint64(limit))  # below 0 it is a large number


def mask_keys(seed: int, epoch: int, chunks: np.ndarray) -> np.ndarray:
    """Returns the keys, (n,) uint64, that decide the masks in an epoch of the chunks with these indices (n,)."""
    return random_bits(seed, Stream.MASKS, epoch, chunks)


def line_keys(seed: int, hashes: np.ndarray) -> np.ndarray:
    """Returns the keys (n,) uint64 of lines, by their hashes (n,), the smallest of which are held out for testing. No
    two hashes have the same key."""
    return random_bits(seed, Stream.HELD_OUT, hashes)


def general_seed(seed: int) -> int:
    """Returns the seed that decides order and masks of the general text that is replayed."""
    return int(random_bits(seed, Stream.GENERAL)[0])


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """Returns torch's seed for a micro-batch of a step, so that repeating it drops the same units."""
    return int(random_bits(seed, Stream.DROPOUT, step, micro_batch, rank)[0])
