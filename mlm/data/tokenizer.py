"""The tokenizer, from a checkpoint or learned from the text, and its ids as masking and packing need them."""

import unicodedata
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig, BertTokenizer, PreTrainedTokenizerBase

from Config import Config
from mlm.errors import UserError, first_line
from mlm.runtime.pretrained import load_pretrained, stored_file
from mlm.storage import digest, once

UNUSED = ("[unused", "<unused")  # tokens that are there for words to come
FEW = 0.01  # of a vocabulary: tokens that a tokenizer may miss without a word
ROLES = {  # what BERT calls a special token, and who else has its role
    "cls": ("cls", "bos"), "sep": ("sep", "eos"), "pad": ("pad", "eos", "sep"), "unk": ("unk",), "mask": ("mask",),
}  # fmt: skip
RARE_CHARACTER = "\U00013000"  # a hieroglyph
PROBES = (
    "a Capital letter",
    "Übung café",
    "\uff21\uff22 \uff11",
    "wait\u2026",
    "two  spaces",
    f"a {RARE_CHARACTER} sign",
    "患者ok",
)
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def load_tokenizer(
    config: Config, train_lines: Callable[[], Iterator[str]], text_digest: str
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that `initial_pretrain_tokenizer` names, or WordPiece learned from the training lines.

    Raises UserError where it is missing, or is not one that masking and packing can work with.
    """
    name = config.initial_pretrain_tokenizer
    if name == "corpus":
        key = digest(text_digest, config.vocab_size, version("tokenizers"), "accents are kept")
        folder = Path(config.path_model_save) / ".cache" / f"vocabulary-{key}"

        def learn(temporary: Path) -> None:
            learn_tokenizer(train_lines, config.vocab_size).save_pretrained(temporary)

        return AutoTokenizer.from_pretrained(once(folder, learn))
    tokenizer = load_pretrained_tokenizer(name, "initial_pretrain_tokenizer")
    kind = kind_of(tokenizer.backend_tokenizer)
    if config.scratch_size is not None and kind != "WordPiece":
        raise UserError(
            f"initial_pretrain_tokenizer, initial_pretrain_model: {name} is {kind}, and "
            f"{config.initial_pretrain_model} a BERT, whose tokenizer is WordPiece"
        )
    if config.scratch_size is None and config.initial_pretrain_model != name:
        _refuse_another_vocabulary(tokenizer, config)
    return tokenizer


def load_pretrained_tokenizer(name: str, setting: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or from the Hub. Raises UserError, naming `setting`, as `load_tokenizer`."""
    tokenizer = load_pretrained(_load_as_stored, name, setting, "a tokenizer")
    needed = ROLES if is_wordpiece(tokenizer.backend_tokenizer) else ("cls", "sep", "mask")
    missing = [role for role in needed if role_id(tokenizer, role) is None]
    if missing:
        raise UserError(f"{setting}: {name} has no {' and no '.join(missing)} token; a masked language model needs one")
    if not regular_ids(tokenizer):  # transformers makes one up where the files are missing
        raise UserError(f"{setting}: {name} has no vocabulary; vocab.txt or tokenizer.json is missing")
    return tokenizer


def _load_as_stored(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the files say; BERT's own where none says it, as in early checkpoints.

    Raises ValueError where it is of no kind that is served. tokenizer.json is asked as well, as transformers makes
    WordPiece of any vocabulary that lies beside the config of a BERT.
    """
    if "model_type" not in BertConfig.get_config_dict(name, **options)[0]:
        options["config"] = BertConfig()  # of which tokenizer_config.json may say otherwise
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} is not one of the tokenizers library")
    kind, file = kind_of(tokenizer.backend_tokenizer), stored_file(name, "tokenizer.json")
    stored = kind_of(Tokenizer.from_file(str(file))) if file else kind
    if stored != kind:
        raise ValueError(f"its tokenizer.json is {stored}, and transformers makes {kind} of it")
    if kind not in ("WordPiece", "BPE", "Unigram"):
        raise ValueError(f"it is {kind}; WordPiece, BPE and Unigram are known")
    try:
        ids = tokenizer.backend_tokenizer.encode(RARE_CHARACTER, add_special_tokens=False).ids
    except Exception as error:  # the library raises no other kind
        raise ValueError(first_line(error)) from error
    if not ids:
        raise ValueError("it has no token for what its vocabulary lacks, so that such text would be lost")
    return tokenizer


def kind_of(tokenizer: Tokenizer) -> str:
    """Returns how a tokenizer makes tokens of words: WordPiece, BPE, Unigram or another."""
    return type(tokenizer.model).__name__


def is_wordpiece(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is of BERT's kind, whose tokens say of any text where its words start."""
    return kind_of(tokenizer) == "WordPiece"


def role_id(tokenizer: PreTrainedTokenizerBase, role: str) -> int | None:
    """Returns the id of the token that has a role, one of ROLES, by whatever name; None where there is none."""
    ids = (getattr(tokenizer, f"{name}_token_id") for name in ROLES[role])
    return next((index for index in ids if index is not None), None)


def _refuse_another_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Raises UserError where the model's folder, or its page on the Hub, has another token for a row of the model.

    Words may stand where the model's vocabulary has [unused1] and the like, which are there for them.
    """
    try:
        own = load_pretrained_tokenizer(config.initial_pretrain_model, "initial_pretrain_model")
    except UserError:  # it has none to compare with
        return
    own_tokens = {index: token for token, index in own.get_vocab().items()}
    others = {
        index: token
        for token, index in tokenizer.get_vocab().items()
        if own_tokens.get(index, token) != token and not own_tokens[index].startswith(UNUSED)
    }
    if others:
        index = min(others)
        raise UserError(
            f"initial_pretrain_tokenizer, initial_pretrain_model: {len(others):,} of the {len(own_tokens):,} tokens of "
            f"{config.initial_pretrain_model} are others in {config.initial_pretrain_tokenizer}, such as {index}: "
            f"{own_tokens[index]!r} and {others[index]!r}. Set both to the same name"
        )


def tokenizer_warnings(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Returns a warning where WordPiece changes what its vocabulary keeps, capitals or accents, or the reverse; and
    where another kind makes other tokens than the file that it was loaded from says."""
    if not is_wordpiece(tokenizer.backend_tokenizer):
        return _differences_from_file(tokenizer, name)
    normalizer = tokenizer.backend_tokenizer.normalizer
    normalize = normalizer.normalize_str if normalizer else str
    regular = tokenizer.convert_ids_to_tokens(regular_ids(tokenizer))
    words = [token.removeprefix("##") for token in regular]
    capitals = [word for word in words if word != word.lower()]
    accents = [word for word in words if word != unicodedata.normalize("NFD", word)]
    lost = [word for word in [*capitals, *accents] if normalize(word).strip() != word]
    setting = '"do_lower_case" in its tokenizer_config.json (of a copy, if it is on the Hub)'
    if len(lost) > len(words) * FEW:
        return [
            f"warning: {len(lost):,} of the {len(words):,} tokens of {name}, such as {lost[0]!r}, can never come of "
            f"text, as its tokenizer takes capitals or accents away. If it should keep them, set {setting} to false"
        ]
    if not capitals and normalize("A") == "A" and "a" in words:
        return [
            f"warning: no token of {name} has a capital letter, and its tokenizer keeps them, so that a word with one "
            f"is [UNK] or is cut at it. If it should lower-case text, set {setting} to true"
        ]
    return []


def _differences_from_file(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Returns a warning where transformers, which builds some families' tokenizers anew, makes other tokens of text
    than tokenizer.json says."""
    file = stored_file(name, "tokenizer.json")
    stored = Tokenizer.from_file(str(file)) if file else tokenizer.backend_tokenizer
    for text in PROBES:
        of_file, of_tokenizer = (
            encoder.encode(text, add_special_tokens=False).ids for encoder in (stored, tokenizer.backend_tokenizer)
        )
        if of_file != of_tokenizer:
            return [
                f"warning: transformers makes other tokens of {text!r} than the tokenizer.json of {name} says, which "
                "the model may have been trained with"
            ]
    return []


def learn_tokenizer(lines: Callable[[], Iterator[str]], size: int) -> BertTokenizer:
    """Learns a WordPiece tokenizer like BERT's uncased one, of about `size` entries, from the lines.

    It keeps accents, unlike BERT's: the voicing marks of kana, the vowel signs of Hindi and many letters are made with
    what Unicode calls so, and text without them says something else.

    The first pass collects the characters alone; the second receives them sorted. In the library's own order, which
    decides ties, the vocabulary would differ from run to run. More characters than `size` make it larger.
    """

    def learn(entries: int, special_tokens: list[str]) -> dict[str, int]:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=False)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=entries, min_frequency=2, special_tokens=special_tokens, show_progress=False
        )
        tokenizer.train_from_iterator(lines(), trainer)
        return tokenizer.get_vocab()

    characters = sorted(learn(0, SPECIAL_TOKENS).keys() - set(SPECIAL_TOKENS))
    vocabulary = learn(size, SPECIAL_TOKENS + characters)
    return BertTokenizer(vocab=vocabulary, do_lower_case=True, strip_accents=False, model_max_length=512)


class Vocabulary(NamedTuple):
    """The ids of a tokenizer, as cutting, masking and packing need them, and what its tokens say of words."""

    cls_id: int  # before each chunk
    sep_id: int  # behind it
    pad_id: int
    unk_id: int  # -1 where there is none, as every text has tokens
    mask_id: int
    separators: int  # between two texts in one chunk
    regular_ids: np.ndarray  # (regular,) int64, ascending: neither special nor unused; may replace a chosen token
    begins_word: np.ndarray  # (size,) bool: wherever it stands, a word begins with it; not so subwords such as ##ing
    ends_word: np.ndarray  # (size,) bool: whatever comes next, a word begins there
    is_blank: np.ndarray  # (size,) bool: white space alone, which belongs to the word behind it

    @property
    def size(self) -> int:
        return len(self.begins_word)

    def word_starts(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns whether each of the tokens (tokens,) of lines, with so many tokens each (lines,), starts a word:
        (tokens,) bool. Exact for WordPiece; for most others in lines of ASCII characters, but beside [UNK]."""
        starts = self.begins_word[tokens]
        starts[1:] |= self.ends_word[tokens[:-1]]
        starts[1:] &= ~self.is_blank[tokens[:-1]]
        starts[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
        return starts


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Returns the ids of the tokens that are no text's."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added.union(tokenizer.all_special_ids)


def regular_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the ids of the tokens that are neither special nor unused, ascending."""
    special = special_ids(tokenizer)
    return sorted(i for token, i in tokenizer.get_vocab().items() if i not in special and not token.startswith(UNUSED))


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Returns the ids of a tokenizer, and what its tokens say of words."""
    ids, special = tokenizer.get_vocab(), special_ids(tokenizer)
    begins_word, ends_word, is_blank = np.zeros((3, max(ids.values()) + 1), dtype=bool)
    if is_wordpiece(tokenizer.backend_tokenizer):
        prefix = tokenizer.backend_tokenizer.model.continuing_subword_prefix
        begins_word[[i for token, i in ids.items() if not token.startswith(prefix)]] = True
    else:
        decoder = tokenizer.backend_tokenizer.decoder
        for token, i in ids.items():
            if i in special or decoder is None:  # of these text has [UNK] alone, which may stand for anything
                continue
            text = decoder.decode(["a", token])[1:]  # at the start of a text white space would be taken away
            begins_word[i] = text[:1].isspace() or is_punctuation(text[:1])
            ends_word[i] = text[-1:].isspace() or is_punctuation(text[-1:])
            is_blank[i] = text.isspace()
    named = {f"{role}_id": -1 if (index := role_id(tokenizer, role)) is None else index for role in ROLES}
    return Vocabulary(
        **named,
        separators=max(1, tokenizer.num_special_tokens_to_add(pair=True) - 2),
        regular_ids=np.array(regular_ids(tokenizer)),
        begins_word=begins_word,
        ends_word=ends_word,
        is_blank=is_blank,
    )


def is_punctuation(character: str) -> bool:
    """Whether a character is a word by itself, as BERT takes it (arXiv 1810.04805, google-research/bert,
    tokenization.py): Unicode's punctuation, and any ASCII sign."""
    is_sign = character.isascii() and character.isprintable() and not character.isalnum() and not character.isspace()
    return bool(character) and (is_sign or unicodedata.category(character).startswith("P"))
