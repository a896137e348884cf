"""The tokenizer, from a checkpoint or learned from the text, and its ids as masking and packing need them."""

import json
import unicodedata
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertConfig, BertTokenizer, PreTrainedTokenizerBase

from Config import Config
from mlm.errors import UserError
from mlm.runtime.pretrained import load_pretrained, stored_file
from mlm.storage import digest, once

FEW = 0.01  # of a vocabulary: tokens that a tokenizer may miss without a word
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def load_tokenizer(
    config: Config, train_lines: Callable[[], Iterator[str]], text_digest: str
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that `initial_pretrain_tokenizer` names, or WordPiece learned from the training lines.

    Raises UserError where it is missing, or is not one that BERT's masking and packing can work with.
    """
    name = config.initial_pretrain_tokenizer
    if name == "corpus":
        key = digest(text_digest, config.vocab_size, version("tokenizers"), "accents are kept")
        folder = Path(config.path_model_save) / ".cache" / f"vocabulary-{key}"

        def learn(temporary: Path) -> None:
            learn_tokenizer(train_lines, config.vocab_size).save_pretrained(temporary)

        return AutoTokenizer.from_pretrained(once(folder, learn))
    tokenizer = load_pretrained_tokenizer(name, "initial_pretrain_tokenizer")
    if config.scratch_size is None and config.initial_pretrain_model != name:
        _refuse_another_vocabulary(tokenizer, config)
    return tokenizer


def load_pretrained_tokenizer(name: str, setting: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or from the Hub. Raises UserError, naming `setting`, as `load_tokenizer`."""
    tokenizer = load_pretrained(_load_wordpiece, name, setting, "a WordPiece tokenizer, as BERT's is")
    missing = [kind for kind in ("pad", "unk", "cls", "sep", "mask") if getattr(tokenizer, f"{kind}_token_id") is None]
    if missing:
        raise UserError(f"{setting}: {name} has no {' and no '.join(missing)} token; BERT needs one")
    if not len(read_vocabulary(tokenizer).regular_ids):  # transformers makes one up where the files are missing
        raise UserError(f"{setting}: {name} has no vocabulary; vocab.txt or tokenizer.json is missing")
    return tokenizer


def _load_wordpiece(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Loads the tokenizer that the files say; BERT's own where none says it, as in early checkpoints.

    Raises ValueError where it is no WordPiece. tokenizer.json is asked as well, as transformers makes WordPiece of any
    vocabulary that lies beside the config of a BERT.
    """
    if "model_type" not in BertConfig.get_config_dict(name, **options)[0]:
        options["config"] = BertConfig()  # of which tokenizer_config.json may say otherwise
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    kinds = {type(tokenizer.backend_tokenizer.model).__name__ if tokenizer.is_fast else type(tokenizer).__name__}
    if file := stored_file(name, "tokenizer.json"):
        kinds.add(json.loads(file.read_text(encoding="utf-8"))["model"]["type"])
    if others := kinds - {"WordPiece"}:
        raise ValueError(f"it is {' and '.join(sorted(others))}")
    return tokenizer


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
        if own_tokens.get(index, token) != token and not own_tokens[index].startswith("[unused")
    }
    if others:
        index = min(others)
        raise UserError(
            f"initial_pretrain_tokenizer, initial_pretrain_model: {len(others):,} of the {len(own_tokens):,} tokens of "
            f"{config.initial_pretrain_model} are others in {config.initial_pretrain_tokenizer}, such as {index}: "
            f"{own_tokens[index]!r} and {others[index]!r}. Set both to the same name"
        )


def tokenizer_warnings(tokenizer: PreTrainedTokenizerBase, name: str) -> list[str]:
    """Returns a warning where the tokenizer changes what the vocabulary keeps, capitals or accents, or the reverse."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    normalize = normalizer.normalize_str if normalizer else str
    regular = tokenizer.convert_ids_to_tokens(read_vocabulary(tokenizer).regular_ids.tolist())
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
    """The ids of a tokenizer, as cutting, masking and packing need them."""

    cls_id: int
    sep_id: int
    pad_id: int
    unk_id: int
    mask_id: int
    regular_ids: np.ndarray  # (regular,) int64, ascending: neither special nor unused; may replace a chosen token
    continues_word: np.ndarray  # (size,) bool: subwords such as ##ing

    @property
    def size(self) -> int:
        return len(self.continues_word)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Returns the ids of a WordPiece tokenizer."""
    ids = tokenizer.get_vocab()
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    regular = sorted(i for token, i in ids.items() if i not in special and not token.startswith("[unused"))
    continues_word = np.zeros(max(ids.values()) + 1, dtype=bool)
    prefix = tokenizer.backend_tokenizer.model.continuing_subword_prefix
    continues_word[[i for token, i in ids.items() if token.startswith(prefix)]] = True
    named = {f"{kind}_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("cls", "sep", "pad", "unk", "mask")}
    return Vocabulary(**named, regular_ids=np.array(regular), continues_word=continues_word)
