"""Labelled examples as chunks of tokens, and the order in which batches take them."""

from itertools import islice

import numpy as np
import pytest
from comparisons import WORDS, make_rows, save_model
from transformers import BertTokenizer

from mlm.downstream.encoding import Encoded, encode, training_order
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example

LETTERS = tuple(f"w{n}" for n in range(12))  # twelve words of one token each


@pytest.fixture
def tokenizer(tmp_path) -> BertTokenizer:
    return BertTokenizer.from_pretrained(save_model(tmp_path / "model"))


def encode_one(tokenizer: BertTokenizer, kind: str, parts: tuple[str, ...], labels: tuple[str, ...]) -> Encoded:
    """The example, in chunks of at most eight positions."""
    return encode([Example(parts, labels)], Task("t", kind, ["x", "y"], [], [], [], []), tokenizer, 8)


def test_a_long_text_loses_its_end(tokenizer):
    text = encode_one(tokenizer, "text", (" ".join(LETTERS),), ("y",))
    assert tokenizer.decode(text.chunks.input_ids) == "[CLS] w0 w1 w2 w3 w4 w5 [SEP]" and text.shortened == 1
    assert text.chunks.label_positions.tolist() == [0] and text.chunks.targets.tolist() == [1]


def test_of_a_long_pair_the_longer_text_loses_its_end(tokenizer):
    pair = encode_one(tokenizer, "pair", (" ".join(LETTERS[:7]), "w0 w1"), ("y",))
    assert tokenizer.decode(pair.chunks.input_ids) == "[CLS] w0 w1 w2 [SEP] w0 w1 [SEP]" and pair.shortened == 1


def test_a_long_sentence_of_words_becomes_several_chunks(tokenizer):
    sentence = encode_one(tokenizer, "entities", LETTERS, ("x", "y") * 6)
    first, second = "[CLS] w0 w1 w2 w3 w4 w5 [SEP]", "[CLS] w6 w7 w8 w9 w10 w11 [SEP]"
    assert tokenizer.decode(sentence.chunks.input_ids) == f"{first} {second}" and sentence.shortened == 1
    assert tokenizer.decode(sentence.chunks.input_ids[sentence.chunks.label_positions]) == " ".join(LETTERS)
    assert sentence.chunks.targets.tolist() == [0, 1] * 6
    assert sentence.word_ids.tolist() == [-1, *range(6), -1, -1, *range(6, 12), -1]


def test_text_that_spells_a_special_token_is_text(tokenizer):
    text = encode_one(tokenizer, "text", ("w1 [SEP] w2",), ("x",))
    assert (text.chunks.input_ids == tokenizer.sep_token_id).sum() == 1


# --------------------------------------------------------------------------------------------------------------- order


def test_examples_come_in_the_same_order_whatever_the_tokenizer(tmp_path):
    """Sentences are more chunks to the second tokenizer, to which every word is [UNK], and to a shorter length."""
    examples = [Example(tuple(f"w{n} " for _ in range(n % 12 + 1)), ("O",) * (n % 12 + 1)) for n in range(30)]
    task = Task("t", "entities", ["O"], examples, [], [], [])
    tokenizers = [
        BertTokenizer.from_pretrained(save_model(tmp_path / name, words)) for name, words in (("a", WORDS), ("b", []))
    ]
    lengths = [
        [len(batch.targets) for batch in islice(training_order(encode(examples, task, tokenizer, longest), 8, 1), 10)]
        for tokenizer, longest in zip(tokenizers, (64, 6), strict=True)
    ]
    assert lengths[0] == lengths[1] and len(set(lengths[0])) > 3


def test_the_order_is_new_for_every_epoch_and_seed(tokenizer):
    examples = [Example((text,), (label,)) for text, label in make_rows(40, 8)]
    train = encode(examples, Task("t", "text", ["no", "yes"], examples, [], [], []), tokenizer, 64)
    epochs = [
        np.concatenate([batch.lengths for batch in islice(training_order(train, 8, seed), 5 * epoch, 5 * epoch + 5)])
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len({tuple(lengths) for lengths in epochs}) == 4
    assert len({tuple(sorted(lengths)) for lengths in epochs}) == 1  # each of all examples
