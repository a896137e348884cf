"""Hidden words of the test text and what a model guesses for them: the examples that people look at."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from mlm.data.chunks import Chunks, take
from mlm.data.tokenizer import Vocabulary

HIDDEN_WORDS = 12  # in the report; the log shows the first few of them
COUNTED_CHUNKS = 1 << 15  # of the training text, to see which words are frequent there
FUNCTION_WORD_SHARE = 0.5  # the most frequent tokens, which make up so much of a text, are its function words and marks
LEAST_OCCURRENCES = 5  # in these chunks, of a word that a model could learn
TELLING_SHARE = 0.2  # of a neighbour's occurrences are beside the word
TOKENS_OF_A_LINE = range(8, 41)  # enough for a person to guess from, few enough to read
LONGEST_LINE = 120  # characters


class HiddenWord(NamedTuple):
    """A line with one of its words masked, and that word."""

    line: str
    word: str


class Guess(NamedTuple):
    """A word that a model thinks likely at the masked place of a line."""

    word: str
    probability: float

    @property
    def chance(self) -> str:
        """The probability for people."""
        return "<1%" if not self.probability >= 0.005 else f"{self.probability:.0%}"


def hide_words(
    lines: Iterable[str], train: Chunks, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> list[HiddenWord]:
    """At most `HIDDEN_WORDS` different words, each with its line, that a person and a trained model could both know.

    Counts of the training text choose them, and no model does: content words that it often has beside the same
    neighbour, as 'pressure' behind 'blood'. Where a text has too few of these, others fill up.
    """
    neighbours = _Neighbours.of(train, vocabulary)
    found: dict[str, tuple[float, HiddenWord]] = {}
    for line in lines:
        if len(line) > LONGEST_LINE or tokenizer.mask_token in line:
            continue
        encoded = tokenizer(line, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = np.array(encoded["input_ids"], dtype=np.int64), encoded["offset_mapping"]
        if len(ids) not in TOKENS_OF_A_LINE or vocabulary.unk_id in ids:
            continue
        graded = [(neighbours.grade(ids, place), place) for place in _whole_words(ids, spans, line, vocabulary)]
        if graded:
            grade, place = max(graded)
            start, end = spans[place]
            hidden = HiddenWord(line[:start] + tokenizer.mask_token + line[end:], line[start:end])
            found.setdefault(hidden.word.lower(), (grade, hidden))  # each word once
    telling = [hidden for grade, hidden in found.values() if grade >= TELLING_SHARE]
    others = [hidden for grade, hidden in sorted(found.values(), key=lambda each: -each[0]) if grade < TELLING_SHARE]
    places = np.linspace(0, len(telling) - 1, min(len(telling), HIDDEN_WORDS)).round().astype(int)  # over the text
    return [*(telling[place] for place in places), *others][:HIDDEN_WORDS]


def _whole_words(ids: np.ndarray, spans: list[tuple[int, int]], line: str, vocabulary: Vocabulary) -> list[int]:
    """The places of the tokens that are a word by themselves: of four letters or more, or a Chinese character."""
    continues = np.append(vocabulary.continues_word[ids], False)
    places = []
    for place, (start, end) in enumerate(spans):
        word = line[start:end]
        is_long_enough = len(word) >= 4 or "\u4e00" <= word[:1] <= "\u9fff"
        if word.isalpha() and is_long_enough and not continues[place] and not continues[place + 1]:
            places.append(place)
    return places


class _Neighbours(NamedTuple):
    """Which words of the training text give their neighbours away."""

    is_content_word: np.ndarray  # (vocabulary,) bool: seen five times or more, and no function word
    occurrences: np.ndarray  # (vocabulary,) int64
    pairs: dict[int, int]  # of content words: first * vocabulary + second, and how often

    @classmethod
    def of(cls, train: Chunks, vocabulary: Vocabulary) -> "_Neighbours":
        tokens, lengths, _ = take(train, np.arange(0, len(train), max(1, len(train) // COUNTED_CHUNKS)))
        occurrences = np.bincount(tokens, minlength=vocabulary.size)
        most_frequent_first = np.argsort(-occurrences, kind="stable")
        share_before = (np.cumsum(occurrences[most_frequent_first]) - occurrences[most_frequent_first]) / len(tokens)
        is_content_word = occurrences >= LEAST_OCCURRENCES
        is_content_word[most_frequent_first[share_before < FUNCTION_WORD_SHARE]] = False

        neighbours = is_content_word[tokens[:-1]] & is_content_word[tokens[1:]]  # (tokens - 1,)
        neighbours[np.cumsum(lengths)[:-1] - 1] = False  # the last of one chunk, the first of the next
        pairs, times = np.unique((tokens[:-1] * vocabulary.size + tokens[1:])[neighbours], return_counts=True)
        often = times >= LEAST_OCCURRENCES
        return cls(is_content_word, occurrences, dict(zip(pairs[often].tolist(), times[often].tolist(), strict=True)))

    def grade(self, ids: np.ndarray, place: int) -> float:
        """How well a neighbour foretells the word: the share of the neighbour's occurrences that are beside this word.

        -1 for a word that is no content word.
        """
        if not self.is_content_word[ids[place]]:
            return -1.0
        size, share = len(self.is_content_word), 0.0
        for first in (place - 1, place):
            if 0 <= first < len(ids) - 1:
                neighbour = ids[2 * first + 1 - place]
                together = self.pairs.get(int(ids[first] * size + ids[first + 1]), 0)
                share = max(share, together / max(1, self.occurrences[neighbour]))
        return share
