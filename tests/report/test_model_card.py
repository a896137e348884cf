"""The model card: what the run measured, in the form that the Hub takes, and no word of the user's text or paths."""

import dataclasses

import pytest
from huggingface_hub import ModelCard

from mlm.report.model_card import language_of, make_card
from mlm.report.wording import verdict


@pytest.fixture
def card(finished):
    return ModelCard.load(finished.folder / "final" / "README.md")


def card_of_base_model(finished, base_model, lines=()):
    settings = finished.settings | {"initial_pretrain_model": str(base_model)}
    return make_card(dataclasses.replace(finished, settings=settings), lines)


def test_the_card_has_the_scores_that_the_run_measured(finished, card):
    assert (card.data.pipeline_tag, card.data.library_name) == ("fill-mask", "transformers")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    last = finished.evaluations[-1]
    assert measured["perplexity"] == pytest.approx(last["perplexity"], abs=1e-4)
    assert measured["accuracy"] == pytest.approx(last["masked_accuracy"], abs=1e-4)
    assert verdict(finished) in card.text
    for heading in ("## Scores", "## Data", "## Training", "## How to load", "## Limits"):
        assert heading in card.text


def test_the_card_says_what_was_done(finished):
    """Not what the text holds: the chunks that were scored, how much of the training text was seen, from what."""
    last = finished.evaluations[-1] | {"test_chunks": 9.0, "epoch": 0.125}
    short = dataclasses.replace(finished, rows=[*finished.rows[:-1], last], skipped_steps=3)
    text = make_card(short, []).text
    assert f"On masked tokens of 9 of {finished.text.test.chunks} chunks" in text
    assert f"Trained on 12.5% of the chunks of {finished.text.train.lines} lines" in text
    assert "steps (3 of them skipped, as their loss or gradient was not finite) of 16 chunks" in text
    many = dataclasses.replace(finished, settings=finished.settings | {"batch_size": 10**6})
    assert f"steps of {finished.text.train.chunks} chunks" in make_card(many, []).text
    whole = dataclasses.replace(finished, rows=[*finished.rows[:-1], last | {"epoch": 2.5}])
    assert "Trained for 2.5 epochs of" in make_card(whole, []).text and "skipped" not in make_card(whole, []).text
    replaying = dataclasses.replace(finished, derived=finished.derived | {"general_chunks_per_step": 4})
    assert "of 12 chunks and 4 of general text, of at most 32 positions" in make_card(replaying, []).text
    falling = dataclasses.replace(finished, settings=finished.settings | {"mlm_probability_end": 0.1})
    assert "Masking: 15% of the\ntokens;" in text
    assert "Masking: 15% in the first step, linearly to 10% in the last, of the\ntokens;" in make_card(falling, []).text
    assert "pre-training was begun from random weights on text" in card_of_base_model(finished, "scratch:tiny").text
    assert "continued from bert-base-uncased" in card_of_base_model(finished, "bert-base-uncased").text


def test_the_card_of_a_constant_rate_says_where_it_fell_and_why_so_early(finished):
    linear = make_card(finished, []).text
    assert "26 steps of 16 chunks" in linear and "steps and linear decay, 1 x cpu" in linear and "early" not in linear
    settings = finished.settings | {"schedule": "constant", "early_stop_evals": 3, "max_steps": 60}
    text = make_card(dataclasses.replace(finished, settings=settings, cooldown_from=23), []).text
    assert "26 steps of 16 chunks" in text and "steps, constant until step 23, and linear decay from there" in text
    assert "Stopped early: 3 evaluation(s) in a row, up to step 23, saw no sure gain, so 26 of 60 planned" in text


def test_the_card_quotes_no_text(finished, card):
    starts = [guessed.line.partition("[MASK]")[0][:20] for guessed in finished.guesses if len(guessed.line) >= 20]
    assert any(starts)
    assert not any(start in card.text for start in starts if start)


def test_the_card_names_no_path(finished, card, tmp_path):
    """A path is nobody else's business."""
    assert str(finished.folder.parent) not in card.content
    local = card_of_base_model(finished, tmp_path)
    assert local.data.base_model is None and "from a local checkpoint" in local.text
    assert str(tmp_path) not in local.content


def test_the_hub_is_told_base_model_and_language(finished):
    card = card_of_base_model(finished, "bert-base-uncased", ["the text of the day is here"])
    assert (card.data.base_model, card.data.language) == ("bert-base-uncased", "en")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_the_language_is_told_where_it_is_known():
    assert language_of(["患者服用二甲双胍治疗糖尿病 500mg"]) == "zh"
    assert language_of(["The patient was given insulin and then was followed up by the doctors"]) == "en"
    assert language_of(["Der Patient erhielt Insulin und wurde danach beobachtet", "12 345"]) is None
    assert language_of([]) is None
