"""downstream.py: the whole comparison on small models made here; truths that were planted come out."""

import csv
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import LAUNCHERS, ROOT, reset_process_state
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
from mlm.batches import make_micro_batches
from mlm.comparison import Gain
from mlm.comparison import compare as compare_counts
from mlm.encoding import encode, select
from mlm.errors import UserError
from mlm.labelled import Example
from mlm.leakage import count_read_before
from mlm.ranks import make_accelerator
from mlm.scores import accuracy, count_answers
from mlm.tasks import Task
from mlm.trials import Trials
from mlm.verdict import sentence
from mlm.vocabulary import SPECIAL_TOKENS, read_vocabulary
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
    return [row["verdict"] for row in read_csv(folder / "comparison.csv")]


def accuracies(folder: Path, model: str) -> list[float]:
    return [float(row["accuracy"]) for row in read_csv(folder / "results.csv") if row["model"] == model]


# ------------------------------------------------------------------------------------------------------- planted truths


def test_a_copy_of_a_model_is_not_told_from_it(tmp_path, compare):
    task = write_rows(tmp_path / "task.tsv", make_rows(120, 1, given_away=0.7))
    first = save_model(tmp_path / "first")
    shutil.copytree(first, tmp_path / "copy")
    folder = compare(task, first, str(tmp_path / "copy"))
    assert verdicts(folder) == ["cannot tell: both answer alike"]
    assert len(accuracies(folder, first)) == 6 and accuracies(folder, first) == accuracies(
        folder, str(tmp_path / "copy")
    )


@pytest.mark.slow
def test_copies_with_seeds_of_their_own_are_not_told_apart_in_19_of_20_comparisons(tmp_path):
    """Each time on other texts; one copy has the first six seeds, the other six more."""
    model, verdicts = save_model(tmp_path / "model"), []
    for repetition in range(20):
        task = write_rows(tmp_path / "task.tsv", make_rows(300, repetition, given_away=0.5))
        config = DownstreamConfig(
            task=str(task), models=(model,), frozen=True, seeds=12, seed=100 * repetition, mixed_precision="no"
        )
        try:
            comparison = downstream.set_up(config, make_accelerator(config))
            comparison.trials = Trials(tmp_path / f"trials-{repetition}", {model: ""})
            [results] = downstream.try_models(comparison, "all").values()
        finally:
            reset_process_state()
        copies = [
            [count_answers(comparison.task, r.answers, comparison.task.test) for r in results[i::2]] for i in (0, 1)
        ]
        [gain] = compare_counts(np.array(copies), accuracy)
        verdicts.append(gain.verdict)
    assert verdicts.count("cannot tell") >= 19


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


@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_that_reads_the_label_in_the_text_is_better(tmp_path, compare, frozen):
    """Both are random; to the first, the words that give the label away are [UNK]."""
    blind, seeing = save_model(tmp_path / "blind", WORDS), save_model(tmp_path / "seeing")
    task = write_rows(tmp_path / "task.tsv", make_rows(400, 3))
    folder = compare(task, blind, seeing, frozen=frozen, least_steps=60)
    [verdict] = verdicts(folder)
    assert verdict.startswith("better by ")
    [row] = read_csv(folder / "comparison.csv")
    expected = np.mean(accuracies(folder, seeing)) - np.mean(accuracies(folder, blind))
    assert float(row["mean"]) == pytest.approx(expected, abs=1e-5) and float(row["low"]) > 0
    assert float(row["p"]) == pytest.approx(2 / 64)
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG")


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
    classifier = PackedClassifier(load_classifier(name, 2, 5, of_words), vocabulary.sep_id).eval()
    chunks = select(encoded.chunks, np.arange(3))
    [(inputs, targets)] = make_micro_batches(chunks, 4096, vocabulary, torch.device("cpu"))
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
    save_model(tmp_path / "model", seed=9)
    compare(task, model, seeds=1)
    assert len(done) == 3


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


# -------------------------------------------------------------------------------------------------------------- leakage


def test_test_texts_in_the_pre_training_text_of_a_run_are_counted(tmp_path, settings, text_folder):
    text_folder.joinpath("train.txt").write_text("The patient took << metformin >>.\nAnother line.\nA third one.\n")
    output = tmp_path / "output" / "mine"
    output.mkdir(parents=True)
    recorded = {"path_datasets": str(text_folder), "path_model_save": str(tmp_path / "output"), "removed_setting": 1}
    output.joinpath("settings.json").write_text(json.dumps({"settings": recorded}))
    examples = [Example((text,), ("x",)) for text in ("the patient took metformin", "A third", "a third one", "new")]
    assert count_read_before(str(output / "final"), examples) == 2
    assert count_read_before(str(tmp_path), examples) is None
    text_folder.joinpath("train.txt").unlink()
    assert count_read_before(str(output / "final"), examples) is None


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


def test_flags_become_settings():
    config = parse_downstream_flags(
        ["--task", "t", "--models", "a", "b", "--examples_per_class", "10", "all", "--frozen"]
    )
    assert config == DownstreamConfig("t", ("a", "b"), examples_per_class=("10", "all"), frozen=True)


def test_sentences_to_repeat():
    assert sentence(Gain(0.019, 0.007, 0.03, 0.03, 0.02)) == "better by 1.9 (0.7 to 3.0)"
    assert sentence(Gain(-0.019, -0.03, -0.007, 0.03, 0.02)) == "worse by 1.9 (0.7 to 3.0)"
    assert sentence(Gain(0.004, -0.003, 0.01, 0.3, 0.012)) == "cannot tell: a gain below 1.2 would not reliably show"
    assert "fewer than 6 seeds" in sentence(Gain(0.1, 0.05, 0.15, 0.25, np.inf))
