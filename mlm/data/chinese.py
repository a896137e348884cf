"""Where words start in a text: by spaces and punctuation, and in Chinese, which has none, as a segmenter finds them."""

import re
from functools import cache
from itertools import chain
from typing import NamedTuple, Protocol

import numpy as np
from tokenizers import Encoding

from mlm.data.tokenizer import is_punctuation

HAN = (("\u3400", "\u4dbf"), ("\u4e00", "\u9fff"), ("\uf900", "\ufaff"), ("\U00020000", "\U0003ffff"))
HAN_CHARACTER = re.compile(f"[{''.join(f'{first}-{last}' for first, last in HAN)}]")
HIGHEST_MARK = 0x1FFFF  # beyond this code point Unicode has no punctuation
ASCII_ALPHANUMERIC = (("0", "9"), ("A", "Z"), ("a", "z"))


def is_common(character: str) -> bool:
    """Whether a character is among the commonest: the first of the two levels of GB 2312 (3,755 characters, simplified)
    or of Big5 (5,401, traditional), or no Chinese one."""
    simplified, traditional = (character.encode(name, "ignore")[:1] for name in ("gb2312", "big5"))
    in_first_level = b"\xb0" <= simplified <= b"\xd7" or b"\xa4" <= traditional <= b"\xc6"
    return in_first_level or not HAN_CHARACTER.match(character)


class Segmenter(Protocol):
    """Cuts text into words, which joined are the text again: `rjieba.Jieba`."""

    def cut(self, text: str, /) -> list[str]: ...


def make_segmenter(user_words: list[str]) -> Segmenter:
    """Returns a segmenter for Chinese that keeps the given words whole. A frequency and a tag behind a word, as in
    jieba's own files, are ignored."""
    import rjieba  # here, so that what needs no words does without it

    segmenter = rjieba.Jieba()
    for line in user_words:
        segmenter.add_word(line.split()[0], None, None)
    return segmenter


class LocatedText(NamedTuple):
    """Lines of text, and where each of their tokens stands in it."""

    text: str  # the lines, each with its line feed
    characters: np.ndarray  # (characters,) uint32: code points of the text
    spans: np.ndarray  # (tokens, 2) int64: a token's first character in the text, and the one past its last
    first_tokens: np.ndarray  # (lines with a token,) int64: indices of the tokens that lines begin with

    @classmethod
    def of(cls, lines: list[str], encodings: list[Encoding]) -> "LocatedText":
        """Puts lines and their encodings together."""
        text = "".join(f"{line}\n" for line in lines)
        lengths = np.array([len(encoding) for encoding in encodings])
        flat_spans = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in encodings))
        spans = np.fromiter(flat_spans, np.int64, 2 * lengths.sum()).reshape(-1, 2)
        line_starts = np.cumsum([0, *(len(line) + 1 for line in lines)])[:-1]
        spans += np.repeat(line_starts, lengths)[:, None]
        first_tokens = (np.cumsum(lengths) - lengths)[lengths > 0]
        return cls(text, np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), spans, first_tokens)

    @property
    def continues_character(self) -> np.ndarray:
        """Whether each token begins inside of what the one before stands for, as one of a character's bytes: (tokens,)
        bool."""
        inside = np.append(False, self.spans[1:, 0] < self.spans[:-1, 1])
        inside[self.first_tokens] = False
        return inside


def find_word_starts(located: LocatedText) -> np.ndarray:
    """Returns whether each token starts a word of the text, (tokens,) bool: what spaces and punctuation separate, a
    punctuation mark being a word by itself. White space belongs to the word behind it."""
    is_space, is_mark = (table[np.minimum(located.characters, HIGHEST_MARK)] for table in _spaces_and_marks())
    is_word_start = ~is_space & (is_mark | np.append(True, (is_space | is_mark)[:-1]))  # (characters,)
    places = np.where(is_space, len(is_space), np.arange(len(is_space)))
    next_word_character = np.minimum.accumulate(places[::-1])[::-1]  # (characters,) from each on
    first = next_word_character[np.minimum(located.spans[:, 0], len(is_space) - 1)]
    is_blank = first >= located.spans[:, 1]
    starts = is_blank | is_word_start[np.minimum(first, len(is_space) - 1)]
    starts[1:] &= ~is_blank[:-1]
    starts &= ~located.continues_character
    starts[located.first_tokens] = True
    return starts


@cache
def _spaces_and_marks() -> np.ndarray:
    """Returns whether each code point up to HIGHEST_MARK is white space, and whether it is a mark: (2, points) bool."""
    characters = list(map(chr, range(HIGHEST_MARK + 1)))
    return np.array([[character.isspace() for character in characters], list(map(is_punctuation, characters))])


def correct_word_starts(starts_word: np.ndarray, located: LocatedText, segmented: list[str]) -> np.ndarray:
    """Returns `starts_word` (tokens,), corrected beside Chinese characters by the segmenter's words. Where it cuts
    买|T恤|ok|。:

        characters          买   T    恤   o    k    。
        is_word_character   1    1    1    1    1    0
        is_boundary         1    1    0    1    0    1     before the character
        tokens              买   t    恤   ok        。
        spans               0,1  1,2  2,3  3,5       5,6
        beside_chinese           1    1    1         0     a token, or the one before it
        together                 0    1    0         0     with the one before it
        starts_word         1    1    0    1         1
    """
    characters, spans = located.characters, located.spans
    is_han = _is_in(HAN, characters)
    is_word_character = is_han | _is_in(ASCII_ALPHANUMERIC, characters)
    is_boundary = np.zeros(len(characters) + 1, dtype=bool)
    is_boundary[np.cumsum(np.fromiter(map(len, segmented), np.int64, len(segmented)))] = True

    before, after = spans[:-1, 1] - 1, spans[1:, 0]  # (tokens - 1,) the characters on either side of a token's start
    beside_chinese = is_han[before] | is_han[after]
    together = is_word_character[before] & is_word_character[after] & ~is_boundary[after]
    corrected = np.append(starts_word[:1], np.where(beside_chinese, ~together, starts_word[1:]))
    return corrected & ~located.continues_character


def _is_in(ranges: tuple[tuple[str, str], ...], characters: np.ndarray) -> np.ndarray:
    """Returns whether each code point (characters,) uint32 is in one of the ranges, such as HAN: (characters,) bool."""
    return np.logical_or.reduce([(characters >= ord(low)) & (characters <= ord(high)) for low, high in ranges])
