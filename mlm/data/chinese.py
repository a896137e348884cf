"""Chinese: its characters, and the words that a segmenter finds in its text, which has no spaces."""

import re
from typing import Protocol

import numpy as np

HAN = (("\u3400", "\u4dbf"), ("\u4e00", "\u9fff"), ("\uf900", "\ufaff"), ("\U00020000", "\U0003ffff"))
HAN_CHARACTER = re.compile(f"[{''.join(f'{first}-{last}' for first, last in HAN)}]")
ASCII_ALPHANUMERIC = (("0", "9"), ("A", "Z"), ("a", "z"))


def is_in(ranges: tuple[tuple[str, str], ...], characters: np.ndarray) -> np.ndarray:
    """Returns whether each code point (characters,) uint32 is in one of the ranges, such as HAN: (characters,) bool."""
    return np.logical_or.reduce([(characters >= ord(low)) & (characters <= ord(high)) for low, high in ranges])


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
