"""Words: where they start in the raw text, which are split into subwords, and new ones for the vocabulary."""

import json
import re
from collections import Counter
from itertools import chain, compress, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.normalizers import BertNormalizer
from transformers import PreTrainedTokenizerBase

from mlm.data.chinese import HAN_CHARACTER, LocatedText, Segmenter, correct_word_starts, find_word_starts, is_common
from mlm.data.tokenizer import ROLES, Vocabulary, is_wordpiece, kind_of, role_id
from mlm.errors import UserError
from mlm.text.lines import read_lines

PROBE = "ab cd ef, (gh) ij-kl 12"  # text whose words are known
NO_CHARACTER = "\uffff"  # which Unicode keeps from being one
MANY_SUBWORDS = 3  # from here on a word is listed, as one that may be worth a token of its own
MOST_SUBWORDS = 64  # what has more is no word, but text without spaces
PIECE_CHARACTERS = 1 << 20  # of a line that is longer
BETWEEN_WORDS = re.compile("[ \t\r\u3000\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f]")  # and Chinese punctuation
ONE_SPACE = re.compile(r"(?<=\S) (?=\S)")
COUNTED_WORDS = 1 << 18  # of more distinct ones the rarer half is dropped, so that memory stays small
KEPT_WORDS = 1 << 16  # of a part of the text


def read_words(path: str | None, setting: str) -> list[str]:
    """Returns a file's distinct lines that are not blank, none where there is no path.

    Raises UserError, which names `setting`, where there is no such file.
    """
    if path is None:
        return []
    if not Path(path).is_file():
        raise UserError(f"{setting}: there is no file {path}; it should hold one word per line, in UTF-8")
    return list(dict.fromkeys(filter(None, read_lines([Path(path)], setting))))


class Encoders(NamedTuple):
    """Tokenizers that only encode."""

    any_line: Tokenizer
    ascii_line: Tokenizer  # for lines that are ASCII: the same tokens, faster

    def describe(self) -> tuple[str, str]:
        """Returns both as JSON, of which `from_descriptions` makes them again in another process."""
        return self.any_line.to_str(), self.ascii_line.to_str()

    @classmethod
    def from_descriptions(cls, descriptions: tuple[str, str]) -> "Encoders":
        encoders = cls(*map(Tokenizer.from_str, descriptions))
        for encoder in encoders:
            encoder.encode_special_tokens = True  # which no description says
        return encoders


def make_encoders(tokenizer: PreTrainedTokenizerBase) -> Encoders:
    """Returns encoders without limit or padding, to which text that spells [MASK] or another token with one of BERT's
    five roles is text. Those that the user added, such as [DRUG], are words of the text."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    five = {role_id(tokenizer, role) for role in ROLES} | {tokenizer.bos_token_id, tokenizer.eos_token_id}
    for token in content["added_tokens"]:
        token["special"] = token["id"] in five
    if content["model"]["type"] == "Unigram":  # to which they are pieces of text as well, unless no text spells them
        for token in content["added_tokens"]:
            token["content"] = NO_CHARACTER * token["special"] + token["content"]
        for index, piece in enumerate(content["model"]["vocab"]):
            piece[0] = NO_CHARACTER * (index in five) + piece[0]
        content["post_processor"] = None  # which knows them by their names
    description = json.dumps(content)
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
    starts_spaced: np.ndarray  # (tokens,) bool: without the segmenter, by spaces and punctuation alone
    segmented: list[str]  # the segmenter's words in the lines that hold Chinese


def tokenize(lines: list[str], encoders: Encoders, vocabulary: Vocabulary, segmenter: Segmenter) -> TokenizedLines:
    """Tokenizes lines as `_tokenize` does, a line that may be a book in pieces: a character takes hundreds of bytes."""
    if max(map(len, lines), default=0) <= PIECE_CHARACTERS:
        return _tokenize(lines, encoders, vocabulary, segmenter)
    gaps = BETWEEN_WORDS if is_wordpiece(encoders.any_line) else ONE_SPACE
    pieces = [cut_text(line, PIECE_CHARACTERS, gaps) for line in lines]
    tokenized = [_tokenize([piece], encoders, vocabulary, segmenter) for piece in chain.from_iterable(pieces)]
    arrays = list(zip(*tokenized, strict=True))[:4]
    tokens, lengths, starts_word, starts_spaced = map(np.concatenate, arrays)
    first_pieces = np.cumsum([0, *map(len, pieces)])[:-1]
    segmented = [word for piece in tokenized for word in piece.segmented]
    return TokenizedLines(tokens, np.add.reduceat(lengths, first_pieces), starts_word, starts_spaced, segmented)


def cut_text(line: str, limit: int, gaps: re.Pattern[str] = BETWEEN_WORDS) -> list[str]:
    """Returns a line in pieces of hardly more than `limit` characters, which begin where the tokenizer cuts anyway."""
    bounds = [0]
    while bounds[-1] + limit < len(line):
        cut = gaps.search(line, bounds[-1] + limit)
        if not cut:
            break
        bounds.append(cut.start())
    return [line[start:end] for start, end in pairwise([*bounds, len(line)])]


def _tokenize(lines: list[str], encoders: Encoders, vocabulary: Vocabulary, segmenter: Segmenter) -> TokenizedLines:
    """Tokenizes lines and finds where words start.

    Words are what spaces and punctuation separate, whatever the tokenizer. The tokens of most tell in ASCII, and those
    of WordPiece in any text; else the text does, by where each token stands in it. Beside a Chinese character the
    segmenter decides instead: characters, ASCII letters and digits that it leaves together are one word. No token is
    cut or joined for it.
    """
    named = ("ascii" if line.isascii() else "chinese" if HAN_CHARACTER.search(line) else "other" for line in lines)
    kinds = np.array(list(named), dtype=str)  # (lines,)
    located = _located_kinds(encoders, vocabulary)
    encoded = {}
    for kind in ("ascii", "other", "chinese"):
        encoder = encoders.ascii_line if kind == "ascii" else encoders.any_line
        encode_batch = encoder.encode_batch if kind in located else encoder.encode_batch_fast
        encoded[kind] = encode_batch(list(compress(lines, kinds == kind)), add_special_tokens=False)
    remaining = {kind: iter(encodings) for kind, encodings in encoded.items()}
    ids = [next(remaining[kind]).ids for kind in kinds.tolist()]  # in the order of the lines again
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(chain.from_iterable(ids), np.int64, lengths.sum())
    starts_word = vocabulary.word_starts(tokens, lengths)
    starts_spaced, segmented = starts_word, []
    for kind in located:
        if encoded[kind]:
            inside = np.repeat(kinds == kind, lengths)
            located_text = LocatedText.of(list(compress(lines, kinds == kind)), encoded[kind])
            if not is_wordpiece(encoders.any_line):
                starts_spaced[inside] = find_word_starts(located_text)
            if kind == "chinese":
                segmented = segmenter.cut(located_text.text)
                starts_word = starts_spaced.copy()
                starts_word[inside] = correct_word_starts(starts_spaced[inside], located_text, segmented)
    return TokenizedLines(tokens, lengths, starts_word, starts_spaced, segmented)


def _located_kinds(encoders: Encoders, vocabulary: Vocabulary) -> tuple[str, ...]:
    """Returns the kinds of lines in which it takes the places of tokens to tell where words start."""
    if is_wordpiece(encoders.any_line):
        return ("chinese",)
    probe = encoders.ascii_line.encode(PROBE, add_special_tokens=False)
    told = vocabulary.word_starts(np.array(probe.ids, dtype=np.int64), np.array([len(probe.ids)]))
    is_told = np.array_equal(told, find_word_starts(LocatedText.of([PROBE], [probe])))
    return ("other", "chinese") if is_told else ("ascii", "other", "chinese")


# ------------------------------------------------------------------------------------------ words split into subwords


class SplitWord(NamedTuple):
    """A word that the vocabulary has no token for."""

    word: str  # as the vocabulary spells it
    occurrences: int
    subwords: list[str]


class WordCounts:
    """Counts words that may be split into subwords. A word that was rare at first may be counted low."""

    def __init__(self):
        self.subwords = Counter()  # words by the bytes of their ids (subwords,) int64
        self.chinese = Counter()  # the segmenter's words

    def update(
        self, tokens: np.ndarray, starts_spaced: np.ndarray, vocabulary: Vocabulary, segmented: list[str]
    ) -> None:
        """Counts the words between spaces and punctuation, in tokens (tokens,) int64 and by where they start (tokens,)
        bool, and those of the segmenter. White space is no subword."""
        word_of_token, is_kept = np.cumsum(starts_spaced), ~vocabulary.is_blank[tokens]
        tokens = tokens[is_kept]
        bounds = np.append(np.flatnonzero(np.diff(word_of_token[is_kept], prepend=0)), len(tokens))
        subwords = np.diff(bounds)
        many = np.flatnonzero((subwords >= MANY_SUBWORDS) & (subwords <= MOST_SUBWORDS))
        content = tokens.tobytes()
        byte_bounds = zip((8 * bounds[many]).tolist(), (8 * bounds[many + 1]).tolist(), strict=True)
        self.subwords.update(content[first:after] for first, after in byte_bounds)
        self.chinese.update(segmented)
        self._forget_rare()

    def _forget_rare(self) -> None:
        for counter in (self.subwords, self.chinese):
            if len(counter) > COUNTED_WORDS:
                kept = counter.most_common(COUNTED_WORDS // 2)
                counter.clear()
                counter.update(dict(kept))

    def to_json(self) -> dict[str, dict[str, int]]:
        """Returns the most frequent ones, for `add`."""
        subwords = {content.hex(): count for content, count in self.subwords.most_common(KEPT_WORDS)}
        return {"subwords": subwords, "chinese": dict(self.chinese.most_common(KEPT_WORDS))}

    def add(self, other: dict[str, dict[str, int]]) -> None:
        """Adds the counts of another part of the text."""
        self.subwords.update({bytes.fromhex(content): count for content, count in other["subwords"].items()})
        self.chinese.update(other["chinese"])
        self._forget_rare()

    def split_words(self, encoder: Tokenizer, vocabulary: Vocabulary, limit: int) -> list[SplitWord]:
        """Returns at most `limit` words that are split, the most frequent first.

        A word between spaces and punctuation counts if it has a letter and is split into `MANY_SUBWORDS` or more. A
        word of the segmenter's with Chinese in it counts if it has more than one token and an unknown or a rare
        character.
        """
        found = []
        for content, count in self.subwords.most_common(2 * limit):
            ids = np.frombuffer(content, np.int64).tolist()
            subwords = [_spelled(index, encoder) for index in ids]
            whole = encoder.decode(ids, skip_special_tokens=False) if encoder.decoder else "".join(subwords)
            word = whole.replace(NO_CHARACTER, "").strip()
            if any(map(str.isalpha, word)) and not HAN_CHARACTER.search(word):
                found.append(SplitWord(word, count, subwords))
        for word, count in self.chinese.items():
            if HAN_CHARACTER.search(word):
                encoding = encoder.encode(word, add_special_tokens=False)
                is_rare = vocabulary.unk_id in encoding.ids or not all(map(is_common, word))
                subwords = [_spelled(index, encoder) for index in encoding.ids if not vocabulary.is_blank[index]]
                if len(subwords) > 1 and is_rare:
                    found.append(SplitWord(word, count, subwords))
        return sorted(found, key=lambda split: (-split.occurrences, split.word))[:limit]


def _spelled(index: int, encoder: Tokenizer) -> str:
    """Returns a token as a list of subwords shows it: with ## where WordPiece has it; else as it stands in a text."""
    if is_wordpiece(encoder):
        return encoder.id_to_token(index) or ""
    return encoder.decode([index], skip_special_tokens=False).replace(NO_CHARACTER, "").strip()


def add_words(tokenizer: PreTrainedTokenizerBase, words: list[str]) -> dict[str, list[int]]:
    """Adds the words that are not one token already to the tokenizer. Returns the ids of each one's former subwords.

    What the vocabulary has, though it never comes of text (BERT's has "..."), stays so: it is a token already. A word
    is found where nothing but spaces and punctuation is beside it; one with a Chinese character, anywhere. Raises
    UserError for a tokenizer that is not WordPiece: to others a word with the space before it is another one.
    """
    if words and not is_wordpiece(tokenizer.backend_tokenizer):
        kind = kind_of(tokenizer.backend_tokenizer)
        raise UserError(f"add_words: words can be added to WordPiece alone, and this tokenizer is {kind}")
    normalizer = tokenizer.backend_tokenizer.normalizer
    distinct: dict[str, str] = {}  # by how the tokenizer sees them
    for word in words:  # "Insulin" and "insulin" may be the same
        distinct.setdefault(normalizer.normalize_str(word) if normalizer else word, word)
    added, tokens, known = {}, [], tokenizer.get_vocab()
    for word in distinct.values():
        if word in known:
            continue
        subwords = tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(subwords) > 1 or subwords == [tokenizer.unk_token_id]:
            added[word] = subwords
            # BERT's normalizer puts spaces around each Chinese character; a word of these alone is found without it.
            all_chinese, any_chinese = all(map(HAN_CHARACTER.match, word)), HAN_CHARACTER.search(word)
            tokens.append(AddedToken(word, single_word=not any_chinese, normalized=not all_chinese))
    tokenizer.add_tokens(tokens)
    return added
