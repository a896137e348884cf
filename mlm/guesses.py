"""Hidden words of the test text and what a model guesses for them: the examples that people look at."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers import BertForMaskedLM, PreTrainedTokenizerBase, pipeline

from mlm.chunks import Chunks, take
from mlm.vocabulary import Vocabulary

HIDDEN_WORDS = 12  # in the report; the log shows the first few of them
COUNTED_CHUNKS = 1 << 15  # of the training text, to see which words are frequent there
FUNCTION_WORD_SHARE = 0.4  # the most frequent tokens, which make up so much of a text, are its function words and marks
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


def hide_words(
    lines: Iterable[str], train: Chunks, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> list[HiddenWord]:
    """At most `HIDDEN_WORDS` different words, each with its line, that a person and a trained model could both know.

    Counts of the training text choose them, and no model does: content words (not the most frequent tokens) that are
    tokens of their own and occur there, if possible five times or more and beside the same neighbour, as 'blood' before
    'pressure' does. Where a text has too few of these, others fill up.
    """
    counts = _Counts.of(train, vocabulary)
    by_grade: dict[int, dict[str, HiddenWord]] = {2: {}, 1: {}, 0: {}}
    for line in lines:
        if len(line) > LONGEST_LINE or tokenizer.mask_token in line:
            continue
        encoded = tokenizer(line, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, spans = np.array(encoded["input_ids"], dtype=np.int64), encoded["offset_mapping"]
        if len(ids) not in TOKENS_OF_A_LINE or vocabulary.unk_id in ids:
            continue
        graded = [(counts.grade(ids, place), place) for place in _whole_words(ids, spans, line, vocabulary)]
        if graded:
            best = max(grade for grade, _ in graded)
            places = [place for grade, place in graded if grade == best]
            start, end = spans[places[len(places) // 2]]
            word = line[start:end]
            hidden = HiddenWord(line[:start] + tokenizer.mask_token + line[end:], word)
            by_grade[best].setdefault(word.lower(), hidden)
    chosen: list[HiddenWord] = []
    for grade in (2, 1, 0):
        found = list(by_grade[grade].values())
        wanted = HIDDEN_WORDS - len(chosen)
        chosen += found[:: max(1, len(found) // max(1, wanted))][:wanted]  # spread over the text
    return chosen


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


class _Counts(NamedTuple):
    """Which tokens are frequent in the training text, and which pairs of neighbours."""

    is_content_word: np.ndarray  # (vocabulary,) bool: seen five times or more, and no function word
    frequent_pairs: set[int]  # of content words, seen three times or more: first * vocabulary + second

    @classmethod
    def of(cls, train: Chunks, vocabulary: Vocabulary) -> "_Counts":
        tokens, lengths, _ = take(train, np.arange(0, len(train), max(1, len(train) // COUNTED_CHUNKS)))
        occurrences = np.bincount(tokens, minlength=vocabulary.size)  # (vocabulary,)
        most_frequent_first = np.argsort(-occurrences, kind="stable")
        share_before = (np.cumsum(occurrences[most_frequent_first]) - occurrences[most_frequent_first]) / len(tokens)
        is_content_word = occurrences >= 5
        is_content_word[most_frequent_first[share_before < FUNCTION_WORD_SHARE]] = False

        neighbours = is_content_word[tokens[:-1]] & is_content_word[tokens[1:]]  # (tokens - 1,)
        neighbours[np.cumsum(lengths)[:-1] - 1] = False  # the last of one chunk, the first of the next
        pairs, times = np.unique((tokens[:-1] * vocabulary.size + tokens[1:])[neighbours], return_counts=True)
        return cls(is_content_word, set(pairs[times >= 3].tolist()))

    def grade(self, ids: np.ndarray, place: int) -> int:
        """2 for a content word whose neighbour tells something of it, 1 for another content word, 0 for the rest."""
        if not self.is_content_word[ids[place]]:
            return 0
        around = ids[max(0, place - 1) : place + 2].tolist()
        size = len(self.is_content_word)
        return 2 if any(first * size + second in self.frequent_pairs for first, second in pairwise(around)) else 1


def guess(model: BertForMaskedLM, hidden: list[HiddenWord], tokenizer: PreTrainedTokenizerBase) -> list[list[Guess]]:
    """The model's three likeliest words for the masked place of each line."""
    options: dict[str, Any] = {"tokenizer": tokenizer, "device": model.device, "top_k": 3}
    fill_mask = pipeline("fill-mask", model=model.eval(), **options)
    return [[Guess(found["token_str"], found["score"]) for found in fill_mask(line)] for line, _ in hidden]
