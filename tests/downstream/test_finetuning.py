"""Fine-tuning: the gradients of the stock models, the weights that dev likes best, seeds and dropout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from comparisons import make_rows, save_model
from runs import micro_batcher_of
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertModel,
    BertTokenizer,
)

from Config import DownstreamConfig
from mlm.data.micro_batches import MicroBatcher
from mlm.data.tokenizer import read_vocabulary
from mlm.downstream.encoding import Encoded, encode, select
from mlm.downstream.finetuning import Budget, fine_tune
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example
from mlm.encoder.packed import PackedClassifier
from model import load_classifier

# ----------------------------------------------------------------------------------------- the same as the stock models


TEXTS = [("w1 good w2",), ("w3",), ("bad w4 w5 w6 w7 w8",)]
PAIRS = [("w1 w2", "w3 good"), ("w4", "w5 w6 w7 w8 w9"), ("w1", "bad")]
SENTENCES = [("w1", "w2", "w3"), ("good",), ("w4", "w5", "w6", "bad", "w7")]
CLASSES = ["x", "y"]


def packed_classifier(name: str, kind: str, examples: list[Example]) -> PackedClassifier:
    """The model's classifier, without dropout, with the gradients of the mean loss of examples packed together."""
    tokenizer = BertTokenizer.from_pretrained(name)
    vocabulary = read_vocabulary(tokenizer)
    encoded = encode(examples, Task("t", kind, CLASSES, examples, [], [], []), tokenizer, 64)
    bert = load_classifier(name, 2, 5, of_words=kind == "entities")
    classifier = PackedClassifier(bert, vocabulary.sep_id if kind == "pair" else None).eval()
    chunks = select(encoded, np.arange(len(examples)))
    [(inputs, targets)] = micro_batcher_of(vocabulary)(chunks)
    torch.nn.functional.cross_entropy(classifier(**inputs), targets).backward()
    return classifier


def assert_gradients_of_stock_model(classifier: PackedClassifier, stock, batch, labels: torch.Tensor) -> None:
    stock.load_state_dict(classifier.model.state_dict())
    stock.eval()(**batch, labels=labels).loss.backward()
    for (name, ours), theirs in zip(classifier.model.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None and ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=name)
        else:
            assert ours.grad is theirs.grad is None, name


@pytest.mark.parametrize(("kind", "parts"), [("text", TEXTS), ("pair", PAIRS)])
def test_packed_texts_have_the_gradients_of_the_stock_model_on_padded_ones(tmp_path, kind, parts):
    name, labels = save_model(tmp_path / "model", pooler=True), ["x", "y", "x"]
    examples = [Example(texts, (label,)) for texts, label in zip(parts, labels, strict=True)]
    batch = BertTokenizer.from_pretrained(name)(*map(list, zip(*parts, strict=True)), padding=True, return_tensors="pt")
    stock = AutoModelForSequenceClassification.from_pretrained(name)
    targets = torch.tensor([CLASSES.index(label) for label in labels])
    assert_gradients_of_stock_model(packed_classifier(name, kind, examples), stock, batch, targets)


def test_packed_words_have_the_gradients_of_the_stock_model_on_padded_ones(tmp_path):
    name = save_model(tmp_path / "model", pooler=True)
    examples = [Example(words, ("x", "y", "x", "y", "x")[: len(words)]) for words in SENTENCES]
    batch = BertTokenizer.from_pretrained(name)(
        [list(words) for words in SENTENCES], is_split_into_words=True, padding=True, return_tensors="pt"
    )
    targets = torch.full(batch["input_ids"].shape, -100)  # each word is one token, behind [CLS]
    for row, example in enumerate(examples):
        targets[row, 1 : 1 + len(example.parts)] = torch.tensor([CLASSES.index(tag) for tag in example.labels])
    stock = AutoModelForTokenClassification.from_pretrained(name)
    assert_gradients_of_stock_model(packed_classifier(name, "entities", examples), stock, batch, targets)


def test_heads_of_models_of_one_width_start_alike(tmp_path):
    """Whether the checkpoint brings a pooler or not."""
    one = load_classifier(save_model(tmp_path / "one", pooler=True), 3, 7, of_words=False)
    other = load_classifier(save_model(tmp_path / "other", seed=1), 3, 7, of_words=False)
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    assert not torch.equal(one.classifier.weight, load_classifier(str(tmp_path / "one"), 3, 8, False).classifier.weight)
    kept = BertModel.from_pretrained(tmp_path / "one").pooler.dense.weight
    assert torch.equal(one.bert.pooler.dense.weight, kept)


# ------------------------------------------------------------------------------------------------------------- training


def small_training(tmp_path) -> tuple[PackedClassifier, Encoded, MicroBatcher]:
    """A classifier, 40 texts to train on, and what splits texts into micro-batches for it."""
    name = save_model(tmp_path / "model")
    tokenizer = BertTokenizer.from_pretrained(name)
    examples = [Example((text,), (label,)) for text, label in make_rows(40, 8)]
    encoded = encode(examples, Task("t", "text", ["no", "yes"], examples, [], [], []), tokenizer, 64)
    classifier = PackedClassifier(load_classifier(name, 2, 5, of_words=False))
    return classifier, encoded, micro_batcher_of(read_vocabulary(tokenizer))


@pytest.mark.parametrize(("scores", "best"), [([0.1, 0.5, 0.5, 0.3], 2), ([0.0, 0.0, 0.0, 0.0], 1), ([0, 0, 0, 1], 4)])
def test_the_weights_that_dev_likes_best_are_kept(tmp_path, accelerator, scores, best):
    classifier, train, micro_batcher = small_training(tmp_path)
    snapshots, expected = [], scores[best - 1]

    def score_on_dev(predictions):
        assert len(predictions) == 40
        snapshots.append({name: weight.clone() for name, weight in classifier.state_dict().items()})
        return scores[len(snapshots) - 1]

    budget = Budget(steps=8, evaluate_every=2, batch_size=8, learning_rate=1e-3)
    found = fine_tune(classifier, train, train, score_on_dev, budget, 3, accelerator, micro_batcher)
    assert found == (2 * best, expected) and len(snapshots) == 4
    for name, weight in classifier.state_dict().items():
        assert torch.equal(weight, snapshots[best - 1][name])
    assert not torch.equal(snapshots[0]["model.classifier.weight"], snapshots[3]["model.classifier.weight"])


def test_a_rate_that_diverges_leaves_the_classifier_as_it_was(tmp_path, accelerator):
    classifier, train, micro_batcher = small_training(tmp_path)
    before = classifier.model.classifier.weight.clone()
    budget = Budget(steps=8, evaluate_every=4, batch_size=8, learning_rate=1e30)
    found = fine_tune(classifier, train, train, lambda _: 0.7, budget, 3, accelerator, micro_batcher)
    assert found == (0, 0.0) and torch.equal(classifier.model.classifier.weight, before)


def test_training_follows_the_seed_and_drops_out(tmp_path, accelerator):
    """Weights after a few steps are the same with the same seed, not with another, nor without dropout."""

    def train_with(seed, dropout=0.1):
        classifier, train, micro_batcher = small_training(tmp_path)
        for module in classifier.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout if module.p else 0.0
        budget = Budget(steps=3, evaluate_every=3, batch_size=40, learning_rate=1e-3)  # one batch is an epoch
        fine_tune(classifier, train, train, lambda _: 0.5, budget, seed, accelerator, micro_batcher)
        return classifier.model.bert.embeddings.word_embeddings.weight.detach().clone()

    one = train_with(1)
    assert torch.equal(one, train_with(1))
    assert not torch.allclose(one, train_with(2), atol=1e-6)
    assert torch.allclose(train_with(1, dropout=0), train_with(2, dropout=0), atol=1e-5)  # the order in a batch aside
    assert not torch.allclose(one, train_with(1, dropout=0), atol=1e-6)


def test_every_step_of_every_seed_drops_out_anew(tmp_path, accelerator, monkeypatch):
    drawn = []
    for seed in (1, 2):
        classifier, train, micro_batcher = small_training(tmp_path)
        with monkeypatch.context() as patches:
            patches.setattr(torch, "manual_seed", drawn.append)
            budget = Budget(steps=5, evaluate_every=5, batch_size=40, learning_rate=1e-3)
            fine_tune(classifier, train, train, lambda _: 0.5, budget, seed, accelerator, micro_batcher)
    assert len(drawn) == len(set(drawn)) == 10


def test_gradients_are_clipped(tmp_path, accelerator, monkeypatch):
    norms = []
    clip = accelerator.clip_grad_norm_
    monkeypatch.setattr(
        accelerator, "clip_grad_norm_", lambda parameters, norm: norms.append(norm) or clip(parameters, norm)
    )
    classifier, train, micro_batcher = small_training(tmp_path)
    fine_tune(classifier, train, train, lambda _: 0.5, Budget(2, 2, 8, 1e-3), 3, accelerator, micro_batcher)
    assert norms == [1.0, 1.0]


def test_a_budget_follows_epochs_min_steps_and_the_size_of_dev():
    """Its first two fields are the steps and the steps between evaluations."""
    config = DownstreamConfig("t", ("a",), num_epochs=4, min_steps=300, batch_size=10)
    assert Budget.for_examples(1000, 100, replace(config, min_steps=10), learning_rate=1) == (400, 100, 10, 1)
    assert Budget.for_examples(20, 10, config, learning_rate=1) == (300, 30, 10, 1)
    assert Budget.for_examples(20, 1000, config, learning_rate=1) == (300, 100, 10, 1)
    assert Budget.for_examples(20, 9000, config, learning_rate=1) == (300, 300, 10, 1)
