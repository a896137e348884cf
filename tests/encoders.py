"""Small encoders of ten families, each with the features of its real configuration and a tokenizer of its real kind."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from texts import make_lines
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMaskedLM,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mlm.data.tokenizer import learn_tokenizer

# Text that is hard on tokenizers: spaces, code, emoji of several code points, letters in bytes, Chinese beside ASCII.
HARD_LINES = [
    "The patient (aged 61) was given 500mg of metformin, twice daily; it didn't help.",
    "def f(x):    return x**2  # two  spaces, 'quotes' and_underscores",
    "Naïve café, Übung und Straße – “curly” quotes… and an em—dash.",
    "emoji 😀👩‍⚕️ and flags 🇩🇪 beside words",
    "患者服用二甲双胍500mg，血糖下降。T恤 and English混排",
    "ひらがなとカタカナ 한국어 текст по-русски",
    "<s> [MASK] </s> <mask> <|endoftext|> spelled out",
]


class Kind(NamedTuple):
    """What a family's tokenizer is made of."""

    cls: str
    sep: str
    pad: str
    unk: str | None
    mask: str
    separators: int = 1  # between two texts


BERTS = Kind("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
ROBERTAS = Kind("<s>", "</s>", "<pad>", "<unk>", "<mask>", separators=2)
LLAMAS = Kind("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>", None, "<|mask|>")


Text = Callable[[], Iterator[str]]


def lines() -> Iterator[str]:
    """Text to learn tokenizers from."""
    return iter(make_lines(300) + HARD_LINES[:2])


def byte_level(kind: Kind, size: int = 500, llama: bool = False, text: Text = lines) -> Tokenizer:
    """BPE over bytes, as RoBERTa's and ModernBERT's; by another rule where words are cut, as EuroBERT's."""
    tokenizer = Tokenizer(models.BPE())
    if llama:
        cut = Regex(r"'s|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(cut, "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token in (kind.cls, kind.pad, kind.sep, kind.unk) if token]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.add_special_tokens([AddedToken(kind.mask, lstrip=True, special=True)])
    return tokenizer


def sentencepiece(kind: Kind, size: int = 500, text: Text = lines) -> Tokenizer:
    """Unigram with spaces as ▁, as XLM-R's, CamemBERT's and ALBERT's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=[kind.cls, kind.pad, kind.sep, kind.unk],
        unk_token=kind.unk,
        show_progress=False,
    )
    tokenizer.train_from_iterator(text(), trainer)
    tokenizer.add_special_tokens([AddedToken(kind.mask, lstrip=True, special=True)])
    return tokenizer


def gemma(kind: Kind, size: int = 600, text: Text = lines) -> Tokenizer:
    """BPE that cuts nothing beforehand, with bytes for what it lacks, as mmBERT's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=kind.unk, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [kind.pad, kind.sep, kind.cls, kind.unk, kind.mask, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    words = (word for line in text() for word in line.replace(" ", " ▁").split(" "))
    tokenizer.train_from_iterator(words, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(content))


def finished(tokenizer: Tokenizer, kind: Kind, **options: Any) -> PreTrainedTokenizerBase:
    """A tokenizer as transformers has it, with its special tokens around texts."""
    between = " ".join([kind.sep] * kind.separators)
    ids = [(token, tokenizer.token_to_id(token)) for token in (kind.cls, kind.sep)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{kind.cls} $A {kind.sep}", pair=f"{kind.cls} $A {between} $B {kind.sep}", special_tokens=ids
    )
    roles = {"pad_token": kind.pad, "mask_token": kind.mask}
    roles |= {"unk_token": kind.unk} if kind.unk else {}
    roles |= {"cls_token": kind.cls, "sep_token": kind.sep} if kind is not LLAMAS else {}
    roles |= {"bos_token": kind.cls, "eos_token": kind.sep} if kind is not BERTS else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles, **options)


def quick_tour(ends: str | None) -> Tokenizer:
    """BPE of words that spaces and punctuation separate, as the tokenizers library's quick tour makes it: without a
    decoder, so that no token says where a word starts; or with ends of words and the decoder of those."""
    options = {"end_of_word_suffix": ends} if ends else {}
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", **options))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [BERTS.cls, BERTS.pad, BERTS.sep, BERTS.unk, BERTS.mask]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(lines(), trainer)
    if ends:
        tokenizer.decoder = decoders.BPEDecoder(ends)
    return tokenizer


def wordpiece() -> BertTokenizer:
    """As BERT's, DistilBERT's, ELECTRA's and nomic's."""
    return learn_tokenizer(lines, 400)


TOKENIZERS = {
    "WordPiece": wordpiece,
    "byte-level BPE": lambda: finished(byte_level(ROBERTAS), ROBERTAS),
    "ModernBERT's": lambda: finished(byte_level(BERTS), BERTS),
    "SentencePiece": lambda: finished(sentencepiece(ROBERTAS), ROBERTAS),
    "ALBERT's": lambda: finished(sentencepiece(BERTS), BERTS),
    "Gemma's": lambda: finished(gemma(ROBERTAS._replace(separators=1)), ROBERTAS._replace(separators=1)),
    "the quick tour's": lambda: finished(quick_tour(None), BERTS),
    "ends of words": lambda: finished(quick_tour("</w>"), BERTS),
    "Llama's": lambda: finished(byte_level(LLAMAS, llama=True), LLAMAS),
}

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
DISTILBERTS_SHAPE = {
    "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
WINDOW = {"local_attention": 16, "global_attn_every_n_layers": 2}  # of 17 positions, in every second layer

# The tokenizer of each family, and the features of its configuration.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("WordPiece", SHAPE | NO_DROPOUT),
    "roberta": ("byte-level BPE", SHAPE | NO_DROPOUT | {"type_vocab_size": 1, "max_position_embeddings": 514}),
    "xlm-roberta": ("SentencePiece", SHAPE | NO_DROPOUT | {"type_vocab_size": 1, "max_position_embeddings": 514}),
    "camembert": ("SentencePiece", SHAPE | NO_DROPOUT | {"type_vocab_size": 1, "max_position_embeddings": 514}),
    "distilbert": ("WordPiece", DISTILBERTS_SHAPE),
    "electra": ("WordPiece", SHAPE | NO_DROPOUT | {"embedding_size": 16}),
    "albert": ("ALBERT's", SHAPE | NO_DROPOUT | {"embedding_size": 16}),
    "modernbert": ("ModernBERT's", SHAPE | WINDOW | {"max_position_embeddings": 8192}),
    "mmbert": ("Gemma's", SHAPE | WINDOW | {"max_position_embeddings": 8192}),
    "nomic_bert": ("WordPiece", SHAPE | NO_DROPOUT),
    "eurobert": ("Llama's", SHAPE | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}),
}


def make_encoder(family: str, seed: int = 0, **changes: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A masked language model of a family with random weights, far from even attention, and its tokenizer."""
    name, features = FAMILIES[family]
    tokenizer = TOKENIZERS[name]()
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("pad", "bos", "eos", "cls", "sep", "mask")}
    of_roles = {f"{role}_token_id": index for role, index in roles.items() if index is not None}
    kind = CONFIG_MAPPING["modernbert" if family == "mmbert" else family]
    if family in ("distilbert", "nomic_bert", "electra", "bert", "albert"):
        of_roles = {"pad_token_id": tokenizer.pad_token_id}
    config = kind(vocab_size=len(tokenizer), **features | of_roles | changes)
    torch.manual_seed(seed)
    model = AutoModelForMaskedLM.from_config(config)
    for weights in model.parameters():
        if weights.ndim == 2:
            weights.data *= 4
    return model, tokenizer


def save_encoder(folder: Path, family: str, **changes: Any) -> str:
    """A checkpoint of a family, as a user would have it."""
    model, tokenizer = make_encoder(family, **changes)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
