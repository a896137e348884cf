"""downstream.py: the whole comparison on small models made here; truths that were planted come out."""

import csv
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from runs import LAUNCHERS, ROOT, micro_batcher_of, reset_process_state
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BertTokenizer,
)

import downstream
from Config import DownstreamConfig, parse_downstream_flags
from mlm.data.tokenizer import SPECIAL_TOKENS, read_vocabulary
from mlm.downstream.contamination import count_read_before
from mlm.downstream.encoding import Encoded, encode, select, training_order
from mlm.downstream.finetuning import Budget, fine_tune
from mlm.downstream.linear_probe import resample
from mlm.downstream.metrics import accuracy, count_answers
from mlm.downstream.results import sentence
from mlm.downstream.significance import Gain
from mlm.downstream.significance import compare as compare_counts
from mlm.downstream.task import Task
from mlm.downstream.task_files import Example
from mlm.downstream.trials import Result, Trials
from mlm.errors import UserError
from mlm.runtime.distributed import make_accelerator
from model import PackedClassifier, load_classifier

WORDS = [f"w{n}" for n in range(30)]
SIGNS = ["good", "bad"]  # the two words that give the label away


def save_model(folder: Path, words: list[str] = WORDS + SIGNS, seed: int = 0, pooler: bool = False) -> str:
    """A small BERT of random weights with a vocabulary of whole words."""
    torch.manual_seed(seed)
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *words])}
    config = BertConfig(
        vocab_size=len(vocabulary), num_hidden_layers=1, hidden_size=32, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=128, initializer_range=0.1,
    )  # fmt: skip
    (BertModel(config) if pooler else BertForMaskedLM(config)).save_pretrained(folder)
    BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return str(folder)


def make_rows(number: int, seed: int, given_away: float = 1.0) -> list[tuple[str, str]]:
    """Random words and a label that a sign among them gives away, in a share of the texts."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        label = draw.randrange(2)
        words = draw.choices(WORDS, k=draw.randint(3, 12))
        if draw.random() < given_away:
            words.insert(draw.randrange(len(words)), SIGNS[label])
        rows.append((" ".join(words), ["no", "yes"][label]))
    return rows


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return path


@pytest.fixture
def compare(tmp_path) -> Callable[..., Path]:
    """Compares models in this process; returns the folder with the results."""

    def run(task: Path, *models: str, **changes) -> Path:
        usual = {"num_epochs": 1, "least_steps": 12, "learning_rates": (1e-3,), "mixed_precision": "no"}
        usual |= {"path_model_save": str(tmp_path / "output")}
        config = DownstreamConfig(task=str(task), models=models, **usual | changes)
        try:
            downstream.main(config)
        finally:
            reset_process_state()
        folders = (tmp_path / "output" / "downstream").iterdir()
        return max(folders, key=lambda folder: (folder / "results.csv").stat().st_mtime)

    return run


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verdicts(folder: Path) -> list[str]:
    return [row["sentence"] for row in read_csv(folder / "comparison.csv")]


def accuracies(folder: Path, model: str) -> list[float]:
    return [float(row["accuracy"]) for row in read_csv(folder / "results.csv") if row["model"] == model]


# ------------------------------------------------------------------------------------------------------- planted truths


def test_a_copy_of_a_model_is_not_told_from_it(tmp_path, compare):
    """The copy is trained by itself, as its config says in other words what the first's says; to the same bits."""
    task = write_rows(tmp_path / "task.tsv", make_rows(120, 1, given_away=0.7))
    first, copy = save_model(tmp_path / "first"), tmp_path / "copy"
    shutil.copytree(first, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"classifier_dropout": config["hidden_dropout_prob"]}))
    folder = compare(task, first, str(copy))
    [verdict] = verdicts(folder)
    assert verdict.startswith("cannot tell: a gain below ")
    assert len(list((folder / "trials").glob("*.json"))) == 12
    assert len(accuracies(folder, first)) == 6 and accuracies(folder, first) == accuracies(folder, str(copy))


@pytest.mark.slow
def test_copies_with_seeds_of_their_own_are_not_told_apart_in_19_of_20_comparisons(tmp_path):
    """Each time on other texts; the copies have every second of twelve seeds."""
    model, verdicts = save_model(tmp_path / "model"), []
    for repetition in range(20):
        task = write_rows(tmp_path / "task.tsv", make_rows(300, repetition, given_away=0.5))
        config = DownstreamConfig(
            task=str(task), models=(model,), frozen=True, seeds=12, seed=100 * repetition, mixed_precision="no"
        )
        try:
            comparison = downstream.set_up(config, make_accelerator(config))
            comparison.trials = Trials(tmp_path / f"trials-{repetition}", {model: ""}, {model: 60}, 2)
            [results] = downstream.try_models(comparison, "all").values()
        finally:
            reset_process_state()
        copies = [
            [count_answers(comparison.task, r.answers, comparison.task.test) for r in results[i::2]] for i in (0, 1)
        ]
        [gain] = compare_counts(np.array(copies), accuracy)
        verdicts.append(gain.verdict)
    assert verdicts.count("cannot tell") >= 19


@pytest.mark.slow
def test_shuffled_weights_are_worse(tmp_path, compare):
    """The first model knows the task already, from other texts; of the second every weight stands elsewhere."""
    known = teach(save_model(tmp_path / "fresh"), tmp_path / "known")
    torch.manual_seed(0)
    shuffled = BertModel.from_pretrained(known)
    for weight in shuffled.parameters():
        weight.data = weight.data.flatten()[torch.randperm(weight.numel())].view_as(weight)
    shutil.copytree(known, tmp_path / "shuffled")
    shuffled.save_pretrained(tmp_path / "shuffled")
    task = write_rows(tmp_path / "task.tsv", make_rows(300, 2))
    folder = compare(task, known, str(tmp_path / "shuffled"), examples_per_class=("10",), least_steps=40)
    [verdict] = verdicts(folder)
    assert verdict.startswith("worse by ")


def teach(model: str, folder: Path) -> str:
    """The model after an epoch of labelled texts, by transformers' own head."""
    tokenizer = BertTokenizer.from_pretrained(model)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
    rows = make_rows(3200, 77)
    for start in range(0, len(rows), 16):
        texts, labels = zip(*rows[start : start + 16], strict=True)
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        classifier(**inputs, labels=torch.tensor([label == "yes" for label in labels]).long()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    classifier.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_that_reads_the_label_in_the_text_is_better(tmp_path, compare, frozen):
    """Both are random; to the first, the words that give the label away are [UNK]."""
    blind, seeing = save_model(tmp_path / "blind", WORDS), save_model(tmp_path / "seeing")
    task = write_rows(tmp_path / "task.tsv", make_rows(400, 3))
    folder = compare(task, blind, seeing, frozen=frozen, least_steps=100, learning_rates=(2e-3,))
    [verdict] = verdicts(folder)
    assert verdict.startswith("better by ")
    [row] = read_csv(folder / "comparison.csv")
    expected = np.mean(accuracies(folder, seeing)) - np.mean(accuracies(folder, blind))
    assert float(row["mean"]) == pytest.approx(expected, abs=1e-5) and float(row["low"]) > 0
    assert float(row["p"]) == pytest.approx(2 / 64)
    picture = (folder / "results.svg").read_text(encoding="utf-8")
    assert all(f">{text}</text>" in picture for text in ("blind", "seeing", "gain over blind (right of 0: better)"))


# ----------------------------------------------------------------------------------------- the same as the stock models


PARTS = {
    "text": [("w1 good w2",), ("w3",), ("bad w4 w5 w6 w7 w8",)],
    "pair": [("w1 w2", "w3 good"), ("w4", "w5 w6 w7 w8 w9"), ("w1", "bad")],
    "entities": [("w1", "w2", "w3"), ("good",), ("w4", "w5", "w6", "bad", "w7")],
}


@pytest.mark.parametrize("kind", PARTS)
def test_packed_classifiers_have_the_gradients_of_the_stock_models_on_padded_texts(tmp_path, kind):
    name, of_words = save_model(tmp_path / "model", pooler=True), kind == "entities"
    tokenizer = BertTokenizer.from_pretrained(name)
    examples = [Example(parts, ("x", "y", "x", "y", "x")[: len(parts) if of_words else 1]) for parts in PARTS[kind]]
    task = Task("t", kind, ["x", "y"], examples, [], [], [])
    encoded = encode(examples, task, tokenizer, 64)
    vocabulary = read_vocabulary(tokenizer)
    sep_id = vocabulary.sep_id if kind == "pair" else None
    classifier = PackedClassifier(load_classifier(name, 2, 5, of_words), sep_id).eval()
    chunks = select(encoded, np.arange(3))
    [(inputs, targets)] = micro_batcher_of(vocabulary)(chunks)
    torch.nn.functional.cross_entropy(classifier(**inputs), targets).backward()

    stock = (AutoModelForTokenClassification if of_words else AutoModelForSequenceClassification).from_pretrained(name)
    stock.load_state_dict(classifier.bert.state_dict())
    padded = {"padding": True, "return_tensors": "pt"}
    if of_words:
        batch = tokenizer([list(parts) for parts in PARTS[kind]], is_split_into_words=True, **padded)
        labels = torch.full(batch["input_ids"].shape, -100)
        for row, example in enumerate(examples):
            labels[row, 1 : 1 + len(example.parts)] = torch.tensor([task.classes.index(tag) for tag in example.labels])
    else:
        batch = tokenizer(*map(list, zip(*PARTS[kind], strict=True)), **padded)
        labels = torch.tensor([task.classes.index(example.labels[0]) for example in examples])
    stock.eval()(**batch, labels=labels).loss.backward()
    for (parameter_name, ours), theirs in zip(classifier.bert.named_parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None and ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4, msg=parameter_name)
        else:
            assert ours.grad is theirs.grad is None, parameter_name


def test_heads_of_models_of_one_width_start_alike(tmp_path):
    """Whether the checkpoint brings a pooler or not."""
    one = load_classifier(save_model(tmp_path / "one", pooler=True), 3, 7, of_words=False)
    other = load_classifier(save_model(tmp_path / "other", seed=1), 3, 7, of_words=False)
    assert torch.equal(one.classifier.weight, other.classifier.weight)
    assert not torch.equal(one.classifier.weight, load_classifier(str(tmp_path / "one"), 3, 8, False).classifier.weight)
    kept = BertModel.from_pretrained(tmp_path / "one").pooler.dense.weight
    assert torch.equal(one.bert.pooler.dense.weight, kept)


def test_long_texts_lose_their_end_and_long_sentences_nothing(tmp_path):
    tokenizer = BertTokenizer.from_pretrained(save_model(tmp_path / "model"))
    words = tuple(f"w{n}" for n in range(12))
    ids = tokenizer.convert_tokens_to_ids(list(words))
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id

    def encode_one(kind, parts, labels):
        return encode([Example(parts, labels)], Task("t", kind, ["x", "y"], [], [], [], []), tokenizer, 8)

    text = encode_one("text", (" ".join(words),), ("y",))
    assert text.chunks.input_ids.tolist() == [cls, *ids[:6], sep] and text.shortened == 1
    pair = encode_one("pair", (" ".join(words[:7]), "w0 w1"), ("y",))
    assert pair.chunks.input_ids.tolist() == [cls, *ids[:3], sep, *ids[:2], sep] and pair.shortened == 1
    sentence = encode_one("entities", words, ("x", "y") * 6)
    assert sentence.chunks.input_ids.tolist() == [cls, *ids[:6], sep, cls, *ids[6:], sep]
    assert sentence.chunks.input_ids[sentence.chunks.masked].tolist() == ids
    assert sentence.chunks.targets.tolist() == [0, 1] * 6 and sentence.answers == 12
    spelled = encode_one("text", ("w1 [SEP] w2",), ("x",))
    assert (spelled.chunks.input_ids == sep).sum() == 1


# ----------------------------------------------------------------------------------------- what dev chooses, what not


def small_training(tmp_path) -> tuple[PackedClassifier, Encoded, Callable]:
    """A classifier, 40 texts to train on, and what lays chunks out for it."""
    name = save_model(tmp_path / "model")
    tokenizer = BertTokenizer.from_pretrained(name)
    examples = [Example((text,), (label,)) for text, label in make_rows(40, 8)]
    encoded = encode(examples, Task("t", "text", ["no", "yes"], examples, [], [], []), tokenizer, 64)
    vocabulary = read_vocabulary(tokenizer)
    divide = micro_batcher_of(vocabulary)
    return PackedClassifier(load_classifier(name, 2, 5, of_words=False)), encoded, divide


@pytest.fixture
def accelerator():
    yield Accelerator(mixed_precision="no")
    reset_process_state()


@pytest.mark.parametrize(("scores", "best"), [([0.1, 0.5, 0.5, 0.3], 2), ([0.0, 0.0, 0.0, 0.0], 1), ([0, 0, 0, 1], 4)])
def test_the_weights_that_dev_likes_best_are_kept(tmp_path, accelerator, scores, best):
    classifier, train, divide = small_training(tmp_path)
    snapshots, expected = [], scores[best - 1]

    def score_on_dev():
        snapshots.append({name: weight.clone() for name, weight in classifier.state_dict().items()})
        return scores[len(snapshots) - 1]

    budget = Budget(steps=8, evaluate_every=2, batch_size=8, learning_rate=1e-3)
    found = fine_tune(classifier, train, score_on_dev, budget, 3, accelerator, divide, lambda: None)
    assert found == (2 * best, expected) and len(snapshots) == 4
    for name, weight in classifier.state_dict().items():
        assert torch.equal(weight, snapshots[best - 1][name])
    assert not torch.equal(snapshots[0]["bert.classifier.weight"], snapshots[3]["bert.classifier.weight"])


def test_budgets():
    """Steps and evaluations: by epochs, by least_steps, and where dev is larger than what is trained on."""
    assert Budget.of(1000, 100, num_epochs=4, least_steps=10, batch_size=10, learning_rate=1)[:2] == (400, 100)
    assert Budget.of(20, 10, num_epochs=4, least_steps=300, batch_size=10, learning_rate=1)[:2] == (300, 30)
    assert Budget.of(20, 1000, num_epochs=4, least_steps=300, batch_size=10, learning_rate=1)[:2] == (300, 100)
    assert Budget.of(20, 9000, num_epochs=4, least_steps=300, batch_size=10, learning_rate=1)[:2] == (300, 300)


def test_a_rate_that_diverges_leaves_the_classifier_as_it_was(tmp_path, accelerator):
    classifier, train, divide = small_training(tmp_path)
    before = classifier.bert.classifier.weight.clone()
    budget = Budget(steps=8, evaluate_every=4, batch_size=8, learning_rate=1e30)
    found = fine_tune(classifier, train, lambda: 0.7, budget, 3, accelerator, divide, lambda: None)
    assert found == (0, 0.0) and torch.equal(classifier.bert.classifier.weight, before)


def test_training_follows_the_seed_and_drops_out(tmp_path, accelerator):
    """The weights after a few steps: the same with the same seed; not with another, nor without dropout."""

    def train_with(seed, dropout=0.1):
        classifier, train, divide = small_training(tmp_path)
        for module in classifier.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout if module.p else 0.0
        budget = Budget(steps=3, evaluate_every=3, batch_size=40, learning_rate=1e-3)  # one batch is an epoch
        fine_tune(classifier, train, lambda: 0.5, budget, seed, accelerator, divide, lambda: None)
        return classifier.bert.bert.embeddings.word_embeddings.weight.detach().clone()

    one = train_with(1)
    assert torch.equal(one, train_with(1))
    assert not torch.allclose(one, train_with(2), atol=1e-6)
    assert torch.allclose(train_with(1, dropout=0), train_with(2, dropout=0), atol=1e-5)  # the order in a batch aside
    assert not torch.allclose(one, train_with(1, dropout=0), atol=1e-6)


def test_every_step_of_every_seed_drops_out_anew(tmp_path, accelerator, monkeypatch):
    drawn = []
    for seed in (1, 2):
        classifier, train, divide = small_training(tmp_path)
        with monkeypatch.context() as patches:
            patches.setattr(torch, "manual_seed", drawn.append)
            budget = Budget(steps=5, evaluate_every=5, batch_size=40, learning_rate=1e-3)
            fine_tune(classifier, train, lambda: 0.5, budget, seed, accelerator, divide, lambda: None)
    assert len(drawn) == len(set(drawn)) == 10


def test_the_order_is_new_for_every_epoch_and_seed(tmp_path):
    _, train, _ = small_training(tmp_path)
    epochs = [
        np.concatenate([batch.lengths for batch in islice(training_order(train, 8, seed), 5 * epoch, 5 * epoch + 5)])
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len({tuple(lengths) for lengths in epochs}) == 4
    assert len({tuple(sorted(lengths)) for lengths in epochs}) == 1  # each of all examples


def test_frozen_features_are_fitted_on_other_training_texts_by_every_seed():
    examples = [Example((f"text {n}",), ("rare" if n < 5 else "common",)) for n in range(40)]
    task = Task("t", "text", ["common", "rare"], examples, [], [], [])
    drawn = [resample(task, list(range(40)), seed) for seed in (1, 2)]
    assert drawn[0] != drawn[1] and drawn[0] == resample(task, list(range(40)), 1)
    for indices in drawn:
        assert len(indices) == 40 and len(set(indices)) < 35 and sum(index < 5 for index in indices) == 5


def test_gradients_are_clipped(tmp_path, accelerator, monkeypatch):
    norms = []
    clip = accelerator.clip_grad_norm_
    monkeypatch.setattr(
        accelerator, "clip_grad_norm_", lambda parameters, norm: norms.append(norm) or clip(parameters, norm)
    )
    classifier, train, divide = small_training(tmp_path)
    fine_tune(classifier, train, lambda: 0.5, Budget(2, 2, 8, 1e-3), 3, accelerator, divide, lambda: None)
    assert norms == [1.0, 1.0]


def test_dev_chooses_the_rate_and_test_labels_change_nothing_but_the_scores(tmp_path, compare):
    """The same texts twice, once with other test labels: what is trained, chosen and answered stays."""
    model, rows = save_model(tmp_path / "model"), make_rows(200, 6)
    for name, test in (
        ("right", rows[150:]),
        ("wrong", [(text, {"no": "yes", "yes": "no"}[label]) for text, label in rows[150:]]),
    ):
        (tmp_path / name).mkdir()
        for split, of_split in (("train", rows[:100]), ("dev", rows[100:150]), ("test", test)):
            write_rows(tmp_path / name / f"{split}.tsv", of_split)
    found = {}
    for name in ("right", "wrong"):
        folder = compare(tmp_path / name, model, learning_rates=(1e-5, 3e-3), least_steps=60, seeds=2)
        trials = [json.loads(path.read_text()) for path in (folder / "trials").glob("*.json")]
        found[name] = sorted(
            (trial["learning_rate"], trial["seed"], trial["best_step"], trial["dev_score"], trial["answers"])
            for trial in trials
        )
        chosen = {float(row["learning_rate"]) for row in read_csv(folder / "results.csv")}
        assert chosen == {3e-3}  # on dev the better; on the wrong test the worse
    assert found["right"] == found["wrong"] and len(found["right"]) == 3


def test_what_was_not_learned_is_said(tmp_path, compare, monkeypatch, capsys):
    """To this model every word is [UNK]; all rates score alike on dev, so the middle one is taken."""
    rows = [(text, "yes" if n % 3 else "no") for n, (text, _) in enumerate(make_rows(90, 6))]
    model, task = save_model(tmp_path / "blind", ["other"]), write_rows(tmp_path / "task.tsv", rows)

    def always_yes(comparison, trial, positions):
        answers = [comparison.task.classes.index("yes")] * len(comparison.task.test)
        return Result(*trial, penalty=None, best_step=1, dev_score=0.5, seconds=1.0, answers=answers)

    monkeypatch.setattr(downstream, "_fine_tune", always_yes)
    folder = compare(task, model, seeds=3, learning_rates=(1e-5, 2e-5, 4e-5))
    assert {row["learning_rate"] for row in read_csv(folder / "results.csv")} == {"2e-05"}
    said = capsys.readouterr().out
    assert "warning: 100% of them are [UNK]" in said and "hint" not in said
    assert "warning: 3 of 3 seed(s) of blind did not learn" in said
    [row] = [line.split() for line in said.splitlines() if line.startswith("(always yes)")]
    assert row[2] == "66.7"  # accuracy: two thirds of the test texts


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


# ------------------------------------------------------------------------------------------------- going on, and reuse


def count_trials(monkeypatch) -> list:
    """A list that every trial from now on is added to."""
    done = []

    def noted(comparison, trial, positions, fine_tune=downstream._fine_tune):
        done.append(trial)
        return fine_tune(comparison, trial, positions)

    monkeypatch.setattr(downstream, "_fine_tune", noted)
    return done


def test_what_is_finished_is_not_done_again(tmp_path, compare, monkeypatch):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    models = [save_model(tmp_path / f"model{seed}", seed=seed) for seed in range(3)]
    done = count_trials(monkeypatch)
    folder = compare(task, *models[:2], seeds=3, learning_rates=(1e-3, 2e-3))
    assert len(done) == 2 * (2 + 2)  # two rates by the first seed, then two more seeds
    before = (folder / "results.csv").read_text()

    def stop(comparison, trial, positions):
        raise KeyboardInterrupt

    monkeypatch.setattr(downstream, "_fine_tune", stop)
    assert compare(task, *models[:2], seeds=3, learning_rates=(1e-3, 2e-3)) == folder
    assert (folder / "results.csv").read_text() == before
    with pytest.raises(SystemExit) as stopped:
        compare(task, *models, seeds=3, learning_rates=(1e-3, 2e-3))
    assert stopped.value.code == 130

    monkeypatch.undo()
    done = count_trials(monkeypatch)
    compare(task, *models, seeds=3, learning_rates=(1e-3, 2e-3))
    assert {trial.model for trial in done} == {models[2]} and len(done) == 4
    assert (folder / "results.csv").read_text().startswith(before)


def test_a_changed_model_or_budget_is_tried_anew(tmp_path, compare, monkeypatch):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    model = save_model(tmp_path / "model")
    done = count_trials(monkeypatch)
    compare(task, model, seeds=1)
    compare(task, model, seeds=1, least_steps=13)
    compare(task, model, seeds=1, metric="macro_f1")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    compare(task, model, seeds=1)
    save_model(tmp_path / "model", seed=9)
    compare(task, model, seeds=1)
    assert len(done) == 5


@pytest.mark.parametrize("damage", ["", "{", "{}", "[]", "\0\0", '"answers"', "short", "beyond"])
def test_a_damaged_trial_is_done_again(tmp_path, compare, damage):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    model = save_model(tmp_path / "model")
    folder = compare(task, model, frozen=True, seeds=2)
    before, trial = (folder / "results.csv").read_text(), next((folder / "trials").glob("*.json"))
    content = json.loads(trial.read_text())
    changed = {"short": content["answers"][1:], "beyond": [2, *content["answers"][1:]]}
    trial.write_text(json.dumps(content | {"answers": changed[damage]}) if damage in changed else damage)
    compare(task, model, frozen=True, seeds=2)
    without_seconds = [[row | {"seconds": ""} for row in csv.DictReader(text.splitlines())] for text in
                       (before, (folder / "results.csv").read_text())]  # fmt: skip
    assert without_seconds[0] == without_seconds[1]


@pytest.mark.slow
def test_two_ranks_share_the_trials(tmp_path):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    model = save_model(tmp_path / "model")
    flags = ["--task", str(task), "--models", model, "--seeds", "4", "--least_steps", "8", "--num_epochs", "1"]
    flags += ["--learning_rates", "1e-3", "--mixed_precision", "no", "--path_model_save"]
    tables = []
    for ranks, launcher in LAUNCHERS.items():
        output = tmp_path / f"{ranks} ranks"
        command = [*launcher, "downstream.py", *flags, str(output)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        [folder] = (output / "downstream").iterdir()
        rows = read_csv(folder / "results.csv")
        assert len(rows) == len(list((folder / "trials").glob("*.json"))) == 4
        tables.append([{name: value for name, value in row.items() if name != "seconds"} for row in rows])
    assert tables[0] == tables[1]


# ------------------------------------------------------------------------------------------------------- kinds of tasks


def test_entities_and_pairs_are_compared(tmp_path, compare):
    model = save_model(tmp_path / "model")
    draw = random.Random(0)
    sentences = []
    for _ in range(150):
        words = draw.choices(WORDS, k=8)
        words[draw.randrange(7)] = "good"
        tags = ["B-sign" if word == "good" else "O" for word in words]
        sentences.append("".join(f"{word}\t{tag}\n" for word, tag in zip(words, tags, strict=True)))
    (tmp_path / "ner.conll").write_text("\n".join(sentences))
    for frozen in (False, True):
        folder = compare(tmp_path / "ner.conll", model, frozen=frozen, seeds=2, least_steps=60, learning_rates=(3e-3,))
        assert min(float(row["micro_f1"]) for row in read_csv(folder / "results.csv")) > 0.9

    pairs = [f"{first}\t{second}\t{first == second}\n" for first in SIGNS * 20 for second in [*SIGNS, f"w{len(first)}"]]
    numbered = [f"w{n % 30} w{n // 30} {pair}" for n, pair in enumerate(pairs)]
    (tmp_path / "pairs.tsv").write_text("".join(numbered))
    folder = compare(tmp_path / "pairs.tsv", model, seeds=2, least_steps=150, learning_rates=(3e-3,))
    assert len(accuracies(folder, model)) == 2


def test_a_learning_curve_and_general_text(tmp_path, compare, capsys):
    task = write_rows(tmp_path / "task.tsv", make_rows(120, 5))
    (tmp_path / "general.txt").write_text("w1 w2 w3 w4\n\nw5 w6 w7\n")
    model, headless = save_model(tmp_path / "model"), save_model(tmp_path / "headless", pooler=True)
    sizes = ("5", "20", "all")
    folder = compare(
        task, model, headless, frozen=True, examples_per_class=sizes, general_text=str(tmp_path / "general.txt")
    )
    assert [row["examples_per_class"] for row in read_csv(folder / "comparison.csv")] == list(sizes)
    [known] = read_csv(folder / "general_text.csv")
    assert known["model"] == model and 20 < float(known["perplexity"]) < 100  # of 37 tokens, at random
    said = capsys.readouterr().out
    assert "no masked-language-model head to ask" in said and "nats per character" in said


def test_chinese_labels_and_texts(tmp_path, compare):
    model = save_model(tmp_path / "model", [*"降压药治疗糖尿病血"])
    rows = [("降压" * (n % 3 + 1) + "药" * n, "高血压") for n in range(25)] + [
        ("糖" * n + "尿病", "糖尿病") for n in range(25)
    ]
    folder = compare(write_rows(tmp_path / "任务.tsv", rows), model, frozen=True)
    assert folder.name.startswith("任务-") and np.mean(accuracies(folder, model)) > 0.8


@pytest.mark.slow
def test_a_terminal_that_lacks_the_characters_shows_their_numbers(tmp_path):
    model = save_model(tmp_path / "model")
    task = write_rows(tmp_path / "任务.tsv", make_rows(40, 1))
    flags = [
        "--task",
        str(task),
        "--models",
        model,
        "--frozen",
        "--seeds",
        "1",
        "--path_model_save",
        str(tmp_path / "o"),
    ]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "downstream.py", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, timeout=100)
    assert result.returncode == 0, result.stderr
    assert rb"\u4efb\u52a1: texts of 2 classes" in result.stdout


# -------------------------------------------------------------------------------------------------------------- leakage


def test_test_texts_in_the_pre_training_text_of_a_run_are_counted(tmp_path, settings, text_folder):
    text_folder.joinpath("train.txt").write_text("The patient took << metformin >>.\nAnother line.\nA third one.\n")
    output = tmp_path / "output" / "mine"
    output.mkdir(parents=True)
    recorded = {"path_datasets": str(text_folder), "path_model_save": str(tmp_path / "output"), "removed_setting": 1}
    output.joinpath("settings.json").write_text(json.dumps({"settings": recorded}))
    examples = [Example((text,), ("x",)) for text in ("the patient took metformin", "A third", "a third one", "new")]
    task = Task("t", "text", ["x"], [], [], examples, [])
    assert count_read_before(str(output / "final"), task) == 2
    pairs = task._replace(kind="pair", test=[Example(("new", "A third one!"), ("x",))])
    assert count_read_before(str(output / "final"), pairs) == 1
    words = task._replace(kind="entities", test=[Example(("another", "line", "."), ("O", "O", "O"))])
    assert count_read_before(str(output / "final"), words) == 1
    assert count_read_before(str(tmp_path), task) is None
    text_folder.joinpath("train.txt").unlink()
    assert count_read_before(str(output / "final"), task) is None
    for damaged in ("[]", '{"settings": []}', '{"settings": null}', "{"):
        output.joinpath("settings.json").write_text(damaged)
        assert count_read_before(str(output / "final"), task) is None


# ------------------------------------------------------------------------------------------------------- plain errors


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--task"),
        (["--task", "nowhere.tsv", "--models", "./nowhere"], "error: models: there is no folder ./nowhere"),
        (["--task", "nowhere.tsv", "--models", "tests"], "error: task: there is no file or folder nowhere.tsv"),
        (["--task", "a", "--models", "b", "--seeds", "0"], "error: seeds: must be 1 or more"),
        (["--task", "a", "--models", "b", "b"], "error: models: each is to be named once"),
        (["--task", "a", "--models", "b", "--examples_per_class", "some"], "error: examples_per_class: "),
        (["--task", "a", "--models", "b", "--learning_rates", "0"], "error: learning_rates: "),
        (["--task", "a", "--models", "b", "--test_fraction", "0.95"], "error: test_fraction, dev_fraction: "),
    ],
)
def test_wrong_flags_end_with_status_2_and_no_traceback(flags, said):
    command = [sys.executable, "downstream.py", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert said in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_models_that_do_not_fit_are_named(tmp_path, compare):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 4))
    model = save_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"sen_max_length, models: .*128 positions"):
        compare(task, model, sen_max_length=129)
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tmp_path / "model" / file, tmp_path / "gpt")
    with pytest.raises(UserError, match=r"models: .*gpt is not a BERT encoder but of type gpt2"):
        compare(task, str(tmp_path / "gpt"))

    weights = load_file(tmp_path / "model" / "model.safetensors")
    renamed = {f"module.{name}": weight for name, weight in weights.items()}
    save_file(renamed, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"models: .* lacks 21 of BERT's weights, such as embeddings"):
        compare(task, model)
    infinite = {name: weight / 0 for name, weight in weights.items()}
    save_file(infinite, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="has weights that are not finite"):
        compare(task, model)
    with pytest.raises(UserError, match="general_text: nowhere is no file or folder"):
        compare(task, model, general_text="nowhere")


def test_flags_become_settings():
    config = parse_downstream_flags(
        ["--task", "t", "--models", "a", "b", "--examples_per_class", "10", "all", "--frozen"]
    )
    assert config == DownstreamConfig("t", ("a", "b"), examples_per_class=("10", "all"), frozen=True)


def test_sentences_to_repeat():
    assert sentence(Gain(0.019, 0.007, 0.03, 0.03, 0.02)) == "better by 1.9 (0.7 to 3.0)"
    assert sentence(Gain(-0.019, -0.03, -0.007, 0.03, 0.02)) == "worse by 1.9 (0.7 to 3.0)"
    assert sentence(Gain(0.004, -0.003, 0.01, 0.3, 0.012)) == "cannot tell: a gain below 1.2 would not reliably show"
    assert "the seeds do not agree" in sentence(Gain(0.385, 0.18, 0.59, 0.0625, 0.353))
    assert "fewer than 6 seeds" in sentence(Gain(0.1, 0.05, 0.15, 0.25, np.inf))
