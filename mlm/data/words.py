"""Words: where they start, as the raw text shows; those that the vocabulary breaks; new ones for the vocabulary."""

import re
from collections import Counter
from itertools import chain, compress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from tokenizers import AddedToken, Encoding, Tokenizer
from tokenizers.normalizers import BertNormalizer
from transformers import PreTrainedTokenizerBase

from mlm.data.text_files import read_lines
from mlm.errors import UserError

HAN = (("\u3400", "\u4dbf"), ("\u4e00", "\u9fff"), ("\uf900", "\ufaff"), ("\U00020000", "\U0003ffff"))
HAN_CHARACTER = re.compile(f"[{''.join(f'{first}-{last}' for first, last in HAN)}]")
ASCII = (("0", "9"), ("A", "Z"), ("a", "z"))
MANY_PIECES = 3  # a word of so many is broken
COUNTED_WORDS = 1 << 18  # of more distinct ones the rarer half is dropped, so that memory stays small

# ---------------------------------------------------------------------------------------------- where words start


def read_words(path: str | None, setting: str) -> list[str]:
    """The distinct lines that are not blank, none where there is no path. Raises UserError, which names `setting`."""
    if path is None:
        return []
    if not Path(path).is_file():
        raise UserError(f"{setting}: there is no file {path}; it should hold one word a line, in UTF-8")
    return list(dict.fromkeys(filter(None, read_lines([Path(path)], setting))))


class Segmenter(Protocol):
    """Cuts text into words, which joined are the text again: `rjieba.Jieba`."""

    def cut(self, text: str, /) -> list[str]: ...


def make_segmenter(user_words: list[str]) -> Segmenter:
    """A segmenter for Chinese that keeps the given words whole. A frequency and a tag behind a word, as in jieba's own
    files, are ignored."""
    import rjieba  # here, so that what needs no words does without it

    segmenter = rjieba.Jieba()
    for line in user_words:
        segmenter.add_word(line.split()[0], None, None)
    return segmenter


class Encoders(NamedTuple):
    """Tokenizers that only encode."""

    any_line: Tokenizer
    ascii_line: Tokenizer  # for lines that are ASCII: the same tokens, faster


def make_encoders(tokenizer: PreTrainedTokenizerBase) -> Encoders:
    """Encoders without limit or padding, to which text that spells [MASK] is text."""
    description = tokenizer.backend_tokenizer.to_str()
    encoders = Encoders(any_line=Tokenizer.from_str(description), ascii_line=Tokenizer.from_str(description))
    for encoder in encoders:
        encoder.no_truncation()  # both are on in the tokenizers of sentence-embedding checkpoints
        encoder.no_padding()
        encoder.encode_special_tokens = True
    normalizer = encoders.ascii_line.normalizer
    if isinstance(normalizer, BertNormalizer):  # ASCII has no accents and no Chinese characters to look for
        normalizer.strip_accents = normalizer.handle_chinese_chars = False
    return encoders


class TokenizedLines(NamedTuple):
    """Lines as tokens, end to end."""

    tokens: np.ndarray  # (tokens,) int64
    lengths: np.ndarray  # (lines,) int64: tokens in each line
    starts_word: np.ndarray  # (tokens,) bool
    segmented: list[str]  # the segmenter's words in the lines that hold Chinese


def tokenize(lines: list[str], encoders: Encoders, continues_word: np.ndarray, segmenter: Segmenter) -> TokenizedLines:
    """Tokenizes lines and finds where words start.

    Words are what the tokenizer's own pre-tokenizer cuts, at spaces and punctuation. Beside a Chinese character the
    segmenter decides instead: characters, ASCII letters and digits that it leaves together are one word. No token is
    cut or joined for it. continues_word: (vocabulary,) bool, for pieces such as ##ing.
    """
    kinds = ["ascii" if line.isascii() else "chinese" if HAN_CHARACTER.search(line) else "other" for line in lines]
    encode_by_kind = {
        "ascii": encoders.ascii_line.encode_batch_fast,
        "other": encoders.any_line.encode_batch_fast,
        "chinese": encoders.any_line.encode_batch,  # which says where a token stands in its line, too
    }
    encoded = {}
    for kind, encode_batch in encode_by_kind.items():
        of_kind = [line for line, kind_of_line in zip(lines, kinds, strict=True) if kind_of_line == kind]
        encoded[kind] = encode_batch(of_kind, add_special_tokens=False)
    remaining = {kind: iter(encodings) for kind, encodings in encoded.items()}
    ids = [next(remaining[kind]).ids for kind in kinds]  # in the order of the lines again
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(chain.from_iterable(ids), np.int64, lengths.sum())
    starts_word = ~continues_word[tokens]
    segmented = []
    if encoded["chinese"]:
        chinese = np.array(kinds) == "chinese"  # (lines,)
        text = "".join(f"{line}\n" for line in compress(lines, chinese))
        segmented = segmenter.cut(text)
        inside = np.repeat(chinese, lengths)
        starts_word[inside] = _starts_by_segmenter(starts_word[inside], text, segmented, encoded["chinese"])
    return TokenizedLines(tokens, lengths, starts_word, segmented)


def _starts_by_segmenter(
    starts_word: np.ndarray, text: str, segmented: list[str], located: list[Encoding]
) -> np.ndarray:
    """`starts_word` (tokens,) of the lines of `text`, corrected beside Chinese characters by the segmenter's words."""
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)  # (characters,)
    line_starts = np.flatnonzero(np.concatenate([[True], characters[:-1] == ord("\n")]))  # (lines,)
    flat_spans = chain.from_iterable(chain.from_iterable(encoding.offsets for encoding in located))
    spans = np.fromiter(flat_spans, np.int64, 2 * len(starts_word)).reshape(-1, 2)  # (tokens, 2): first, past the last
    spans += np.repeat(line_starts, [len(encoding) for encoding in located])[:, None]
    is_boundary = np.zeros(len(characters) + 1, dtype=bool)  # whether a word of the segmenter's ends before a character
    is_boundary[np.cumsum(np.fromiter(map(len, segmented), np.int64, len(segmented)))] = True
    before, after = spans[:-1, 1] - 1, spans[1:, 0]  # the characters on either side of a token's start
    han = _is_in(HAN, characters)
    joins = han | _is_in(ASCII, characters)
    together = joins[before] & joins[after] & ~is_boundary[after]
    beside_chinese = han[before] | han[after]
    return np.append(starts_word[:1], np.where(beside_chinese, ~together, starts_word[1:]))


def _is_in(ranges, characters):
    return np.logical_or.reduce([(characters >= ord(low)) & (characters <= ord(high)) for low, high in ranges])


# ---------------------------------------------------------------------------------- words that the vocabulary breaks


class BrokenWord(NamedTuple):
    """A word that the vocabulary has no token for."""

    word: str  # as the vocabulary spells it
    occurrences: int
    pieces: list[str]


class WordCounts:
    """How often words occur that may be broken. A word that was rare at first may be counted low."""

    def __init__(self):
        self.pieces = Counter()  # words by the bytes of their ids (pieces,) int64
        self.chinese = Counter()  # the segmenter's words

    def update(self, tokens: np.ndarray, continues_word: np.ndarray, segmented: list[str]) -> None:
        """Counts the words in tokens (tokens,) int64 and those of the segmenter."""
        starts = np.append(np.flatnonzero(~continues_word[tokens]), len(tokens))
        many = np.flatnonzero(np.diff(starts) >= MANY_PIECES)
        content = tokens.tobytes()
        bounds = zip((8 * starts[many]).tolist(), (8 * starts[many + 1]).tolist(), strict=True)
        self.pieces.update(content[first:after] for first, after in bounds)
        self.chinese.update(segmented)
        for counter in (self.pieces, self.chinese):
            if len(counter) > COUNTED_WORDS:
                kept = counter.most_common(COUNTED_WORDS // 2)
                counter.clear()
                counter.update(dict(kept))

    def broken(self, encoder: Tokenizer, most: int) -> list[BrokenWord]:
        """At most so many broken words, the most frequent first.

        A word of the pre-tokenizer's is broken if it has a letter and `MANY_PIECES` or more. A word of the segmenter's
        with Chinese in it is broken if it has more than one piece and an unknown or a rare character.
        """
        prefix = encoder.model.continuing_subword_prefix
        found = []
        for content, count in self.pieces.most_common(2 * most):
            pieces = [encoder.id_to_token(index) or "" for index in np.frombuffer(content, np.int64).tolist()]
            word = pieces[0] + "".join(piece.removeprefix(prefix) for piece in pieces[1:])
            if any(map(str.isalpha, word)):
                found.append(BrokenWord(word, count, pieces))
        unknown = encoder.model.unk_token
        for word, count in self.chinese.items():
            if HAN_CHARACTER.search(word):
                pieces = encoder.encode(word, add_special_tokens=False).tokens
                if len(pieces) > 1 and (unknown in pieces or not all(map(_is_common, word))):
                    found.append(BrokenWord(word, count, pieces))
        return sorted(found, key=lambda broken: (-broken.occurrences, broken.word))[:most]


def _is_common(character: str) -> bool:
    """Whether a character is among the commonest: the first of the two levels of GB 2312 (3,755 characters, simplified)
    or of Big5 (5,401, traditional), or no Chinese one."""
    simplified, traditional = (character.encode(name, "ignore")[:1] for name in ("gb2312", "big5"))
    is_common = b"\xb0" <= simplified <= b"\xd7" or b"\xa4" <= traditional <= b"\xc6"
    return is_common or not HAN_CHARACTER.match(character)


# --------------------------------------------------------------------------------------- words for the vocabulary


def add_words(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> dict[str, list[int]]:
    """Adds the words that are not one token already to the tokenizer. Returns the ids of each one's pieces until now.

    Their own ids follow the vocabulary's, in this order. A word is found where nothing but spaces and punctuation is
    beside it; one with a Chinese character, anywhere.
    """
    normalizer = tokenizer.backend_tokenizer.normalizer
    distinct: dict[str, str] = {}  # by how the tokenizer sees them
    for word in words:  # "Insulin" and "insulin" may be the same
        distinct.setdefault(normalizer.normalize_str(word) if normalizer else word, word)
    added = {}
    for word in distinct.values():
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(pieces) > 1 or pieces == [tokenizer.unk_token_id]:
            added[word] = pieces
    tokenizer.add_tokens([_as_token(word) for word in added])
    return added


def _as_token(word):
    """BERT's normalizer puts spaces around each Chinese character; a word of these alone is found without it."""
    all_chinese, any_chinese = all(map(HAN_CHARACTER.match, word)), HAN_CHARACTER.search(word)
    return AddedToken(word, single_word=not any_chinese, normalized=not all_chinese)
