"""The tokenizer, from a checkpoint or learned from the text, and its ids as masking and packing need them."""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from Config import Config
from mlm.errors import UserError, first_line
from mlm.runtime.hub import locate
from mlm.storage import digest, once

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def load_tokenizer(
    config: Config, train_lines: Callable[[], Iterator[str]], text_digest: str
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer that `initial_pretrain_tokenizer` names, or WordPiece learned from the training lines.

    Raises UserError where it is missing, or is not one that BERT's masking and packing can work with.
    """
    name = config.initial_pretrain_tokenizer
    if name == "corpus":
        key = digest(text_digest, config.vocab_size, version("tokenizers"))
        folder = Path(config.path_model_save) / ".cache" / f"vocabulary-{key}"

        def learn(temporary: Path) -> None:
            learn_tokenizer(train_lines, config.vocab_size).save_pretrained(temporary)

        return AutoTokenizer.from_pretrained(once(folder, learn))
    return load_pretrained_tokenizer(name, "initial_pretrain_tokenizer")


def load_pretrained_tokenizer(name: str, setting: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or from the Hub. Raises UserError, naming `setting`, as `load_tokenizer`."""
    is_local = locate(name, setting) != "hub"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=is_local, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the file at fault made it raise
        raise UserError(f"{setting}: {name} cannot be loaded as a tokenizer: {first_line(error)}") from error
    if not tokenizer.is_fast or not isinstance(tokenizer.backend_tokenizer.model, models.WordPiece):
        raise UserError(f"{setting}: {name} is not a WordPiece tokenizer, so it is not BERT's")
    missing = [kind for kind in ("pad", "unk", "cls", "sep", "mask") if getattr(tokenizer, f"{kind}_token_id") is None]
    if missing:
        raise UserError(f"{setting}: {name} has no {' and no '.join(missing)} token; BERT needs one")
    if not len(read_vocabulary(tokenizer).regular_ids):  # transformers makes one up where the files are missing
        raise UserError(f"{setting}: {name} has no vocabulary; vocab.txt or tokenizer.json is missing")
    return tokenizer


def learn_tokenizer(lines: Callable[[], Iterator[str]], size: int) -> BertTokenizer:
    """Learns a WordPiece tokenizer like BERT's uncased one, of about `size` entries, from the lines.

    The first pass collects the characters alone; the second receives them sorted. In the library's own order, which
    decides ties, the vocabulary would differ from run to run. More characters than `size` make it larger.
    """

    def learn(entries: int, special_tokens: list[str]) -> dict[str, int]:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(
            vocab_size=entries, min_frequency=2, special_tokens=special_tokens, show_progress=False
        )
        tokenizer.train_from_iterator(lines(), trainer)
        return tokenizer.get_vocab()

    characters = sorted(learn(0, SPECIAL_TOKENS).keys() - set(SPECIAL_TOKENS))
    return BertTokenizer(vocab=learn(size, SPECIAL_TOKENS + characters), do_lower_case=True, model_max_length=512)


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
