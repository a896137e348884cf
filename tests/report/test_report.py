"""What a run leaves for people: the page, its pictures, the model card, predictions, and the words that are guessed."""

import csv
import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from huggingface_hub import ModelCard
from runs import ROOT, evaluation_of, run
from transformers import AutoModelForMaskedLM, AutoTokenizer

from mlm.data.chunks import Chunks
from mlm.data.masking import BERT_RULE, content_keys, mask
from mlm.data.tokenizer import learn_tokenizer, read_vocabulary
from mlm.errors import UserError
from mlm.evaluation.hidden_words import HIDDEN_WORDS, Guess, hide_words
from mlm.evaluation.loss import save_evaluation
from mlm.report import page as report
from mlm.report.model_card import language_of, make_card
from mlm.report.page import page_of, page_of_several
from mlm.report.plots import MOST_POINTS, Curve, Point, Reference, bars, chart
from mlm.report.summary import SCORES, GuessedWord, read_summary
from mlm.report.wording import trend, verdict

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and collects what a test asks about."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.alts, self.addresses, self.text = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag == "svg" and given.get("role") == "img":
            self.alts.append(given["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass  # <line/> and the like close themselves

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def finished(module_settings):
    """The summary of a finished run."""
    return read_summary(run(module_settings(run_name="finished", max_steps=12)))


def changed(summary, **rows):
    """The summary with other figures in its last evaluation."""
    last = summary.evaluations[-1] | rows
    return dataclasses.replace(summary, rows=[*summary.rows[:-1], last])


# ------------------------------------------------------------------------------------------------------------- the page


def test_a_run_leaves_a_page_in_one_file_with_the_answer_first(finished):
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert page == page_of(finished)  # what the folder tells is all it takes
    parsed = Page(page)
    text = " ".join(" ".join(parsed.text).split())
    answer = verdict(finished)
    assert 0 < text.index(answer.partition(":")[2].strip()) < text.index("before") < text.index("How it went")
    assert parsed.addresses == [] and "http" not in page.replace("http-equiv", "") and "<script" not in page
    assert len(parsed.alts) == 5 and all(len(alt) > 20 for alt in parsed.alts)
    for word in (finished.command, "masked accuracy", "unigram perplexity", "prefers-color-scheme: dark"):
        assert word in page, word
    for guessed in finished.guesses:
        assert f"<mark>{guessed.word}</mark>" in page
    assert "refresh" not in page
    assert 'http-equiv="refresh"' in page_of(dataclasses.replace(finished, state="running"))


def test_text_of_the_user_is_shown_as_text(finished):
    evil = "<script>alert('[MASK]')</script> & \"quotes\""
    guess = [Guess("<b>x</b>", 0.5)]
    page = page_of(dataclasses.replace(finished, guesses=[GuessedWord(evil, "<i>", guess, guess)], command="<u>"))
    assert "<script" not in page and "<b>x" not in page and "<i>" not in page and "<u>" not in page
    Page(page)


def test_right_guesses_and_changed_ones_are_marked(finished):
    after = [Guess("pressure", 0.9), Guess("a", 0.001)]
    guessed = GuessedWord("blood [MASK] rose", "Pressure", [Guess("the", 0.2)], after)
    page = page_of(dataclasses.replace(finished, guesses=[guessed]))
    [card] = re.findall(r'<div class="card">\s*<p>blood.*?</div>', page, re.S)
    assert card.count('class="right"') == 1 and "✓ pressure" in card and "→ after" in card and "&lt;1%" in card


def test_verdicts_follow_the_interval(finished):
    cases = ((-1.2, -0.8, "Better"), (0.1, 0.3, "Worse"), (-0.1, 0.2, "Cannot tell"), (0.0, 0.0, "Equal"))
    for low, high, word in cases:
        summary = changed(finished, change=(low + high) / 2, change_low=low, change_high=high)
        assert verdict(summary).startswith(word)
        assert f"<strong>{word}:</strong>" in page_of(summary)
    assert "fell by 1.000 nats per masked token (95% interval 0.800 to 1.200)" in verdict(
        changed(finished, change=-1.0, change_low=-1.2, change_high=-0.8)
    )


def test_what_is_not_finite_is_said_and_not_shown(finished):
    """A diverged run, one chunk of test text, and intervals too wide for a float."""
    diverged = changed(finished, change=math.nan, change_low=math.nan, change_high=math.nan, perplexity=math.nan)
    one = changed(finished, change=-1.0, change_low=-math.inf, change_high=math.inf, perplexity_se=math.inf)
    wide = changed(finished, change=-900.0, change_low=-1e6, change_high=1e6)
    for summary, word in ((diverged, "not finite"), (one, "one chunk"), (wide, "Cannot tell")):
        assert word in verdict(summary)
        page = page_of(summary)
        assert not re.search(r"\binf\b", page) and trend(one) == ""
        Page(page)


def test_a_model_no_better_than_word_frequencies_is_said_to_be_so(finished):
    """Also where it is better by less than the error of its perplexity."""
    unigram = finished.text.unigram_perplexity
    for perplexity, error, is_said in ((2.0, 0.0, True), (0.9, 0.1, True), (0.5, 0.1, False)):
        summary = changed(finished, perplexity=perplexity * unigram, perplexity_se=error * unigram)
        assert ("Word frequencies alone" in page_of(summary)) == is_said


def test_the_trend_says_whether_more_training_helps(finished):
    start, *_ = finished.evaluations
    cases = {"still fell, by 0.200": (-1.0, -1.2), "risen by 0.200": (-1.2, -1.0), "no longer": (-1.0, -1.005)}
    for word, changes in cases.items():
        rows = [start] + [
            start | {"step": 10.0 * i, "change": c, "change_low": c - 0.1} for i, c in enumerate(changes, start=1)
        ]
        assert word in trend(dataclasses.replace(finished, rows=rows))
    assert trend(dataclasses.replace(finished, rows=[start])) == ""


def test_a_run_of_100_000_steps_has_a_small_page(finished, tmp_path):
    """100,000 steps, a log line each 50, an evaluation each 500."""
    draw = np.random.default_rng(0)
    first, last = finished.evaluations[0], finished.evaluations[-1]
    rows = [first]
    for step in range(50, 100_001, 50):
        row = {"step": step, "epoch": step / 1000, "train_loss": 3 + draw.normal(), "lr": 1e-4 * draw.random()}
        row["tokens_per_s"] = 1000 * draw.random()
        rows.append(row | (last | {"step": step, "perplexity": 20 + 5 * draw.random()} if step % 500 == 0 else {}))
    page = page_of(dataclasses.replace(finished, rows=rows))
    assert len(page.encode()) < 300_000
    Page(page)
    if BROWSER:
        (tmp_path / "report.html").write_text(page, encoding="utf-8")
        draw_in_browser(tmp_path / "report.html", "--screenshot=" + str(tmp_path / "page.png"))
        assert (tmp_path / "page.png").stat().st_size > 10_000


def draw_in_browser(page, *options):
    """What a browser without a window writes of a page."""
    usual = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", *options]
    command = [BROWSER, *usual, f"file://{page}"]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no browser is installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_and_nothing_sticks_out(finished, tmp_path, width):
    """Inside a frame of the width of a phone or a screen, as windows have a least width of their own."""
    page = page_of(finished).replace("default-src 'none'; style-src 'unsafe-inline'", "")
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    (tmp_path / "inner.html").write_text(page.replace("</main>", "</main>" + measure), encoding="utf-8")
    ask = "document.body.append('width ' + this.contentDocument.title)"
    frame = f'<iframe src="inner.html" style="border:0; width:{width}px; height:900px" onload="{ask}"></iframe>'
    (tmp_path / "outer.html").write_text(f"<body>{frame}", encoding="utf-8")
    shown = draw_in_browser(tmp_path / "outer.html", "--virtual-time-budget=3000", "--dump-dom")
    [found] = re.findall(r"width (\d+) of (\d+)", shown)
    assert int(found[0]) <= int(found[1]) == width


# ------------------------------------------------------------------------------------------------------------- pictures


def test_a_chart_keeps_the_ends_the_order_and_few_points():
    points = [Point(step, 100 / (1 + step), 0.5) for step in range(5000)]
    drawn = chart("t", "a", [Curve("c", "one", points, dots=True)], [Reference("r", "two", 50.0)], logarithmic=True)
    places = [tuple(map(float, place.split())) for place in drawn.curves[0].path[1:].split("L")]
    assert len(places) <= MOST_POINTS and [x for x, _ in places] == sorted(x for x, _ in places)
    ys = [y for _, y in places]
    assert ys == sorted(ys)  # downwards in the picture, as the values fall
    ticks = [float(label.replace(",", "")) for _, label in drawn.y_ticks]
    assert len(ticks) >= 3 and ticks == sorted(ticks)
    middle = drawn.references[0][2]
    assert min(ys) < middle < max(ys)
    for _, y, upper, lower, _ in drawn.curves[0].dots[1:-1]:
        assert upper < y < lower  # downwards in the picture


def test_ticks_say_where_they_are():
    """Each label is the value of its place, none twice, whole steps below."""
    for last, high in ((12, 0.0204), (7, 0.5), (3040, 33_000.0), (1, 3e-5)):
        points = [Point(0, 0.0), Point(last, high)]
        drawn = chart("t", "a", [Curve("c", "one", points)], label="{:.3g}".format)
        (x0, y0), (x1, y1) = (map(float, place.split()) for place in drawn.curves[0].path[1:].split("L"))
        for x, label in drawn.x_ticks:
            assert x == pytest.approx(x0 + (x1 - x0) * int(label.replace(",", "")) / last, abs=0.1)
        for y, label in drawn.y_ticks:
            assert y == pytest.approx(y0 + (y1 - y0) * float(label) / high, abs=0.1)
        assert len(set(drawn.y_ticks)) == len({label for _, label in drawn.y_ticks}) >= 3


def test_a_chart_takes_what_runs_bring():
    """Nothing, one point, equal values, values that are not finite, zero on a logarithmic axis."""
    assert chart("t", "a", [Curve("c", "one", [])]) is None
    for values in ([3.0], [2.0, 2.0], [0.0, 0.0], [math.nan, 1.0, math.inf], [1e-9, 1e300]):
        for logarithmic in (False, True):
            points = [Point(step, value, math.inf) for step, value in enumerate(values)]
            drawn = chart("t", "a", [Curve("c", "one", points, dots=True)], logarithmic=logarithmic)
            if drawn:
                numbers = re.findall(r"[-\d.]+|nan|inf", drawn.curves[0].path)
                assert all(math.isfinite(float(number)) for number in numbers)
    assert [bar.number for bar in bars([("1", 0), ("2", 4), ("over 2", 2)])] == [0, 4, 2]
    low, high, half = bars([("1", 0), ("2", 4), ("over 2", 2)])
    assert low.height == 0 and half.height == pytest.approx(high.height / 2)


# --------------------------------------------------------------------------------------------------------- several runs


def test_several_runs_are_compared_in_pairs_where_they_can_be(finished, tmp_path, monkeypatch, capsys):
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder in folders:
        shutil.copytree(finished.folder, folder)
    better = report.load_evaluation(folders[0] / SCORES)
    save_evaluation(folders[1] / SCORES, better._replace(losses=better.losses - 0.5 * better.masked))
    save_evaluation(folders[2] / SCORES, evaluation_of(1.0))  # of another text
    other = json.loads((folders[3] / "summary.json").read_text())
    other["text"]["test"]["characters"] += 1  # as many masked tokens in each chunk, but of another text
    (folders[3] / "summary.json").write_text(json.dumps(other))
    monkeypatch.setattr("sys.argv", ["report", *map(str, folders)])
    report.main()
    path = tmp_path / "report-of-4-runs.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text(encoding="utf-8")
    Page(page)
    assert "the test loss is lower by 0.500 nats per masked token (95% interval 0.500 to 0.500)" in page
    assert page.count("another test text, tokenizer or sen_max_length") == 2
    assert page == page_of_several([read_summary(folder) for folder in folders])


def test_a_folder_that_is_no_runs_is_said_plainly(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not the folder of a run"):
        read_summary(tmp_path)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        read_summary(tmp_path / "nowhere")
    monkeypatch.setattr("sys.argv", ["report"])
    with pytest.raises(UserError, match="name one run's folder or up to 4"):
        report.main()


def test_results_on_tasks_and_general_text_are_shown(finished, tmp_path):
    folder = tmp_path / finished.folder.name
    shutil.copytree(finished.folder, folder)
    task = tmp_path / "downstream" / "titles-1f"
    task.mkdir(parents=True)
    head = "examples_per_class,model,compared_with,metric,sentence\n"
    lines = [
        f"20,output/{folder.name}/final,old,accuracy,better by 23.5\n",
        "20,output/other/final,old,accuracy,worse\n",
    ]
    (task / "comparison.csv").write_text(head + "".join(lines))
    (task / "general_text.csv").write_text(f"model,perplexity\nold,10.5\noutput/{folder.name}/final,12.25\n")
    report.redraw(folder)
    report.redraw(tmp_path)  # which is no run's
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "better by 23.5" in page and "worse" not in page and "old 10.50" in page and "final 12.25" in page


# --------------------------------------------------------------------------------------------- card, predictions, words


def test_the_model_card_says_what_the_run_measured_and_quotes_no_text(finished, tmp_path):
    card = ModelCard.load(finished.folder / "final" / "README.md")
    assert (card.data.pipeline_tag, card.data.library_name) == ("fill-mask", "transformers")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    last = finished.evaluations[-1]
    assert measured["perplexity"] == pytest.approx(last["perplexity"], abs=1e-4)
    assert measured["accuracy"] == pytest.approx(last["masked_accuracy"], abs=1e-4)
    for heading in ("## Scores", "## Data", "## Training", "## How to load", "## Limits"):
        assert heading in card.text
    assert verdict(finished) in card.text and str(tmp_path.parent) not in card.content
    for guessed in finished.guesses:
        assert guessed.line.partition("[MASK]")[0][:20] not in card.text or len(guessed.line) < 20
    settings = finished.settings | {"initial_pretrain_model": "bert-base-uncased"}
    hub = make_card(dataclasses.replace(finished, settings=settings), ["the text of the day is here"])
    assert (hub.data.base_model, hub.data.language) == ("bert-base-uncased", "en")
    assert ModelCard(str(hub)).data.to_dict() == hub.data.to_dict()
    settings = finished.settings | {"initial_pretrain_model": str(tmp_path)}
    local = make_card(dataclasses.replace(finished, settings=settings), [])
    assert local.data.base_model is None and "from a local checkpoint" in local.text
    assert str(tmp_path) not in local.content  # a path is nobody else's business


def test_the_language_is_told_where_it_is_known():
    assert language_of(["患者服用二甲双胍治疗糖尿病 500mg"]) == "zh"
    assert language_of(["The patient was given insulin and then was followed up by the doctors"]) == "en"
    assert language_of(["Der Patient erhielt Insulin und wurde danach beobachtet", "12 345"]) is None
    assert language_of([]) is None


def test_predictions_differ_from_the_line_at_masks_alone_and_are_the_models(finished, tmp_path):
    with open(finished.folder / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["src", "mask", "pred"] and len(rows) > 10
    test_lines = (finished.folder.parent.parent / "text" / "test.txt").read_text(encoding="utf-8").splitlines()
    tokenizer = AutoTokenizer.from_pretrained(finished.folder / "final")
    model = AutoModelForMaskedLM.from_pretrained(finished.folder / "final").eval()
    vocabulary = read_vocabulary(tokenizer)
    for row in rows:
        assert row["src"] in test_lines
        encoded = tokenizer(row["src"], add_special_tokens=False, return_offsets_mapping=True)
        tokens, lengths = np.array(encoded["input_ids"]), np.array([len(encoded["input_ids"])])
        _, hidden, _ = mask(tokens, lengths, content_keys(tokens, lengths), vocabulary, BERT_RULE)
        assert row["mask"].count("[MASK]") == len(hidden)  # those that an evaluation hides
        assert row["mask"].index("[MASK]") == encoded["offset_mapping"][hidden[0]][0]
        kept = re.split(r"\[MASK\]", row["mask"])
        assert re.fullmatch(".+".join(map(re.escape, kept)), row["src"])
        assert re.fullmatch(".+".join(map(re.escape, kept)), row["pred"])
    alone = next(row for row in rows if row["mask"].count("[MASK]") == 1)
    inputs = tokenizer(alone["mask"], return_tensors="pt")
    place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    likeliest = tokenizer.convert_ids_to_tokens(model(**inputs).logits[0, place].argmax().item()).removeprefix("##")
    assert alone["pred"] == alone["mask"].replace("[MASK]", likeliest)


def test_hidden_words_are_content_words_that_a_neighbour_foretells():
    lines = [
        f"the nurse measured blood pressure of the {kind} patient and then of the other" for kind in ("first", "second")
    ]
    lines += ["the doctor wrote kidney disease on the form and then on the other form"]
    train = lines * 20
    tokenizer = learn_tokenizer(lambda: iter(train), 300)
    vocabulary = read_vocabulary(tokenizer)
    encoded = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in train]
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])])
    chunks = Chunks(np.concatenate(encoded).astype(np.uint16), offsets)
    hidden = hide_words(iter([*lines, "too short", *lines]), chunks, tokenizer, vocabulary)
    words = [word for _, word in hidden]
    assert words == list(dict.fromkeys(words)) and 1 <= len(words) <= HIDDEN_WORDS
    assert not {"the", "then", "other", "form"} & set(words)
    assert all(line.replace("[MASK]", word) in lines for line, word in hidden)
    assert hide_words(iter([]), chunks, tokenizer, vocabulary) == []


def test_pictures_are_made_where_a_notebook_names_its_own_way_to_show_them():
    """`!python train.py` in a notebook inherits it, and may run in an environment that lacks it."""
    environment = os.environ | {"MPLBACKEND": "no_such_backend"}
    subprocess.run([sys.executable, "-c", "import mlm.charts, mlm.picture"], cwd=ROOT, env=environment, check=True)
