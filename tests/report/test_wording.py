"""What is said of a run's scores: the verdict, the trend, the tables."""

import dataclasses
import math
import re

import pytest

from mlm.report.page import render_run
from mlm.report.wording import closing_words, score_rows, trend, verdict


def changed(summary, **rows):
    """The summary with other figures in its last evaluation."""
    last = summary.evaluations[-1] | rows
    return dataclasses.replace(summary, rows=[*summary.rows[:-1], last])


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(-1.2, -0.8, "Better"), (0.1, 0.3, "Worse"), (-0.1, 0.2, "Cannot tell"), (0.0, 0.0, "Equal")],
)
def test_verdicts_follow_the_interval(finished, low, high, word):
    summary = changed(finished, change=(low + high) / 2, change_low=low, change_high=high)
    assert verdict(summary).startswith(f"{word}:")
    assert f"<strong>{word}:</strong>" in render_run(summary)
    assert verdict(summary) in closing_words(summary)


def test_a_verdict_has_the_change_and_its_interval(finished):
    better = changed(finished, change=-1.0, change_low=-1.2, change_high=-0.8)
    assert "fell by 1.000 nats per masked token (95% interval 0.800 to 1.200)" in verdict(better)


@pytest.mark.parametrize(
    ("figures", "word"),
    [
        ({"change": math.nan, "change_low": math.nan, "change_high": math.nan, "perplexity": math.nan}, "not finite"),
        ({"change": -1.0, "change_low": -math.inf, "change_high": math.inf, "perplexity_se": math.inf}, "one line"),
        ({"change": -900.0, "change_low": -1e6, "change_high": 1e6}, "Cannot tell"),  # wider than a float's exp
    ],
    ids=["diverged", "one line of test text", "a wide interval"],
)
def test_figures_that_are_not_finite_are_said_and_not_shown(finished, figures, word):
    summary = changed(finished, **figures)
    assert word in verdict(summary)
    for shown in (render_run(summary), closing_words(summary)):
        assert not re.search(r"\binf\b", shown)


def test_one_chunk_of_test_text_shows_no_trend(finished):
    assert trend(changed(finished, change=-1.0, change_low=-math.inf, change_high=math.inf)) == ""


def test_a_model_no_better_than_word_frequencies_is_said_to_be_so(finished):
    """Also where it is better by less than the error of its perplexity."""
    unigram = finished.text.unigram_perplexity
    for perplexity, error, is_said in ((2.0, 0.0, True), (0.9, 0.1, True), (0.5, 0.1, False)):
        summary = changed(finished, perplexity=perplexity * unigram, perplexity_se=error * unigram)
        assert ("Word frequencies alone" in render_run(summary)) == is_said


def test_the_trend_says_whether_more_training_helps(finished):
    baseline, *_ = finished.evaluations
    cases = {"still fell, by 0.200": (-1.0, -1.2), "risen by 0.200": (-1.2, -1.0), "no longer": (-1.0, -1.005)}
    for word, changes in cases.items():
        rows = [baseline] + [
            baseline | {"step": 10.0 * i, "change": c, "change_low": c - 0.1} for i, c in enumerate(changes, start=1)
        ]
        assert word in trend(dataclasses.replace(finished, rows=rows))
    assert trend(dataclasses.replace(finished, rows=[baseline])) == ""


def test_before_the_first_evaluation_in_training_nothing_is_compared(finished):
    untrained = dataclasses.replace(finished, rows=finished.rows[:1])
    assert finished.has_trained and not untrained.has_trained
    assert verdict(untrained).startswith("Not evaluated yet since training began")
    words, page = closing_words(untrained), render_run(untrained)
    assert "before" not in words and "divided" not in words and "The model:" not in words
    assert "<th>before</th>" not in page and "<th>score</th>" in page


def test_the_table_in_the_log_has_every_score_under_its_heading(finished):
    heading, *lines = closing_words(finished).splitlines()
    rows = score_rows(finished)
    for line, (name, before, after, _) in zip(lines, rows, strict=False):
        assert line.startswith(name)
        assert line[: heading.index("before") + len("before")].endswith(before)
        assert line[: heading.index("after") + len("after")].endswith(after)
