"""Laws 5 and 8: the vocabulary learned from the text is the same in every run; where there is none, it is said."""

import json
import os
import subprocess
import sys

import pytest
from encoders import TOKENIZERS
from runs import ROOT
from texts import CHINESE, ENGLISH, make_lines
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AlbertConfig, AutoTokenizer, BertConfig, BertTokenizer, PreTrainedTokenizerFast

from mlm.data.tokenizer import (
    SPECIAL_TOKENS,
    learn_tokenizer,
    load_pretrained_tokenizer,
    load_tokenizer,
    tokenizer_warnings,
)
from mlm.errors import UserError


@pytest.mark.slow
def test_the_same_text_gives_the_same_vocabulary_in_every_process():
    program = "import pydoc_data.topics as t; from mlm.data.tokenizer import learn_tokenizer as learn;"
    program += "lines = lambda: (line for topic in t.topics.values() for line in topic.splitlines());"
    program += "learned = learn(lines, 3000).backend_tokenizer.to_str()"
    here = {}
    exec(program, here)
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # here it is another, most likely a random one
    environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-c", f"{program}; print(learned)"]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert there == f"{here['learned']}\n" and len(there) > 3000


def test_a_learned_vocabulary_covers_its_text_and_lowers_case():
    tokenizer = learn_tokenizer(lambda: iter(make_lines(400)), 300)
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert set(tokenizer.get_vocab().values()) == set(range(len(tokenizer)))
    for text in (" ".join(ENGLISH).upper(), CHINESE, "😀"):
        assert tokenizer.unk_token not in tokenizer.tokenize(text)
    assert tokenizer.tokenize("PATIENT was") == ["patient", "was"]


def test_a_folder_without_a_vocabulary_is_said_plainly(tmp_path, settings):
    BertConfig().save_pretrained(tmp_path)
    config = settings(initial_pretrain_model=str(tmp_path), initial_pretrain_tokenizer=str(tmp_path))
    with pytest.raises(UserError, match="has no vocabulary"):
        load_tokenizer(config, None, "")


WORDS = ["the", "patient", "was", "given", "metformin", "and", "aspirin", ".", "##s", "a", "b", "c"]


def save(folder, words, **options):
    """A tokenizer of these words, behind BERT's five special tokens."""
    vocab = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *words])}
    BertTokenizer(vocab=vocab, **options).save_pretrained(folder)
    BertConfig(vocab_size=len(vocab)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("words", "differences"),
    [
        (WORDS, None),
        (["[unused1]" if word == "a" else word for word in WORDS], "1 of the 17 tokens"),
        (WORDS[::-1], "12 of the 17 tokens"),
        ([*WORDS[:5], "insulin", *WORDS[6:]], "1 of the 17 tokens .* such as 10: 'and' and 'insulin'"),
        ([*WORDS, "insulin"], None),  # whether the model has a row for it, is another question
        (WORDS[:-2], None),
    ],
)
def test_another_models_vocabulary_is_refused_though_it_has_the_same_size(tmp_path, settings, words, differences):
    model, other = save(tmp_path / "model", WORDS), save(tmp_path / "other", words)
    config = settings(initial_pretrain_model=model, initial_pretrain_tokenizer=other)
    if differences is None:
        assert load_tokenizer(config, None, "").get_vocab() == AutoTokenizer.from_pretrained(other).get_vocab()
        return
    with pytest.raises(UserError, match=f"^initial_pretrain_tokenizer, initial_pretrain_model: {differences}"):
        load_tokenizer(config, None, "")


def test_words_may_take_the_places_that_are_kept_for_them(tmp_path, settings):
    model = save(tmp_path / "model", ["[unused0]", "[unused1]", *WORDS])
    other = save(tmp_path / "other", ["insulin", "[unused1]", *WORDS])
    load_tokenizer(settings(initial_pretrain_model=model, initial_pretrain_tokenizer=other), None, "")


def test_a_model_without_a_vocabulary_has_none_to_compare_with(tmp_path, settings):
    BertConfig().save_pretrained(tmp_path / "model")
    config = settings(
        initial_pretrain_model=str(tmp_path / "model"), initial_pretrain_tokenizer=save(tmp_path / "other", WORDS)
    )
    assert load_tokenizer(config, None, "").tokenize("the patient") == ["the", "patient"]


CASED = ["The", "the", "Patient", "##S", "given", "A", "a"]


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        (CASED, {"do_lower_case": True}, "4 of the 7 tokens of NAME, such as 'The', can never come"),
        (CASED, {"do_lower_case": False}, None),
        ([*WORDS, "übung", "für", "##ß"], {"do_lower_case": True}, "2 of the 15 tokens of NAME, such as 'übung', can"),
        ([*WORDS, "übung"], {"do_lower_case": True, "strip_accents": False}, None),
        (["パ", "ハ", "か"], {"do_lower_case": True}, "1 of the 3 tokens of NAME, such as 'パ', can never come"),
        (WORDS, {"do_lower_case": False}, "no token of NAME has a capital letter, and its tokenizer keeps them"),
        (WORDS, {"do_lower_case": True}, None),
        (["患", "者", "，"], {"do_lower_case": False}, None),
        ([*map(str, range(200)), "A"], {"do_lower_case": True}, None),  # one of many
    ],
)
def test_capitals_and_accents_that_can_never_come_are_said(tmp_path, words, options, said):
    name = save(tmp_path / "checkpoint", words, **options)
    warnings = tokenizer_warnings(load_pretrained_tokenizer(name, "models"), "NAME")
    assert (not warnings) if said is None else (len(warnings) == 1 and said in warnings[0])


def test_a_cased_vocabulary_without_tokenizer_config_is_said_to_be_lower_cased(tmp_path):
    """As BioBERT's first releases."""
    BertConfig().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *CASED]) + "\n")
    tokenizer = load_pretrained_tokenizer(str(tmp_path), "models")
    assert 'set "do_lower_case" in its tokenizer_config.json' in tokenizer_warnings(tokenizer, "it")[0]


@pytest.mark.parametrize("beside", [True, False], ids=["beside a BERT's config", "alone"])
def test_another_kind_of_tokenizer_is_not_made_wordpiece(tmp_path, beside):
    """transformers would take the pieces of a BPE for words and subwords, and make most text [UNK]."""
    pieces = Tokenizer(models.BPE(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(special_tokens=SPECIAL_TOKENS, vocab_size=300)
    pieces.train_from_iterator(make_lines(50), trainer)
    pieces.save(str(tmp_path / "tokenizer.json"))
    if beside:
        BertConfig().save_pretrained(tmp_path)
    with pytest.raises(
        UserError,
        match=r"^models: .* cannot be loaded as a tokenizer: its tokenizer.json is BPE, and ",
    ):
        load_pretrained_tokenizer(str(tmp_path), "models")


@pytest.mark.parametrize("kind", ["WordPiece", "byte-level BPE", "SentencePiece"])
def test_early_files_that_do_not_name_the_kind_are_read(tmp_path, kind):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.save_pretrained(tmp_path)
    if kind == "WordPiece":
        BertConfig().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    del content["model"]["type"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_pretrained_tokenizer(str(tmp_path), "models").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (models.Unigram([("▁", -1.0), ("a", -2.0), ("[CLS]", 0.0)]), "unk_id"),
        (models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]), "such text would be lost"),
        (models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"), "it is WordLevel"),
    ],
)
def test_a_tokenizer_that_loses_text_or_is_unknown_is_refused(tmp_path, model, said):
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **special).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"^models: .* cannot be loaded as a tokenizer: .*{said}"):
        load_pretrained_tokenizer(str(tmp_path), "models")


def test_a_tokenizer_that_transformers_builds_anew_is_compared_with_its_file(tmp_path):
    """As ALBERT's, which comes to take capitals away where the file does not."""
    TOKENIZERS["ALBERT's"]().save_pretrained(tmp_path)
    assert tokenizer_warnings(load_pretrained_tokenizer(str(tmp_path), "models"), str(tmp_path)) == []
    AlbertConfig().save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    content["tokenizer_class"] = "AlbertTokenizer"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    [warning] = tokenizer_warnings(load_pretrained_tokenizer(str(tmp_path), "models"), str(tmp_path))
    assert "transformers makes other tokens of 'a Capital letter'" in warning


@pytest.mark.parametrize(
    ("text", "another"),
    [("パンダ", "ハンダ"), ("अपने में", "अपन म"), ("한국", "한구"), ("їжак", "іжак"), ("má", "mà"), ("über", "uber")],
)
def test_a_learned_vocabulary_keeps_voicing_marks_vowel_signs_and_accents(tmp_path, text, another):
    lines = [f"{text} {another} {text.upper()}"] * 5
    learn_tokenizer(lambda: iter(lines), 300).save_pretrained(tmp_path)
    tokenizer = load_pretrained_tokenizer(str(tmp_path), "models")
    assert tokenizer.tokenize(text) != tokenizer.tokenize(another)
    assert tokenizer.tokenize(text) == tokenizer.tokenize(text.upper())
    assert "".join(tokenizer.tokenize(text)).replace("##", "") == text.replace(" ", "")
    assert tokenizer_warnings(tokenizer, "it") == []
