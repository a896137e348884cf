"""The linear probe: its features, and the training texts that each seed draws."""

import numpy as np
import pytest
import torch
from comparisons import save_model
from runs import micro_batcher_of
from transformers import BertModel, BertTokenizer

from mlm.data.tokenizer import read_vocabulary
from mlm.downstream.encoding import encode
from mlm.downstream.linear_probe import features, resample, select_rows
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example
from mlm.encoder.packed import PackedEncoder
from model import load_encoder


def test_features_are_the_stock_models_mean_hidden_states(tmp_path, accelerator):
    """Without [CLS] and [SEP]; a text without a token has zeros."""
    name = save_model(tmp_path / "model", pooler=True)
    tokenizer = BertTokenizer.from_pretrained(name)
    texts = ["w1 good w2", "", "bad w4 w5 w6 w7 w8"]
    examples = [Example((text,), ("x",)) for text in texts]
    encoded = encode(examples, Task("t", "text", ["x"], examples, [], [], []), tokenizer, 64)
    micro_batcher = micro_batcher_of(read_vocabulary(tokenizer))
    found = features(PackedEncoder(load_encoder(name)[0]), encoded, accelerator, micro_batcher)
    stock = BertModel.from_pretrained(name).eval()
    for row, text in zip(found, texts, strict=True):
        hidden = stock(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 1:-1].detach()
        expected = hidden.mean(0) if text else torch.zeros(32)
        assert row == pytest.approx(expected.numpy(), abs=1e-5)


def test_every_seed_draws_other_training_texts_of_each_class():
    examples = [Example((f"text {n}",), ("rare" if n < 5 else "common",)) for n in range(40)]
    task = Task("t", "text", ["common", "rare"], examples, [], [], [])
    drawn = [resample(task, list(range(40)), seed) for seed in (1, 2)]
    assert drawn[0] != drawn[1] and drawn[0] == resample(task, list(range(40)), 1)
    for indices in drawn:
        assert len(indices) == 40 and len(set(indices)) < 35 and sum(index < 5 for index in indices) == 5


def test_rows_of_drawn_sentences_are_those_of_their_words():
    sentences = [Example(("w",) * length, ("O", "B-x", "I-x")[:length]) for length in (2, 3, 1)]
    task = Task("t", "entities", ["B-x", "I-x", "O"], sentences, [], [], [])
    rows, targets = select_rows(task, [2, 0, 2])
    assert rows.tolist() == [5, 0, 1, 5] and np.array(task.classes)[targets].tolist() == ["O", "O", "B-x", "O"]
