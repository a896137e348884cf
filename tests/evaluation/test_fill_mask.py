"""What a model fills in: predictions.csv, and the words that are hidden for the page."""

import csv
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from runs import run
from texts import make_lines
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM

from mlm.data.chunks import Chunks
from mlm.data.masking import BERT_RULE, content_keys, mask
from mlm.data.tokenizer import learn_tokenizer, read_vocabulary
from mlm.evaluation.fill_mask import HIDDEN_WORDS, HiddenWord, guess, hide_words, predict
from mlm.report.summary import read_summary


@pytest.fixture
def predictions(whole):
    with open(whole / "predictions.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_predictions_are_of_test_lines_and_differ_from_them_at_masks_alone(whole, predictions):
    test_lines = (whole.parent.parent / "text" / "test.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(whole / "final")
    assert list(predictions[0]) == ["src", "mask", "pred"]
    assert len(predictions) == min(100, sum(bool(tokenizer.tokenize(line)) for line in test_lines))
    for row in predictions:
        [line] = [line for line in test_lines if line.startswith(row["src"])][:1]
        assert row["src"] == line or len(tokenizer.tokenize(row["src"])) <= 30 < len(tokenizer.tokenize(line))
        kept = ".+".join(map(re.escape, row["mask"].split("[MASK]")))
        assert re.fullmatch(kept, row["src"]) and re.fullmatch(kept, row["pred"])


def test_text_of_long_lines_alone_has_predictions_and_hidden_words(settings, text_folder):
    """Of a line that is a page the first chunk is shown, and it ends where a word does."""
    english = [line for line in make_lines(600) if line.isascii()]
    pages = [" ".join(english[start : start + 6]) for start in range(0, len(english) - 5, 6)]
    assert min(map(len, pages)) > 200
    for split, part in (("train", pages[10:]), ("test", pages[:10])):
        (text_folder / f"{split}.txt").write_text("\n".join(part), encoding="utf-8")
    folder = run(settings(max_steps=2))
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, page in zip(rows, pages[:10], strict=True):
        assert page.startswith(row["src"]) and (row["src"] == page or not page[len(row["src"])].isalnum())
    guesses = read_summary(folder).guesses
    assert guesses and all(len(guessed.line.split()) <= 40 for guessed in guesses)


def test_long_lines_without_spaces_have_hidden_words(tmp_path):
    lines = ["".join(line for line in make_lines(60) if not line.isascii())[40 * number :][:300] for number in range(8)]
    tokenizer = learn_tokenizer(lambda: iter(lines), 300)
    vocabulary = read_vocabulary(tokenizer)
    encoded = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    chunks = Chunks(np.concatenate(encoded).astype(np.uint16), np.cumsum([0, *map(len, encoded)]), np.arange(8))
    hidden = hide_words(lines, chunks, tokenizer, vocabulary)
    assert hidden and all(len(tokenizer.tokenize(each.line)) <= 40 for each in hidden)
    assert all(any(each.line.replace("[MASK]", each.word) in line for line in lines) for each in hidden)


def test_predictions_mask_the_tokens_that_an_evaluation_masks(whole, predictions):
    tokenizer = AutoTokenizer.from_pretrained(whole / "final")
    vocabulary = read_vocabulary(tokenizer)
    for row in predictions:
        encoded = tokenizer(row["src"], add_special_tokens=False, return_offsets_mapping=True)
        tokens, lengths = np.array(encoded["input_ids"]), np.array([len(encoded["input_ids"])])
        _, masked, _ = mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, BERT_RULE)
        assert row["mask"].count("[MASK]") == len(masked)
        assert row["mask"].index("[MASK]") == encoded["offset_mapping"][masked[0]][0]


def test_predictions_are_the_likeliest_tokens(whole, predictions):
    tokenizer = AutoTokenizer.from_pretrained(whole / "final")
    model = AutoModelForMaskedLM.from_pretrained(whole / "final").eval()
    row = next(row for row in predictions if row["mask"].count("[MASK]") == 1)
    inputs = tokenizer(row["mask"], return_tensors="pt")
    place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    likeliest = tokenizer.convert_ids_to_tokens(model(**inputs).logits[0, place].argmax().item()).removeprefix("##")
    assert row["pred"] == row["mask"].replace("[MASK]", likeliest)


def test_hidden_words_are_content_words_that_a_neighbour_foretells():
    lines = [
        f"the nurse measured blood pressure of the {kind} patient and then of the other" for kind in ("first", "second")
    ]
    lines += ["the doctor wrote kidney disease on the form and then on the other form"]
    train = lines * 20
    tokenizer = learn_tokenizer(lambda: iter(train), 300)
    vocabulary = read_vocabulary(tokenizer)
    encoded = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in train]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])])
    chunks = Chunks(np.concatenate(encoded).astype(np.uint16), offsets, np.arange(len(encoded)))
    hidden = hide_words(iter([*lines, "too short", *lines]), chunks, tokenizer, vocabulary)
    words = [each.word for each in hidden]
    assert words == list(dict.fromkeys(words)) and 1 <= len(words) <= HIDDEN_WORDS
    assert not {"the", "then", "other", "form"} & set(words)
    assert all(each.line.replace("[MASK]", each.word) in lines for each in hidden)
    assert hide_words(iter([]), chunks, tokenizer, vocabulary) == []


def test_a_row_that_no_token_has_is_no_guess():
    """Models round their vocabulary up; a row to spare may be the likeliest of all."""
    lines = ["the doctor and the nurse wrote on the form"] * 5
    tokenizer = learn_tokenizer(lambda: iter(lines), 60)
    vocabulary = read_vocabulary(tokenizer)
    shape = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertForMaskedLM(BertConfig(vocab_size=vocabulary.size + 7, **shape))
    with torch.no_grad():
        model.cls.predictions.bias[vocabulary.size :] = 50.0
    tokens = set(tokenizer.get_vocab())
    hidden = HiddenWord("the [MASK] wrote", "doctor", np.array(tokenizer("the [MASK] wrote")["input_ids"]), 2)
    [words] = guess(model, [hidden], tokenizer)
    assert {word for word, _ in words} <= tokens and all(0 < probability < 1 for _, probability in words)
    text = SimpleNamespace(test=lambda: iter(lines))
    corpus = SimpleNamespace(text=text, tokenizer=tokenizer, vocabulary=vocabulary)
    assert len(list(predict(model, corpus, 32))) == 5


def test_lines_with_hidden_words_fit_the_model():
    lines = [f"the doctor and nurse number {number} wrote this on the form today" for number in range(20)]
    tokenizer = learn_tokenizer(lambda: iter(lines), 300)
    vocabulary = read_vocabulary(tokenizer)
    encoded = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    chunks = Chunks(np.concatenate(encoded).astype(np.uint16), np.cumsum([0, *map(len, encoded)]), np.arange(20))
    for most_tokens in range(min(map(len, encoded)) - 1, max(map(len, encoded)) + 1):
        hidden = hide_words(lines, chunks, tokenizer, vocabulary, most_tokens)
        whole = [each.line.replace("[MASK]", each.word) for each in hidden]
        assert whole and all(len(tokenizer.tokenize(line)) <= most_tokens for line in whole)
