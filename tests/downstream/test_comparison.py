"""downstream.py compares small models on tasks of every kind; truths that were planted come out."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from comparisons import SIGNS, WORDS, accuracies, make_rows, read_csv, save_model, verdicts, write_rows
from runs import reset_process_state
from transformers import AutoModelForSequenceClassification, BertModel, BertTokenizer

import downstream
from Config import DownstreamConfig
from mlm.downstream.metrics import accuracy, count_predictions
from mlm.downstream.significance import compare as compare_counts
from mlm.runtime.distributed import make_accelerator


def test_a_copy_of_a_model_is_not_told_from_it(tmp_path, compare):
    """The copy is trained by itself, as its config says in other words what the first's says; to the same bits."""
    task = write_rows(tmp_path / "task.tsv", make_rows(120, 1, given_away=0.7))
    first, copy = save_model(tmp_path / "first"), tmp_path / "copy"
    shutil.copytree(first, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"classifier_dropout": config["hidden_dropout_prob"]}))
    folder = compare(task, first, str(copy))
    [verdict] = verdicts(folder)
    assert verdict.startswith("cannot tell: a difference below ")
    assert len(list((folder / "trials").glob("*.json"))) == 12
    assert len(accuracies(folder, first)) == 6 and accuracies(folder, first) == accuracies(folder, str(copy))


@pytest.mark.slow
def test_copies_with_other_seeds_are_seldom_told_apart(tmp_path):
    """In 20 comparisons on other texts each; the copies take turns in twelve seeds."""
    model, verdicts = save_model(tmp_path / "model"), []
    for repetition in range(20):
        task = write_rows(tmp_path / "task.tsv", make_rows(300, repetition, given_away=0.5))
        config = DownstreamConfig(
            task=str(task), models=(model,), frozen=True, num_seeds=12, seed=100 * repetition, mixed_precision="no"
        )
        try:
            comparison = downstream.set_up(config, make_accelerator(config))
            comparison.folder = tmp_path / f"results-{repetition}"
            [results] = downstream.try_models(comparison, "all").values()
        finally:
            reset_process_state()
        counts = [count_predictions(comparison.task, r.predictions, comparison.task.test) for r in results]
        [difference] = compare_counts(np.array([counts[0::2], counts[1::2]]), accuracy)
        verdicts.append(difference.verdict)
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
    folder = compare(task, known, str(tmp_path / "shuffled"), examples_per_class=("10",), min_steps=40)
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
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_model_that_reads_the_label_in_the_text_is_better(tmp_path, compare, frozen):
    """Both are random; to the first, the words that give the label away are [UNK]."""
    blind, seeing = save_model(tmp_path / "blind", WORDS), save_model(tmp_path / "seeing")
    task = write_rows(tmp_path / "task.tsv", make_rows(400, 3))
    folder = compare(task, blind, seeing, frozen=frozen, min_steps=100, learning_rates=(2e-3,))
    [verdict] = verdicts(folder)
    assert verdict.startswith("better by ")
    [row] = read_csv(folder / "comparison.csv")
    expected = np.mean(accuracies(folder, seeing)) - np.mean(accuracies(folder, blind))
    assert float(row["mean"]) == pytest.approx(expected, abs=1e-5) and float(row["low"]) > 0
    assert float(row["p"]) == pytest.approx(2 / 64)
    picture = (folder / "results.svg").read_text(encoding="utf-8")
    assert all(
        f">{text}</text>" in picture for text in ("blind", "seeing", "difference from blind (right of 0: better)")
    )


# ------------------------------------------------------------------------------------------------------- kinds of tasks


@pytest.mark.parametrize("frozen", [False, True])
def test_entities_that_a_word_gives_away_are_found(tmp_path, compare, frozen):
    draw, sentences = random.Random(0), []
    for _ in range(150):
        words = draw.choices(WORDS, k=8)
        words[draw.randrange(7)] = "good"
        tags = ["B-sign" if word == "good" else "O" for word in words]
        sentences.append("".join(f"{word}\t{tag}\n" for word, tag in zip(words, tags, strict=True)))
    task = tmp_path / "ner.conll"
    task.write_text("\n".join(sentences))
    changes = {"num_seeds": 2, "min_steps": 60, "learning_rates": (3e-3,)}
    folder = compare(task, save_model(tmp_path / "model"), frozen=frozen, **changes)
    assert min(float(row["micro_f1"]) for row in read_csv(folder / "results.csv")) > 0.9


def test_pairs_of_texts_are_compared(tmp_path, compare):
    pairs = [f"{first}\t{second}\t{first == second}\n" for first in SIGNS * 20 for second in [*SIGNS, f"w{len(first)}"]]
    task = tmp_path / "pairs.tsv"
    task.write_text("".join(f"w{n % 30} w{n // 30} {pair}" for n, pair in enumerate(pairs)))
    model = save_model(tmp_path / "model")
    folder = compare(task, model, num_seeds=2, min_steps=20, learning_rates=(3e-3,))
    assert len(accuracies(folder, model)) == 2


def test_a_learning_curve_and_general_text(tmp_path, compare, capsys):
    task = write_rows(tmp_path / "task.tsv", make_rows(120, 5))
    (tmp_path / "general.txt").write_text("w1 w2 w3 w4\n\nw5 w6 w7\n")
    model, headless = save_model(tmp_path / "model"), save_model(tmp_path / "headless", pooler=True)
    sizes = ["5", "20", "all"]
    given = ("5", "20", "90", "all")  # of 84 texts to train on
    folder = compare(
        task, model, headless, frozen=True, examples_per_class=given, general_text=str(tmp_path / "general.txt")
    )
    assert [row["examples_per_class"] for row in read_csv(folder / "comparison.csv")] == sizes
    [row] = read_csv(folder / "general_text.csv")
    assert row["model"] == model and 20 < float(row["perplexity"]) < 100  # of 37 tokens, at random
    said = capsys.readouterr().out
    assert "no masked-language-model head" in said and "nats per character" in said
    assert said.count("are all the training texts") == said.count("note: 90 per class") == 1


def test_a_size_that_is_all_the_texts_is_tried_where_it_alone_is_asked_for(tmp_path, compare, capsys):
    task = write_rows(tmp_path / "task.tsv", make_rows(60, 5))
    model = save_model(tmp_path / "model")
    folder = compare(task, model, frozen=True, num_seeds=1, examples_per_class=("90",))
    assert [row["examples_per_class"] for row in read_csv(folder / "results.csv")] == ["90"]
    assert "note: 90 per class are all the training texts\n" in capsys.readouterr().out


def test_chinese_labels_and_texts(tmp_path, compare):
    model = save_model(tmp_path / "model", [*"降压药治疗糖尿病血"])
    rows = [("降压" * (n % 3 + 1) + "药" * n, "高血压") for n in range(25)] + [
        ("糖" * n + "尿病", "糖尿病") for n in range(25)
    ]
    folder = compare(write_rows(tmp_path / "任务.tsv", rows), model, frozen=True)
    assert folder.name.startswith("任务-") and np.mean(accuracies(folder, model)) > 0.8
