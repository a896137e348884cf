"""Laws 2 to 7 for encoders of ten families, each with a tokenizer of its kind."""

import copy
import csv
import dataclasses
import gc
import json
import re
import unicodedata
import weakref
from itertools import chain

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from encoders import FAMILIES, HARD_LINES, NO_DROPOUT, SHAPE, TOKENIZERS, make_encoder, save_encoder
from markupsafe import escape
from reference import attention_by_chunks, pad, score
from runs import assert_close, assert_same_bits, finish, fork_ranks, micro_batcher_of, run, stop_at, train_on
from safetensors.torch import load_file, save_file
from texts import make_lines
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    EsmConfig,
    pipeline,
)

from data_process import prepare
from mlm.data.chinese import HAN_CHARACTER, make_segmenter
from mlm.data.chunks import Chunks, take
from mlm.data.masking import BERT_RULE, mask
from mlm.data.packing import Sequences, frame
from mlm.data.tokenizer import load_pretrained_tokenizer, read_vocabulary
from mlm.data.words import WordCounts, _located_kinds, make_encoders, tokenize
from mlm.encoder import check
from mlm.encoder.attention import block_diagonal
from mlm.encoder.families import freeze_key_biases
from mlm.encoder.packed import PackedClassifier, PackedMaskedLM
from mlm.errors import UserError
from mlm.evaluation.fill_mask import hide_words
from mlm.randomness import random_bits
from mlm.text.files import find_text
from mlm.training.optimizer import make_optimizer
from model import load_classifier, load_masked_lm

every_family = pytest.mark.parametrize("family", FAMILIES)


def random_chunks(vocabulary, longest=60):
    draw = np.random.default_rng(0)
    lengths = draw.integers(1, longest, 30)
    tokens = draw.choice(vocabulary.regular_ids, lengths.sum())
    return (*mask(tokens, lengths, random_bits(0, np.arange(30)), vocabulary, BERT_RULE), lengths)


@every_family
@pytest.mark.parametrize("varlen", [False, True], ids=["mask", "varlen"])
def test_packed_loss_and_gradients_equal_those_of_its_own_class_on_padded_lines(family, varlen, monkeypatch):
    monkeypatch.setattr("mlm.encoder.attention.varlen_attn", attention_by_chunks)
    stock, tokenizer = make_encoder(family)
    vocabulary, ours = read_vocabulary(tokenizer), copy.deepcopy(stock)
    hidden = random_chunks(vocabulary)
    expected = score(stock, pad(*hidden, vocabulary))
    expected.loss.backward()

    pieces = micro_batcher_of(vocabulary, 500, varlen)(frame(*hidden, vocabulary))
    assert len(pieces) > 1
    loss = train_on(PackedMaskedLM(ours), pieces, expected.masked_tokens)
    assert loss == pytest.approx(expected.loss.item(), abs=1e-5)
    for (name, parameter), (_, reference) in zip(ours.named_parameters(), stock.named_parameters(), strict=True):
        if reference.grad is not None:
            torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-5, rtol=1e-4, msg=name)

    # What has no gradient but rounding noise is not trained: biases of keys, where positions are absolute.
    freeze_key_biases(ours)
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    largest = {name: p.grad.abs().max().item() for name, p in stock.named_parameters() if p.grad is not None}
    assert frozen == {name for name, gradient in largest.items() if gradient < 1e-7}


def test_the_input_of_an_attention_with_a_norm_of_its_own_is_not_rounded():
    """ALBERT's adds its input to its output and normalizes the sum, which is to stay in float32."""
    model, _ = make_encoder("albert")
    attention, seen = PackedMaskedLM(model).model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention, []
    attention.LayerNorm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        attention(torch.randn(1, 4, 32))
    assert seen == [torch.float32]


@every_family
def test_muon_has_matrices_alone_and_no_table_of_tokens(family):
    model, tokenizer = make_encoder(family)
    optimizer = make_optimizer(PackedMaskedLM(model), "muon", 1e-3, 0.01)
    [of_muon] = [group["params"] for group in optimizer.param_groups if group["muon"]]
    assert len(of_muon) >= 4 and all(parameter.ndim == 2 for parameter in of_muon)
    assert not any(len(tokenizer) in parameter.shape for parameter in of_muon)


# -------------------------------------------------------------------------------------------- the check at the start


def without_chunks(segment_ids, windows):
    return block_diagonal(torch.ones_like(segment_ids), windows)


def without_window(segment_ids, windows):
    return {window: block_diagonal(segment_ids, {None})[None] for window in windows}


def wider_window(segment_ids, windows):
    return {window: block_diagonal(segment_ids, {window and window + 1})[window and window + 1] for window in windows}


@staticmethod
def one_position_off(encoder, _, inputs, output):
    if (label_positions := inputs.get("label_positions")) is not None:
        output.last_hidden_state = output.last_hidden_state.flatten(0, 1).roll(1, 0)[label_positions][:, None]
    return output


def at(place):
    return lambda encoder: place


WITH_WINDOW, WITH_OFFSET = ("modernbert", "mmbert"), ("roberta", "xlm-roberta", "camembert")
BREAKS = [
    *((family, "block_diagonal", without_chunks) for family in FAMILIES),
    *((family, "PackedEncoder._keep_label_positions", one_position_off) for family in FAMILIES),
    *((family, "block_diagonal", without_window) for family in WITH_WINDOW),
    *((family, "block_diagonal", wider_window) for family in WITH_WINDOW),
    *((family, "first_position", at(0)) for family in WITH_OFFSET),
    ("bert", "first_position", at(1)),
]


def check_at_the_start(name, settings):
    """What train.py does with a checkpoint and the text before it trains."""
    config = settings(initial_pretrain_model=name, initial_pretrain_tokenizer=name, sen_max_length=128)
    tokenizer = load_pretrained_tokenizer(name, "initial_pretrain_tokenizer")
    vocabulary, text = read_vocabulary(tokenizer), find_text(config)
    _, test, _ = prepare(config, text, tokenizer, vocabulary)
    model = PackedMaskedLM(load_masked_lm(name, "initial_pretrain_model")[0])
    micro_batcher = micro_batcher_of(vocabulary)
    check.refuse_differences(model, check.sample(test, vocabulary, model), micro_batcher, Accelerator(), "it")


@pytest.mark.parametrize(("family", "place", "how"), BREAKS)
def test_a_broken_adapter_is_caught_at_the_start(settings, tmp_path, monkeypatch, family, place, how):
    name = save_encoder(tmp_path / "model", family)
    long_line = " ".join(make_lines(30))
    (tmp_path / "text" / "test.txt").write_text(f"a short line\n{long_line}\nanother\n", encoding="utf-8")
    check_at_the_start(name, settings)
    monkeypatch.setattr(f"mlm.encoder.packed.{place}", how)
    with pytest.raises(UserError, match="it does not compute of packed lines what it computes of each by itself"):
        check_at_the_start(name, settings)


def test_nothing_is_trained_nor_compared_with_a_broken_adapter(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("mlm.encoder.packed.block_diagonal", without_chunks)
    with pytest.raises(UserError, match=r"^initial_pretrain_model: scratch:tiny does not compute of packed lines"):
        run(settings(run_name="broken"))
    assert not (tmp_path / "output" / "broken" / "metrics.csv").exists()


@every_family
def test_the_check_asks_the_kernels_too(family, monkeypatch):
    """In 16 bits, as a GPU has them, of queries, keys and values alike, though positions turn EuroBERT's and nomic's in
    float32: chunks as they are, and all of a row as one."""
    monkeypatch.setattr("mlm.encoder.attention.varlen_attn", attention_by_chunks)
    model, tokenizer = make_encoder(family)
    for weights in model.parameters():
        if weights.ndim == 2:
            weights.data *= 2
    vocabulary, lengths = read_vocabulary(tokenizer), np.array([20, 60, 20])
    tokens = np.random.default_rng(0).choice(vocabulary.regular_ids, lengths.sum())
    chunks = frame(tokens, np.arange(len(tokens)), tokens, lengths, vocabulary)
    micro_batcher, accelerator = micro_batcher_of(vocabulary, varlen=True), Accelerator(mixed_precision="bf16")
    arguments = PackedMaskedLM(model), chunks, micro_batcher, accelerator, "it"
    check.refuse_differences(*arguments)

    def as_one_chunk(query, key, value, starts, *_, **options):
        whole = starts[[0, -1]]
        return attention_by_chunks(query, key, value, whole, whole, len(query), len(query), **options)

    monkeypatch.setattr("mlm.encoder.attention.varlen_attn", as_one_chunk)
    with pytest.raises(UserError, match="it does not compute of packed lines what it computes of each by itself"):
        check.refuse_differences(*arguments)


def test_a_leak_through_masked_tokens_is_caught(settings):
    """ESM scales a row by its share of masked tokens, so that chunks in one row would tell each other theirs."""
    vocabulary = read_vocabulary(TOKENIZERS["WordPiece"]())
    config = EsmConfig(
        vocab_size=vocabulary.size, mask_token_id=vocabulary.mask_id, pad_token_id=vocabulary.pad_id,
        token_dropout=True, **SHAPE, **NO_DROPOUT,
    )  # fmt: skip
    tokens = np.random.default_rng(0).choice(vocabulary.regular_ids, 100).astype(np.uint16)
    chunks = Chunks(tokens, np.array([0, 20, 80, 100]), np.arange(3))
    model = PackedMaskedLM(AutoModelForMaskedLM.from_config(config))
    sample, micro_batcher = check.sample(chunks, vocabulary, model), micro_batcher_of(vocabulary)
    with pytest.raises(UserError, match="it does not compute of packed lines what it computes of each by itself"):
        check.refuse_differences(model, sample, micro_batcher, Accelerator(), "it")


def test_a_model_is_freed_when_it_is_let_go():
    """Without the garbage collector, which may come late: another model may need its memory."""
    model, _ = make_encoder("roberta")
    alive = weakref.ref(PackedMaskedLM(model).model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


# --------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def family_settings(settings, text_folder, tmp_path):
    """Makes the settings of a run of seconds that continues a family's checkpoint, on text hard on tokenizers too."""
    with open(text_folder / "train.txt", "a", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in HARD_LINES)

    def make(family, **changes):
        name = str(tmp_path / family)
        if not (tmp_path / family).exists():
            save_encoder(tmp_path / family, family)
        usual = {"initial_pretrain_model": name, "initial_pretrain_tokenizer": name, "max_steps": 6, "batch_size": 12}
        usual |= {"save_every": 2, "eval_every": 3, "learning_rate": 1e-3, "hidden_dropout": 0.1, "max_test_chunks": 20}
        return settings(**usual | {"mlm_probability": None, "weight_decay": None} | changes)

    return make


@every_family
def test_a_run_resumes_with_the_same_bits_and_any_loader_takes_what_comes_out(family, family_settings, capsys):
    whole = run(family_settings(family, run_name="whole"))
    config = family_settings(family, run_name="stopped")
    stop_at(config, 4)
    stopped = run(dataclasses.replace(config, resume=True))
    assert_same_bits(stopped, whole)

    final = str(whole / "final")
    for kind in (AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoModelForTokenClassification):
        _, loading = kind.from_pretrained(final, output_loading_info=True)
        assert not loading["mismatched_keys"]
        encoder = f"{kind.from_pretrained(final).base_model_prefix}."
        assert not [key for key in loading["missing_keys"] if key.startswith(encoder) and "pooler" not in key]
    fill = pipeline("fill-mask", final)
    assert len(fill(f"the patient was given {fill.tokenizer.mask_token}")) == 5
    ids = AutoTokenizer.from_pretrained(final)(HARD_LINES)["input_ids"]
    assert ids == AutoTokenizer.from_pretrained(config.initial_pretrain_tokenizer)(HARD_LINES)["input_ids"]
    assert (whole / "final" / "vocab.txt").exists() == (FAMILIES[family][0] == "WordPiece")
    said = capsys.readouterr().out
    assert f"Your text with a {fill.tokenizer.mask_token}." in said
    assert f"Your text with a {fill.tokenizer.mask_token}." in (whole / "final" / "README.md").read_text()
    page = (whole / "report.html").read_text(encoding="utf-8")
    guesses = json.loads((whole / "summary.json").read_text())["guesses"]
    for line, word, *_ in guesses:
        assert f"{escape(line.partition('[MASK]')[0])}<mark>{word}</mark>" in page
    assert guesses
    assert ("has no place for dropout" in said) == (family == "eurobert")
    masked = json.loads((whole / "settings.json").read_text())["settings"]["mlm_probability"]
    assert masked == (0.3 if family in ("modernbert", "mmbert") else 0.15)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta", "camembert", "albert", "nomic_bert"])
def test_a_pooler_comes_along_and_does_no_work_of_its_own(family, family_settings, tmp_path):
    config = family_settings(family, max_steps=2, run_name="run")
    encoder = AutoModel.from_config(AutoModelForMaskedLM.from_pretrained(tmp_path / family).config)
    pooler = type(encoder)(encoder.config, add_pooling_layer=True).pooler.state_dict()
    prefix, file = encoder.base_model_prefix, tmp_path / family / "model.safetensors"
    save_file(load_file(file) | {f"{prefix}.pooler.{name}": weight for name, weight in pooler.items()}, file)
    kept = load_file(run(config) / "final" / "model.safetensors")
    assert {name for name in kept if "pooler" in name} == {f"{prefix}.pooler.{name}" for name in pooler}
    assert all(torch.equal(kept[f"{prefix}.pooler.{name}"], weight) for name, weight in pooler.items())


@pytest.mark.slow
@every_family
def test_two_ranks_train_as_one(family, family_settings):
    processes = fork_ranks(family_settings(family, run_name="two", hidden_dropout=0.0), 2)
    one = run(family_settings(family, run_name="one", hidden_dropout=0.0))
    for process in processes:
        finish(process)
    assert_close(one.with_name("two"), one)


# --------------------------------------------------------------------------------------------------------------- text


@every_family
def test_tokens_are_the_tokenizers_own_and_text_comes_back_whole(family, family_settings):
    config = family_settings(family, sen_max_length=13)
    tokenizer = load_pretrained_tokenizer(config.initial_pretrain_tokenizer, "it")
    text = find_text(config)
    train_chunks, _, _ = prepare(config, text, tokenizer, read_vocabulary(tokenizer))
    tokens, lengths, _ = take(train_chunks, np.arange(len(train_chunks)))
    assert lengths.max() <= 11
    lines = [line for line in text.train() if line]
    plain = [line for line in lines if line != HARD_LINES[-1]]  # the other spells special tokens, which are text here
    own = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in plain]
    assert tokens.tolist()[: sum(map(len, own))] == list(chain.from_iterable(own))
    vocabulary = read_vocabulary(tokenizer)
    assert not {*tokens.tolist()} & {vocabulary.cls_id, vocabulary.sep_id, vocabulary.pad_id, vocabulary.mask_id}
    if FAMILIES[family][0] in ("byte-level BPE", "ModernBERT's", "Gemma's", "Llama's"):  # which lose nothing
        decoder = tokenizer.backend_tokenizer
        assert decoder.decode(tokens.tolist(), skip_special_tokens=False) == "".join(lines)


def reference_word_starts(line):
    """Which characters of a line without Chinese start a word: letters and digits in a row, and each other sign."""
    starts, before = set(), " "
    for place, character in enumerate(line):
        is_sign = unicodedata.category(character)[0] == "P" or (character.isascii() and not character.isalnum())
        was_sign = unicodedata.category(before)[0] == "P" or (before.isascii() and not before.isalnum())
        if not character.isspace() and (is_sign or was_sign or before.isspace()):
            starts.add(place)
        before = character
    return starts


@pytest.mark.parametrize("kind", [name for name in TOKENIZERS if name != "WordPiece"])
def test_words_are_the_same_whatever_the_tokenizer(kind):
    tokenizer = TOKENIZERS[kind]()
    vocabulary, encoders = read_vocabulary(tokenizer), make_encoders(tokenizer)
    lines = [line for line in [*make_lines(60), *HARD_LINES] if line and not HAN_CHARACTER.search(line)]
    found = tokenize(lines, encoders, vocabulary, make_segmenter([]))
    tells_in_ascii = kind not in ("the quick tour's", "ends of words")  # by its tokens, which is faster
    assert ("ascii" not in _located_kinds(encoders, vocabulary)) == tells_in_ascii
    starts, encoded = iter(found.starts_word.tolist()), encoders.any_line.encode_batch(lines, add_special_tokens=False)
    for line, encoding in zip(lines, encoded, strict=True):
        word_starts, was_blank, was_end = reference_word_starts(line), False, 0
        for number, (start, end) in enumerate(encoding.offsets):
            letters = [place for place in range(start, end) if not line[place].isspace()]
            begins = not letters or (letters[0] in word_starts and start >= was_end)  # not inside a character's bytes
            wanted = number == 0 or (begins and not was_blank)  # white space belongs to the word behind it
            beside_unknown = number > 0 and vocabulary.unk_id in encoding.ids[number - 1 : number + 1]
            assert next(starts) == wanted or beside_unknown, f"{line[start:end]!r} at {start} of {line!r}"
            was_blank, was_end = not letters, end

    # What is listed as split into subwords are such words.
    counts, spaced = WordCounts(), set()
    counts.update(found.tokens, found.starts_spaced, vocabulary, found.segmented)
    for line in lines:
        starts = sorted(reference_word_starts(line))
        spaced |= {line[start:end].rstrip() for start, end in zip(starts, [*starts[1:], len(line)], strict=True)}
    listed = counts.split_words(encoders.any_line, vocabulary, 1000)
    unknown = tokenizer.unk_token or "none"
    assert len(listed) > 10
    assert {split.word for split in listed if unknown not in split.subwords} <= spaced


# ------------------------------------------------------------------------------------------- guesses, and other tasks


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_hidden_word_is_masked_with_the_space_that_belongs_to_it(kind):
    """And nothing else of the line changes."""
    tokenizer = TOKENIZERS[kind]()
    vocabulary, lines = read_vocabulary(tokenizer), list(filter(None, make_lines(200)))
    encoded = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    ids = np.array(list(chain.from_iterable(encoded)), dtype=np.uint16)
    chunks = Chunks(ids, np.cumsum([0, *map(len, encoded)]), np.arange(len(lines)))
    hidden = hide_words(lines, chunks, tokenizer, vocabulary)
    assert hidden
    for line, word, input_ids, position in hidden:
        whole = tokenizer(line.replace("[MASK]", word))["input_ids"]
        assert np.flatnonzero(input_ids != whole).tolist() == [position] and input_ids[position] == vocabulary.mask_id
        assert str(tokenizer.decode([whole[position]])).strip().removesuffix("</w>") in (word, word.lower())


@pytest.mark.parametrize("family", ["roberta", "mmbert", "bert"])
def test_predictions_show_the_text_around_the_masks(family, family_settings, text_folder):
    """Also where several tokens are bytes of one character."""
    (text_folder / "test.txt").write_text("".join(f"{line}\n" for line in HARD_LINES[:-1]), encoding="utf-8")
    folder = run(family_settings(family, evaluate_only=True))
    mask_token = make_encoder(family)[1].mask_token
    with open(folder / "predictions.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 5 and any(mask_token * 2 in row["mask"] for row in rows)
    for row in rows:
        around = [re.escape(part) for part in re.split(f"(?:{re.escape(mask_token)})+", row["mask"])]
        assert len(around) > 1 and re.fullmatch(".*".join(around), row["src"]), row
        assert re.fullmatch(".*".join(around), row["pred"]), row


@pytest.mark.parametrize("of_words", [False, True])
@every_family
def test_classifiers_of_packed_texts_are_those_of_its_own_class(family, of_words, tmp_path):
    name = save_encoder(tmp_path / "model", family)
    stock, ours = (load_classifier(name, 3, 0, of_words).eval() for _ in range(2))
    if family == "eurobert" and not of_words:
        stock.classifier_pooling = "bos"  # ours keeps its own habit, a mean
    tokenizer = load_pretrained_tokenizer(name, "models")
    vocabulary = read_vocabulary(tokenizer)
    texts = make_lines(6)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    lengths = np.array(list(map(len, ids)))
    starts = np.cumsum(lengths) - lengths
    flat = np.array(list(chain.from_iterable(ids)))
    positions = np.arange(len(flat)) - np.repeat(starts, lengths)
    where = np.arange(len(flat)) if of_words else starts
    chunks = Sequences(flat, positions, where, np.arange(len(where)), lengths)
    model, found = PackedClassifier(ours), torch.zeros(len(where), 3)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            [(inputs, _)] = micro_batcher_of(vocabulary)(chunks)
            assert model(**inputs).dtype == torch.float32 and torch.is_autocast_enabled("cpu")
        for inputs, places in micro_batcher_of(vocabulary, 100)(chunks):
            found[places] = model(**inputs)
        for text, start, length in zip(ids, starts, lengths, strict=True):
            logits = stock(input_ids=torch.tensor([text])).logits[0]
            if of_words:
                torch.testing.assert_close(found[start : start + length], logits, atol=1e-5, rtol=1e-4)
            else:
                torch.testing.assert_close(found[starts.tolist().index(start)], logits, atol=1e-5, rtol=1e-4)
