"""Which tokens are to be predicted, and what becomes of them: BERT's 80/10/10, by tokens, whole words or spans.

Tokens come as one flat array of chunks end to end; *n* is the number of chunks.
"""

from typing import NamedTuple

import numpy as np

from mlm.data.randomness import Draw, random_bits, threshold
from mlm.data.tokenizer import Vocabulary

SPAN_WORDS = 3.8  # the mean length of a span


class MaskRule(NamedTuple):
    """How tokens are chosen and replaced (Devlin et al., BERT, arXiv 1810.04805, section 3.1 and appendix A.1)."""

    probability: float = 0.15  # that a token, or a word, is chosen
    mask_share: float = 0.8  # of the chosen: become [MASK]
    random_share: float = 0.1  # of the chosen: become a random ordinary token; the rest stay
    whole_words: bool = False
    spans: bool = False  # of whole words


BERT_RULE = MaskRule()


def mask(
    tokens: np.ndarray,
    lengths: np.ndarray,
    keys: np.ndarray,
    vocabulary: Vocabulary,
    rule: MaskRule,
    starts_word: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chooses tokens to predict and hides them.

    tokens: (tokens,) int64 of chunks end to end; lengths (n,) and keys (n,) uint64 of the chunks. A chunk's key and a
    token's place in it decide the token's mask. Each token (word) is chosen with the rule's probability by itself; in a
    chunk where none is, the one with the smallest random bits. A rule for words needs starts_word (tokens,) bool.
    Returns the input ids (tokens,), the chosen tokens' indices (masked,), ascending, and these tokens (masked,).
    """
    starts, places = _places(lengths)
    own_bits = random_bits(places, after=np.repeat(random_bits(keys), lengths))  # (tokens,)
    bits = own_bits
    if rule.whole_words or rule.spans:
        assert starts_word is not None, "a rule for words needs to know where words start"
        bits = _bits_of_words(own_bits, places == 0, starts_word, rule)
    smallest = np.minimum.reduceat(bits, starts)  # (n,) so that every chunk has a token chosen
    limits = np.maximum(threshold(rule.probability), smallest + np.uint64(1))
    chosen = np.flatnonzero(bits < np.repeat(limits, lengths))
    targets = tokens[chosen]

    fate = random_bits(bits[chosen], Draw.FATE)  # (masked,)
    becomes_mask = fate < threshold(rule.mask_share)
    becomes_random = fate < threshold(rule.mask_share + rule.random_share)  # where it does not become [MASK]
    replacements = _ordinary_tokens(random_bits(own_bits[chosen], Draw.REPLACEMENT), vocabulary)
    input_ids = tokens.copy()
    input_ids[chosen] = np.where(becomes_random, replacements, targets)
    input_ids[chosen[becomes_mask]] = vocabulary.mask_id
    return input_ids, chosen, targets


def _places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each chunk starts (n,), and each token's place in its chunk, from 0 on (tokens,)."""
    starts = np.cumsum(lengths) - lengths
    return starts, np.arange(lengths.sum()) - np.repeat(starts, lengths)


def _ordinary_tokens(bits: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """A random ordinary token for each of the bits, all as likely: their upper half, scaled to how many there are."""
    ordinary = vocabulary.ordinary_ids
    scaled = (bits >> np.uint64(32)) * np.uint64(len(ordinary))
    return ordinary[scaled >> np.uint64(32)]


def _bits_of_words(own_bits, starts_chunk, starts_word, rule):
    """Bits (tokens,) in which a word's pieces have its first piece's bits, and so share its fate."""
    is_first_piece = starts_word | starts_chunk
    word_bits = own_bits[is_first_piece]  # (words,)
    if rule.spans:
        word_bits = _bits_of_spans(word_bits, starts_chunk[is_first_piece], rule.probability)
    word_of_token = np.cumsum(is_first_piece) - 1  # (tokens,)
    return word_bits[word_of_token]


def _bits_of_spans(bits: np.ndarray, starts_chunk: np.ndarray, probability: float) -> np.ndarray:
    """Random bits for words, (words,), by which the chosen come in spans that share their bits, and so their fate.

    Spans are a Markov chain of two states along a chunk: one continues with probability 1 - 1/3.8, which makes lengths
    geometric with SpanBERT's mean (Joshi et al., arXiv 1907.10529), and begins with the probability that leaves each
    word the rule's. SpanBERT's spans end after ten words at the latest; these do not, so that this is exact.
    """
    continues = 1 - 1 / SPAN_WORDS
    begins = (1 - continues) * probability / (1 - probability)
    is_chosen = bits < np.where(starts_chunk, threshold(probability), threshold(begins))
    decides = starts_chunk | is_chosen | (bits >= threshold(continues))  # else a word does what the one before it did
    words = np.arange(len(bits))
    is_chosen = is_chosen[np.maximum.accumulate(np.where(decides, words, 0))]
    follows = is_chosen & np.append(False, is_chosen[:-1]) & ~starts_chunk
    span_start = np.maximum.accumulate(np.where(follows, 0, words))
    above_any_limit = random_bits(bits, Draw.NOT_CHOSEN) | np.uint64(1 << 63)
    return np.where(is_chosen, bits[span_start], above_any_limit)


def content_keys(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Mask keys (n,) that depend on each chunk's own tokens alone, for evaluations that compare between runs."""
    starts, places = _places(lengths)
    return random_bits(np.add.reduceat(random_bits(tokens, places), starts))
