"""The words on screen: verdicts to be repeated, warnings about models that learned nothing."""

import io
import sys

import numpy as np
from comparisons import make_rows, read_csv, save_model, write_rows

import downstream
from mlm.downstream.significance import Difference
from mlm.downstream.trials import Result


def test_models_that_learned_nothing_are_named(tmp_path, compare, monkeypatch, capsys):
    """To this model every word is [UNK]; all rates score alike on dev, so the middle one is taken."""
    rows = [(text, "yes" if n % 3 else "no") for n, (text, _) in enumerate(make_rows(90, 6))]
    model, task = save_model(tmp_path / "blind", ["other"]), write_rows(tmp_path / "task.tsv", rows)

    def always_yes(comparison, trial):
        predictions = [comparison.task.classes.index("yes")] * len(comparison.task.test)
        return Result(trial, dev_score=0.5, predictions=predictions, seconds=1.0, best_step=1)

    monkeypatch.setattr(downstream, "fine_tune_once", always_yes)
    folder = compare(task, model, num_seeds=3, learning_rates=(1e-5, 2e-5, 4e-5))
    assert {row["learning_rate"] for row in read_csv(folder / "results.csv")} == {"2e-05"}
    said = capsys.readouterr().out
    assert "warning: 100% of them are [UNK]" in said and "hint" not in said
    assert "warning: 3 of 3 seed(s) of blind did not learn" in said
    [row] = [line.split() for line in said.splitlines() if line.startswith("(always yes)")]
    assert row[2] == "66.7"  # accuracy: two thirds of the test texts


def test_whether_a_model_learned_is_asked_of_the_metric_that_was_chosen(tmp_path, compare, monkeypatch, capsys):
    """One that finds all of a rare class, and calls as many others it, is no more accurate than the majority label."""
    rows = [(text, "no" if n % 4 else "yes") for n, (text, _) in enumerate(make_rows(120, 6))]
    model, task = save_model(tmp_path / "seeing"), write_rows(tmp_path / "task.tsv", rows)

    def half_right(comparison, trial):
        labels = [example.labels[0] for example in comparison.task.test]
        rare, swapped = labels.count("yes"), 0
        for place, label in enumerate(labels):
            if label == "no" and swapped < rare:
                labels[place], swapped = "yes", swapped + 1
        predictions = [comparison.task.classes.index(label) for label in labels]
        return Result(trial, dev_score=0.5, predictions=predictions, seconds=1.0, best_step=1)

    monkeypatch.setattr(downstream, "fine_tune_once", half_right)
    compare(task, model, num_seeds=3, learning_rates=(1e-5,), metric="macro_f1")
    assert "did not learn" not in capsys.readouterr().out
    compare(task, model, num_seeds=3, learning_rates=(1e-5,), metric="accuracy")
    assert "3 of 3 seed(s) of seeing did not learn" in capsys.readouterr().out


def test_a_terminal_that_lacks_characters_shows_their_numbers(tmp_path, compare, monkeypatch):
    model = save_model(tmp_path / "model")
    task = write_rows(tmp_path / "任务.tsv", make_rows(40, 1))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "latin-1"))
    compare(task, model, frozen=True, num_seeds=1)
    assert rb"\u4efb\u52a1: texts of 2 classes" in shown.getvalue()


def test_each_verdict_is_a_sentence_to_repeat():
    assert Difference(0.019, 0.007, 0.03, 0.03, 0.02).sentence == "better by 1.9 (0.7 to 3.0)"
    assert Difference(-0.019, -0.03, -0.007, 0.03, 0.02).sentence == "worse by 1.9 (0.7 to 3.0)"
    assert (
        Difference(0.004, -0.003, 0.01, 0.3, 0.012).sentence
        == "cannot tell: a difference below 1.2 would not reliably show"
    )
    assert "the seeds do not agree" in Difference(0.385, 0.18, 0.59, 0.0625, 0.353).sentence
    assert "fewer than 6 seeds" in Difference(0.1, 0.05, 0.15, 0.25, np.inf).sentence
