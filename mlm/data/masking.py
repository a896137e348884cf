"""Which tokens are to be predicted, and what replaces them: BERT's 80/10/10, by tokens, whole words or spans.

Tokens come as one flat array of chunks end to end; *n* is the number of chunks. A *unit* is chosen as a whole: a token,
a word, or a span of words.
"""

from typing import NamedTuple

import numpy as np

from mlm.data.chunks import chunk_bounds
from mlm.data.tokenizer import Vocabulary
from mlm.randomness import Draw, random_bits, threshold

SPAN_WORDS = 3.8  # the mean length of a span


class MaskRule(NamedTuple):
    """How tokens are chosen and replaced (Devlin et al., BERT, arXiv 1810.04805, section 3.1 and appendix A.1)."""

    probability: float | np.ndarray = 0.15  # that a token, or a word, is chosen; or (n,), of each chunk its own
    mask_share: float = 0.8  # of the chosen: become [MASK]
    random_share: float = 0.1  # of the chosen: become a random regular token; the rest stay
    whole_words: bool = False
    spans: bool = False  # of whole words
    probability_end: float | None = None  # that of the last of `steps` steps, to which it goes linearly
    steps: int = 1

    def at(self, step: np.ndarray) -> "MaskRule":
        """Returns the rule for chunks (n,) by how many steps (n,) went before theirs; after the last it stays.

        That a high probability pays early and a lower one late: Yang et al., Learning Better Masking for Better
        Language Model Pre-training (arXiv 2208.10806).
        """
        if self.probability_end is None:
            return self
        done = np.minimum(step / max(1, self.steps - 1), 1.0)  # (n,)
        probability = self.probability + (self.probability_end - self.probability) * done
        return self._replace(probability=probability, probability_end=None)


BERT_RULE = MaskRule()


def mask(
    tokens: np.ndarray,
    lengths: np.ndarray,
    keys: np.ndarray,
    vocabulary: Vocabulary,
    rule: MaskRule,
    starts_word: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chooses tokens to predict and replaces them.

    tokens: (tokens,) int64 of chunks end to end; lengths (n,) and keys (n,) uint64 of the chunks. A chunk's key and a
    token's place in it decide the token's mask. Each unit is chosen with the rule's probability by itself; in a chunk
    where none is, the one with the smallest random bits. A rule for words needs starts_word (tokens,) bool.
    Returns the input ids (tokens,), the chosen tokens' indices (masked,), ascending, and these tokens (masked,).
    """
    starts = chunk_bounds(lengths)[:-1]
    places = np.arange(len(tokens)) - np.repeat(starts, lengths)  # (tokens,) in the chunk, from 0 on
    token_bits = random_bits(places, after=np.repeat(random_bits(keys), lengths))
    if np.ndim(rule.probability):
        rule = rule._replace(probability=np.repeat(rule.probability, lengths))  # (tokens,)
    if rule.whole_words or rule.spans:
        assert starts_word is not None, "a rule for words needs to know where words start"
        is_chosen, unit_bits = _choose_words(token_bits, starts_word | (places == 0), places == 0, rule)
    else:
        is_chosen, unit_bits = token_bits < threshold(rule.probability), token_bits
    none_chosen = ~np.logical_or.reduceat(is_chosen, starts)  # (n,)
    smallest_bits = np.minimum.reduceat(unit_bits, starts)  # (n,)
    is_chosen |= np.repeat(none_chosen, lengths) & (unit_bits == np.repeat(smallest_bits, lengths))

    chosen = np.flatnonzero(is_chosen)
    targets = tokens[chosen]
    replacement = random_bits(unit_bits[chosen], Draw.REPLACEMENT)  # (masked,)
    becomes_mask = replacement < threshold(rule.mask_share)
    becomes_random = replacement < threshold(rule.mask_share + rule.random_share)  # where it does not become [MASK]
    # Regular tokens, all equally likely: the upper half of random bits, scaled to how many there are.
    upper_half = random_bits(token_bits[chosen], Draw.RANDOM_TOKEN) >> np.uint64(32)
    random_tokens = vocabulary.regular_ids[upper_half * np.uint64(len(vocabulary.regular_ids)) >> np.uint64(32)]
    input_ids = tokens.copy()
    input_ids[chosen] = np.where(becomes_random, random_tokens, targets)
    input_ids[chosen[becomes_mask]] = vocabulary.mask_id
    return input_ids, chosen, targets


def _choose_words(
    token_bits: np.ndarray, starts_word: np.ndarray, starts_chunk: np.ndarray, rule: MaskRule
) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether each token's word is chosen, (tokens,) bool, and the random bits of its unit (tokens,)."""
    bits = token_bits[starts_word]  # (words,) a word has its first subword's
    probability = rule.probability[starts_word] if isinstance(rule.probability, np.ndarray) else rule.probability
    if rule.spans:
        is_chosen, bits = _choose_spans(bits, starts_chunk[starts_word], probability)
    else:
        is_chosen = bits < threshold(probability)
    word_of_token = np.cumsum(starts_word) - 1  # (tokens,)
    return is_chosen[word_of_token], bits[word_of_token]


def _choose_spans(
    bits: np.ndarray, starts_chunk: np.ndarray, probability: float | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns whether each word is in a span, (words,) bool, and random bits, (words,), which a span's words share.

    Spans are a Markov chain of two states along a chunk: one continues with probability 1 - 1/3.8, which makes lengths
    geometric with SpanBERT's mean (Joshi et al., arXiv 1907.10529), and begins with the probability that leaves each
    word the rule's. SpanBERT's spans end after ten words at the latest; these do not, so that this is exact.
    """
    continues = 1 - 1 / SPAN_WORDS
    begins = (1 - continues) * probability / (1 - probability)
    in_any_case = bits < np.where(starts_chunk, threshold(probability), threshold(begins))
    in_no_case = bits >= threshold(continues)
    words = np.arange(len(bits))
    is_decided = in_any_case | in_no_case | starts_chunk  # any other word is chosen if the one before it is
    last_decided = np.maximum.accumulate(np.where(is_decided, words, 0))
    is_chosen = in_any_case[last_decided]

    continues_span = is_chosen & np.append(False, is_chosen[:-1]) & ~starts_chunk
    span_start = np.maximum.accumulate(np.where(continues_span, 0, words))
    # The highest bit means nothing; it is set so that a seed's masks stay what they always were.
    bits_outside = random_bits(bits, Draw.NOT_CHOSEN) | np.uint64(1 << 63)
    return is_chosen, np.where(is_chosen, bits[span_start], bits_outside)


def content_keys(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns mask keys (n,) that depend on each chunk's own tokens alone, so that evaluations compare between runs."""
    starts = chunk_bounds(lengths)[:-1]
    places = np.arange(len(tokens)) - np.repeat(starts, lengths)
    return random_bits(np.add.reduceat(random_bits(tokens, places), starts))
