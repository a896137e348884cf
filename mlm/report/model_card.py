"""final/README.md: the model card that the Hugging Face Hub shows, in figures that the run has measured."""

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from mlm.data.words import HAN_CHARACTER
from mlm.report.summary import Summary
from mlm.report.wording import early_stop, forgetting, score_rows, scored_chunks, verdict
from mlm.terminal import render

READ_LINES = 500  # to tell the language by
HAN_SHARE = 0.3  # of the letters: Chinese
STOP_WORD_SHARE = 0.2  # of the words: English


def make_card(run: Summary, lines: Iterable[str]) -> ModelCard:
    """Returns the card of a finished run, which quotes no text.

    lines: of the test text, to tell its language by.
    """
    base_model, last = run.settings["initial_pretrain_model"], run.evaluations[-1]
    is_of_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base_model) and not Path(base_model).exists()
    language, name = language_of(lines), run.folder.name
    family = run.derived.get("family", "bert")  # early runs do not say, and were of none else
    data = ModelCardData(
        language=language,
        base_model=base_model if is_of_hub else None,
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=[family, "masked-language-modeling", "domain-adaptation"],
        model_name=name,
        eval_results=[
            EvalResult("fill-mask", "text", "the run's own test text", metric, round(last[column], 4))
            for metric, column in (("perplexity", "perplexity"), ("accuracy", "masked_accuracy"))
        ],
    )
    body = render(
        "report/templates/card.md",
        run=run,
        name=name,
        base_model=base_model if is_of_hub else "a local checkpoint",
        family=family,
        is_scratch=base_model.startswith("scratch:"),
        language={"zh": "Chinese", "en": "English"}.get(language or "", "not determined"),
        scores=score_rows(run),
        scored_chunks=scored_chunks(run),
        verdict=verdict(run),
        forgetting=forgetting(run),
        replayed=run.derived.get("general_chunks_per_step", 0),
        early_stop=early_stop(run),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def language_of(lines: Iterable[str]) -> str | None:
    """Returns zh or en, by the letters and the words of some lines; None for what is neither."""
    text = "\n".join(islice(lines, READ_LINES)).lower()
    letters = [character for character in text if character.isalpha()]
    if sum(bool(HAN_CHARACTER.match(letter)) for letter in letters) > HAN_SHARE * len(letters):
        return "zh"
    words = re.findall(r"[^\W\d_]+", text)
    return "en" if sum(word in ENGLISH_STOP_WORDS for word in words) > STOP_WORD_SHARE * len(words) else None
