"""Chinese: its characters, and where words start in its text, which has no spaces, as a segmenter finds them."""

import re
from itertools import chain
from typing import Protocol

import numpy as np
from tokenizers import Encoding

HAN = (("\u3400", "\u4dbf"), ("\u4e00", "\u9fff"), ("\uf900", "\ufaff"), ("\U00020000", "\U0003ffff"))
HAN_CHARACTER = re.compile(f"[{''.join(f'{first}-{last}' for first, last in HAN)}]")
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


def find_word_starts(starts_word: np.ndarray, text: str, segmented: list[str], located: list[Encoding]) -> np.ndarray:
    """Returns `starts_word` (tokens,) of the lines of `text`, corrected beside Chinese characters by the segmenter's
    words. Where the segmenter cuts 买|T恤|ok|。:

        characters          买   T    恤   o    k    。
        is_word_character   1    1    1    1    1    0
        is_boundary         1    1    0    1    0    1     before the character
        tokens              买   t    恤   ok        。
        spans               0,1  1,2  2,3  3,5       5,6
        beside_chinese           1    1    1         0     a token, or the one before it
        together                 0    1    0         0     with the one before it
        starts_word         1    1    0    1         1
    """
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)  # (characters,)
    is_han = _is_in(HAN, characters)
    is_word_character = is_han | _is_in(ASCII_ALPHANUMERIC, characters)
    is_boundary = np.zeros(len(characters) + 1, dtype=bool)
    is_boundary[np.cumsum(np.fromiter(map(len, segmented), np.int64, len(segmented)))] = True

    flat_spans = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in located))
    spans = np.fromiter(flat_spans, np.int64, 2 * len(starts_word)).reshape(-1, 2)  # (tokens, 2): first, past the last
    line_starts = np.flatnonzero(np.concatenate([[True], characters[:-1] == ord("\n")]))  # (lines,)
    spans += np.repeat(line_starts, [len(encoding) for encoding in located])[:, None]

    before, after = spans[:-1, 1] - 1, spans[1:, 0]  # (tokens - 1,) the characters on either side of a token's start
    beside_chinese = is_han[before] | is_han[after]
    together = is_word_character[before] & is_word_character[after] & ~is_boundary[after]
    return np.append(starts_word[:1], np.where(beside_chinese, ~together, starts_word[1:]))


def _is_in(ranges: tuple[tuple[str, str], ...], characters: np.ndarray) -> np.ndarray:
    """Returns whether each code point (characters,) uint32 is in one of the ranges, such as HAN: (characters,) bool."""
    return np.logical_or.reduce([(characters >= ord(low)) & (characters <= ord(high)) for low, high in ranges])
