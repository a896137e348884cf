"""What is said of a run's scores: the verdict, the trend, the tables."""

import dataclasses
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from mlm.evaluation.loss import Evaluation, compare
from mlm.report.metrics import record, scores
from mlm.report.model_card import make_card
from mlm.report.page import render_run
from mlm.report.wording import (
    closing_words,
    describe_evaluation,
    forgetting,
    ignorance,
    notes,
    score_rows,
    scored_chunks,
    specificity,
    trend,
    verdict,
)
from mlm.training.progress import Progress
from mlm.training.run import Setup


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
        ({"change": -1.0, "change_low": -math.inf, "change_high": math.inf, "perplexity_se": math.inf}, "of one line"),
        ({"change": -900.0, "change_low": -1e6, "change_high": 1e6}, "Cannot tell"),  # wider than a float's exp
    ],
    ids=["diverged", "one line of test text", "a wide interval"],
)
def test_figures_that_are_not_finite_are_said_and_not_shown(finished, figures, word):
    summary = changed(finished, **figures)
    assert word in verdict(summary)
    for shown in (render_run(summary), closing_words(summary)):
        assert not re.search(r"\binf\b", shown)


def test_one_line_of_test_text_shows_no_trend(finished):
    assert trend(changed(finished, trend=-1.0, trend_low=-math.inf, trend_high=math.inf)) == ""


def test_a_model_no_better_than_word_frequencies_is_said_to_be_so(finished):
    """Also where it is better by less than the error of its perplexity."""
    unigram = finished.text.unigram_perplexity
    for perplexity, error, is_said in ((2.0, 0.0, True), (0.9, 0.1, True), (0.5, 0.1, False)):
        summary = changed(finished, perplexity=perplexity * unigram, perplexity_se=error * unigram)
        assert ("Word frequencies alone" in render_run(summary)) == is_said
        without_error = changed(finished, perplexity=perplexity * unigram, perplexity_se=math.inf)
        assert ("Word frequencies alone" in render_run(without_error)) == (perplexity > 1)
    untrained = dataclasses.replace(finished, rows=finished.rows[:1])
    assert untrained.evaluations[0]["perplexity"] > unigram and "Word frequencies alone" not in render_run(untrained)


@pytest.mark.parametrize(
    ("before", "error", "is_said"),
    [
        (1000.0, 10.0, True),
        (1000.0, 60.0, False),  # by less than its error
        (800.0, 0.0, False),
        (1000.0, math.inf, True),
        (math.nan, math.nan, False),
    ],
)
@pytest.mark.parametrize("start", ["a/checkpoint", "scratch:tiny"])
def test_a_checkpoint_that_knows_nothing_of_the_text_is_said_to(finished, start, before, error, is_said):
    """Whatever it is that makes it so. Random weights know nothing by intention."""
    summary = dataclasses.replace(
        finished,
        settings=finished.settings | {"initial_pretrain_model": start},
        text=dataclasses.replace(finished.text, unigram_perplexity=900.0),
        derived=finished.derived | {"vocabulary": 30_000},
        rows=[finished.rows[0] | {"perplexity": before, "perplexity_se": error}, *finished.rows[1:]],
    )
    said = "the start knows nothing of this text: its perplexity, 1,000, is above that of word frequencies alone, 900."
    for shown in (render_run(summary), closing_words(summary)):
        assert (said in shown) == ("knows nothing" in shown) == (is_said and start == "a/checkpoint")
    without_size = dataclasses.replace(summary, derived={})  # as older runs
    assert ("knows nothing" in closing_words(without_size)) == ("knows nothing" in closing_words(summary))


@pytest.mark.parametrize(("before", "is_said"), [(16_000.0, True), (14_000.0, False)])
def test_a_perplexity_near_the_size_of_the_vocabulary_is_a_blind_guess(before, is_said):
    """Also where the words of the test text are so rare in training that their frequencies say as little."""
    said = ignorance(before, 10.0, unigram=40_000.0, vocabulary=30_000)
    assert bool(said) == is_said
    assert not is_said or "above half the size of the vocabulary, 30,000: that of a blind guess" in said


@pytest.mark.parametrize(
    ("change", "low", "high", "said"),
    [
        (-0.2, -0.3, -0.1, "It still fell, by 0.200 since step 7 (95% interval 0.100 to 0.300)"),
        (
            0.2,
            0.1,
            0.3,
            "It was lowest after step 7, and has risen by 0.200 since (95% interval 0.100 to 0.300); best/",
        ),
        (-0.2, -0.5, 0.1, "Cannot tell whether it still falls: since step 7 it changed by -0.200"),
        (0.2, -0.1, 0.5, "Cannot tell whether it still falls: since step 7 it changed by +0.200"),
        (0.0, -0.005, 0.005, "It no longer fell since step 7 (95% interval -0.005 to +0.005): more epochs"),
    ],
)
def test_the_trend_follows_the_interval_of_the_change_since_the_best(finished, change, low, high, said):
    figures = {"best_step": 7.0, "trend": change, "trend_low": low, "trend_high": high}
    assert trend(changed(finished, **figures)).startswith(said)
    baseline = finished.evaluations[0]
    assert trend(dataclasses.replace(finished, rows=[baseline])) == ""


@pytest.mark.parametrize(
    ("of_run", "said"),
    [
        ({}, "It still fell, by 0.200 since step 7 (95% interval 0.100 to 0.300): more epochs may lower it further."),
        ({"schedule": "constant"}, "further, by --resume --run_name whole and a larger --max_steps."),
        ({"schedule": "constant", "num_epochs": 2, "max_steps": 24}, "--run_name whole and a larger --num_epochs."),
        ({"schedule": "constant", "max_steps": 60}, "(95% interval 0.100 to 0.300), while the learning rate fell."),
    ],
)
def test_a_loss_that_still_falls_says_how_to_train_on(finished, of_run, said):
    """Not where evaluations before the cool-down saw no gain: the falling rate alone lowers the loss."""
    settings = finished.settings | {"early_stop_evals": 3} | of_run
    figures = {"best_step": 7.0, "trend": -0.2, "trend_low": -0.3, "trend_high": -0.1}
    summary = changed(dataclasses.replace(finished, settings=settings, cooldown_from=23), **figures)
    summary.steps = min(26, settings["max_steps"])
    assert trend(summary).endswith(said)
    stopped = "Stopped early: 3 evaluation(s) in a row, up to step 23, saw no sure gain, so 26 of 60 planned steps"
    for shown in (render_run(summary), closing_words(summary)):
        assert (stopped in shown) == ("Stopped early" in shown) == (settings["max_steps"] == 60)


def test_a_last_evaluation_just_behind_the_best_does_not_say_that_nothing_falls(finished):
    last, every = finished.evaluations[-1]["step"], finished.settings["eval_every"]
    figures = {"trend": 0.0, "trend_low": -0.005, "trend_high": 0.005}
    assert trend(changed(finished, **figures, best_step=last - every)).startswith("It no longer fell")
    assert trend(changed(finished, **figures, best_step=last - 1)) == ""


@pytest.mark.parametrize(("fall", "sample"), [(0.002, 256), (0.02, 256), (0.0, 256), (0.0, 4000)])
def test_of_simulated_runs_few_are_told_what_is_not_so(finished, fall, sample):
    """200 runs of ten evaluations whose true loss falls by so much between them, or not at all: a sample of the lines
    is scored, but in the end all 20,000. A rise is said of at most 2.5%, and so is a fall where there is none."""
    draw = np.random.default_rng(sample)
    setup = Setup(cast(Any, None), cast(Any, SimpleNamespace(epochs=float)), Path(), None, {}, {}, "")
    accelerator = cast(Any, SimpleNamespace(is_main_process=False, log=lambda *_, **__: None))
    ones, lines = np.ones(20_000), np.arange(20_000)
    said = []
    for _ in range(200):
        hardness, progress = draw.normal(3.0, 1.0, 20_000), Progress()
        for step in range(11):
            losses = hardness - fall * step + draw.normal(0.0, 0.3, 20_000)
            evaluation = Evaluation(losses, ones, ones, lines).first(20_000 if step in (0, 10) else sample)
            progress.step = step
            progress.baseline = progress.baseline or evaluation
            change = compare(progress.baseline, evaluation) if step else None
            record(scores(evaluation, change, progress), progress, setup, accelerator)
            if step and (not progress.best or evaluation.first(sample).loss < progress.best.loss):
                progress.best, progress.best_step = evaluation.first(sample), step
        said.append(trend(dataclasses.replace(finished, rows=progress.metrics)))
        assert "best/ holds" not in said[-1] or f"after step {progress.best_step}," in said[-1]
    assert sum("has risen" in sentence for sentence in said) <= 5
    if not fall:
        assert sum("still fell" in sentence for sentence in said) <= 5


FORGOTTEN = "that much was forgotten"


@pytest.mark.parametrize(
    ("change", "low", "high", "said"),
    [
        (0.2, 0.1, 0.3, f"On general text the loss rose by 0.200 nats (95% interval 0.100 to 0.300): {FORGOTTEN}."),
        (-0.2, -0.3, -0.1, "On general text the loss fell by 0.200 nats (95% interval 0.100 to 0.300)."),
        (
            0.1,
            -0.1,
            0.3,
            "cannot be told: on general text the loss changed by +0.100 nats (95% interval -0.100 to +0.3",
        ),
        (0.0, 0.0, 0.0, "cannot be told: on general text the loss changed by +0.000"),
        (0.2, -math.inf, math.inf, "cannot be told: the general text that was scored is one line."),
        (math.nan, math.nan, math.nan, ""),  # the verdict says that it diverged
    ],
)
def test_forgetting_follows_the_interval_and_is_said_on_screen_page_and_card(finished, change, low, high, said):
    of_general = {"general_loss": 3.0, "general_loss_se": 0.1, "general_perplexity": 20.0, "general_test_chunks": 9.0}
    rows = [row | of_general if "eval_loss" in row else row for row in finished.rows]
    summary = dataclasses.replace(finished, rows=rows)
    summary = changed(summary, general_change=change, general_change_low=low, general_change_high=high)
    sentence = forgetting(summary)
    assert said in sentence and (FORGOTTEN in sentence) == (low > 0) and bool(said) == bool(sentence)
    for shown in (closing_words(summary), render_run(summary), make_card(summary, []).text):
        assert sentence in shown
    assert score_rows(summary)[-1] == ("general perplexity", "20.00 ± 2.00", "20.00 ± 2.00", "")
    assert scored_chunks(summary).endswith("; the general perplexity on those of 9 chunks of general text")


def test_nothing_is_said_of_general_text_where_there_is_none(finished):
    assert forgetting(finished) == ""
    for shown in (closing_words(finished), make_card(finished, []).text):
        assert "general" not in shown


@pytest.mark.parametrize(
    ("domain", "general", "said"),  # each with its loss and standard error; the difference's is 0.5
    [
        ((5.0, 0.3), (4.01, 0.4), "Domain specificity: +0.990 ± 0.500 nats. To the starting model this text is harder"),
        ((4.0, 0.3), (4.99, 0.4), "Domain specificity: -0.990 ± 0.500 nats. To the starting model this text is easier"),
        ((5.0, 0.3), (4.03, 0.4), ""),  # 0.97 is less than 1.96 standard errors
        ((5.0, 0.3), (5.97, 0.4), ""),
        ((5.0, math.inf), (1.0, 0.4), ""),
        ((math.nan, math.nan), (4.0, 0.4), ""),
    ],
)
def test_a_domain_is_said_to_be_special_where_that_is_sure(finished, domain, general, said):
    assert specificity(*domain, *general).startswith(said) and bool(said) == bool(specificity(*domain, *general))
    figures = {"eval_loss": domain[0], "eval_loss_se": domain[1]}
    figures |= {"general_loss": general[0], "general_loss_se": general[1], "general_perplexity": 1.0}
    first = finished.rows[0] | figures
    for start, is_said in (("bert-base-uncased", True), ("scratch:tiny", False)):  # random weights know neither text
        summary = dataclasses.replace(
            finished,
            settings=finished.settings | {"initial_pretrain_model": start},
            rows=[first, *finished.rows[1:]],
        )
        assert any(note.startswith("Domain specificity") for note in notes(summary)) == bool(is_said and said)


def evaluation_of(losses, masked=4.0) -> Evaluation:
    """Of lines of one chunk each, with so many masked tokens."""
    losses = np.array(losses)
    return Evaluation(masked * losses, 0 * losses, masked + 0 * losses, np.arange(len(losses), dtype=np.uint64))


@pytest.mark.parametrize("scratch_size", [None, "tiny"])
def test_the_line_of_the_first_evaluation_says_how_special_the_domain_is(finished, scratch_size):
    """By hand: losses of 5.0 and 7.0 have a mean of 6.0 and a standard error of 1.0; 2.0 and 2.2 of 2.1 and 0.1."""
    setup = cast(Setup, SimpleNamespace(config=SimpleNamespace(scratch_size=scratch_size), plan=None))
    corpus = cast(Any, SimpleNamespace(test=[0, 0], stats=finished.text, vocabulary=SimpleNamespace(size=10**6)))
    domain, general = evaluation_of([5.0, 7.0]), evaluation_of([2.0, 2.2])
    first, *others = describe_evaluation(setup, corpus, 0, domain, None, general).splitlines()
    assert first.endswith("; general text: perplexity 8.17 ± 0.82")
    special = [line for line in others if line.startswith("Domain specificity: +3.900 ± 1.005 nats.")]
    assert len(special) == (scratch_size is None)
    assert "general" not in describe_evaluation(setup, corpus, 0, domain, None, None)


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
