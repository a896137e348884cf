"""The pages: one file with the verdict first, the user's text as text, small, and nothing sticks out."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from runs import ROOT

from mlm.errors import UserError
from mlm.evaluation.fill_mask import Guess
from mlm.evaluation.loss import load_evaluation, save_evaluation
from mlm.report import __main__ as program
from mlm.report.page import redraw, render_run, render_runs
from mlm.report.summary import SCORES, GuessedWord, read_summary
from mlm.report.wording import verdict
from mlm.storage import lock

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
VOID = {"meta", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that every element is closed in its turn, and collects what a test asks about."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.alts, self.ids, self.addresses, self.text = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        self.ids += [value for name, value in attributes if name == "id"]
        if tag == "svg" and given.get("role") == "img":
            self.alts.append(given["aria-label"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.remove(tag)  # it closes itself

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_drawn_from_the_runs_folder_alone(finished):
    assert (finished.folder / "report.html").read_text(encoding="utf-8") == render_run(finished)


def test_the_page_loads_nothing_and_runs_nothing(finished):
    page = render_run(finished)
    assert Page(page).addresses == [] and "http" not in page.replace("http-equiv", "") and "<script" not in page


def test_the_verdict_comes_first_then_scores_then_curves(finished):
    page = render_run(finished)
    text = " ".join(" ".join(Page(page).text).split())
    sentence = verdict(finished).partition(":")[2].strip()
    assert 0 < text.index(sentence) < text.index("before") < text.index("How it went")
    for word in (finished.command, "masked accuracy", "unigram perplexity"):
        assert word in page, word
    for guessed in finished.guesses:
        assert f"<mark>{guessed.word}</mark>" in page


def test_only_the_page_of_a_run_that_goes_on_reloads(finished):
    assert "refresh" not in render_run(finished)
    assert 'http-equiv="refresh"' in render_run(dataclasses.replace(finished, state="running"))


def test_pictures_are_described_and_share_no_ids(finished):
    page = render_run(finished)
    parsed = Page(page)
    assert len(parsed.alts) == 5 and all(len(alt) > 20 for alt in parsed.alts)
    assert set(Counter(parsed.ids).values()) == {1}
    assert set(re.findall(r'(?:url\(|href=")#(\w+)', page)) <= {*parsed.ids}


def test_pictures_have_the_pages_colours_in_light_and_dark(finished):
    page = render_run(finished)
    style, _, body = page.partition("</style>")
    light, dark = re.findall(r":root \{(.*?)\}", style.partition("@media print")[0], re.S)
    used = set(re.findall(r"var\((--\w+)\)", body))
    assert len(used) >= 5 and not re.search("(fill|stroke): #", body)
    for scheme in (light, dark):
        assert used <= set(re.findall(r"--\w+", scheme))


def test_text_of_the_user_is_shown_as_text(finished):
    evil = "<script>alert('[MASK]')</script> & \"quotes\""
    guess = [Guess("<b>x</b>", 0.5)]
    page = render_run(dataclasses.replace(finished, guesses=[GuessedWord(evil, "<i>", guess, guess)], command="<u>"))
    assert "<script" not in page and "<b>x" not in page and "<i>" not in page and "<u>" not in page
    Page(page)


def test_right_guesses_and_changed_ones_are_marked(finished):
    after = [Guess("pressure", 0.9), Guess("a", 0.001)]
    guessed = GuessedWord("blood [MASK] rose", "Pressure", [Guess("the", 0.2)], after)
    page = render_run(dataclasses.replace(finished, guesses=[guessed]))
    [card] = re.findall(r'<div class="card">\s*<p>blood.*?</div>', page, re.S)
    assert card.count('class="right"') == 1 and "✓ pressure" in card and "→ after" in card and "&lt;1%" in card


def test_a_run_of_100_000_steps_has_a_small_page(finished, tmp_path):
    """100,000 steps, a log line each 50, an evaluation each 500."""
    draw = np.random.default_rng(0)
    first, last = finished.evaluations[0], finished.evaluations[-1]
    rows = [first]
    for step in range(50, 100_001, 50):
        row = {"step": step, "epoch": step / 1000, "train_loss": 3 + draw.normal(), "lr": 1e-4 * draw.random()}
        row["tokens_per_s"] = 1000 * draw.random()
        rows.append(row | (last | {"step": step, "perplexity": 20 + 5 * draw.random()} if step % 500 == 0 else {}))
    page = render_run(dataclasses.replace(finished, rows=rows))
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
    page = render_run(finished).replace("default-src 'none'; style-src 'unsafe-inline'", "")
    measure = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script>"
    (tmp_path / "inner.html").write_text(page.replace("</main>", "</main>" + measure), encoding="utf-8")
    ask = "document.body.append('width ' + this.contentDocument.title)"
    frame = f'<iframe src="inner.html" style="border:0; width:{width}px; height:900px" onload="{ask}"></iframe>'
    (tmp_path / "outer.html").write_text(f"<body>{frame}", encoding="utf-8")
    shown = draw_in_browser(tmp_path / "outer.html", "--virtual-time-budget=3000", "--dump-dom")
    [found] = re.findall(r"width (\d+) of (\d+)", shown)
    assert int(found[0]) <= int(found[1]) == width


# --------------------------------------------------------------------------------------------------------- several runs


@pytest.fixture
def four_runs(finished, tmp_path):
    """Folders of a run, one that is better by 0.5 on each chunk, and two of another text."""
    folders = [tmp_path / name for name in ("a", "b", "c", "d")]
    for folder in folders:
        shutil.copytree(finished.folder, folder)
    scores, step = load_evaluation(folders[0] / SCORES)
    save_evaluation(folders[1] / SCORES, scores._replace(losses=scores.losses - 0.5 * scores.masked), step)
    save_evaluation(folders[2] / SCORES, scores._replace(masked=scores.masked + 1), step)  # as of other masks
    other = json.loads((folders[3] / "summary.json").read_text())
    other["text"]["test"]["characters"] += 1  # as many masked tokens in each chunk, but of another text
    (folders[3] / "summary.json").write_text(json.dumps(other))
    return folders


def test_several_runs_are_compared_in_pairs_where_they_can_be(four_runs):
    page = render_runs([read_summary(folder) for folder in four_runs])
    Page(page)
    assert "the test loss is lower by 0.500 nats per masked token (95% interval 0.500 to 0.500)" in page
    assert page.count("another test text, tokenizer or sen_max_length") == 2


def test_what_is_compared_is_of_the_step_that_is_shown(four_runs):
    """A run that goes on, and was evaluated on a sample: by the chunks that both scored. One whose scores are of
    another step, as it was resumed before them: not at all."""
    scores, step = load_evaluation(four_runs[1] / SCORES)
    save_evaluation(four_runs[1] / SCORES, scores.first(20), step)
    save_evaluation(four_runs[2] / SCORES, scores, step - 1)
    (four_runs[3] / SCORES).unlink()
    page = render_runs([read_summary(folder) for folder in four_runs])
    assert "the test loss is lower by 0.500 nats per masked token (95% interval 0.500 to 0.500)" in page
    assert f"{SCORES} is of step {step - 1}, and metrics.csv ends elsewhere" in page
    assert f"{four_runs[3] / SCORES} cannot be read" in page


def test_a_first_run_that_diverged_makes_no_other_worse(four_runs):
    scores, step = load_evaluation(four_runs[0] / SCORES)
    save_evaluation(four_runs[0] / SCORES, scores._replace(losses=scores.losses * np.nan), step)
    page = render_runs([read_summary(folder) for folder in four_runs[:2]])
    assert "the test loss of the first run is not finite" in page and "Worse" not in page
    page = render_runs([read_summary(folder) for folder in four_runs[1::-1]])
    assert "Worse:</strong> the test loss is not finite" in page


def test_runs_of_one_name_are_told_apart(four_runs, tmp_path):
    twin = tmp_path / "elsewhere" / "a"
    shutil.copytree(four_runs[1], twin)
    page = render_runs([read_summary(folder) for folder in (four_runs[0], twin)])
    assert page.count(str(twin)) >= 3 and page.count(str(four_runs[0])) >= 3  # its card, the curves, the settings
    assert '<h2 class="first">a</h2>' in render_runs([read_summary(folder) for folder in four_runs])


def test_guesses_of_several_runs_are_shown_where_the_hidden_words_are_the_same(four_runs):
    runs = [read_summary(folder) for folder in four_runs]
    assert render_runs(runs).count("<mark>") == len(runs[0].guesses) > 0
    other = dataclasses.replace(runs[0], guesses=runs[0].guesses[1:])
    assert "<mark>" not in render_runs([*runs, other][-2:])


def test_the_program_writes_the_page_of_several_runs_beside_them(four_runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["report", *map(str, four_runs)])
    program.main()
    path = tmp_path / "report-of-4-runs.html"
    assert capsys.readouterr().out.strip() == str(path)
    assert path.read_text(encoding="utf-8") == render_runs([read_summary(folder) for folder in four_runs])


def test_the_program_draws_the_page_of_one_run_again(four_runs, monkeypatch):
    page = four_runs[0] / "report.html"
    page.write_text("old")
    monkeypatch.setattr("sys.argv", ["report", str(four_runs[0])])
    program.main()
    assert page.read_text(encoding="utf-8") == render_run(read_summary(four_runs[0]))


def test_a_folder_that_is_no_runs_is_said_plainly(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="is not the folder of a run"):
        read_summary(tmp_path)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        read_summary(tmp_path / "nowhere")
    monkeypatch.setattr("sys.argv", ["report"])
    with pytest.raises(UserError, match="name one run's folder or up to 4"):
        program.main()


def test_a_run_that_was_killed_is_not_said_to_be_running(finished, tmp_path):
    folder = tmp_path / "killed"
    shutil.copytree(finished.folder, folder)
    written = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(written | {"state": "running"}))
    page = render_run(read_summary(folder))
    assert "interrupted: no process of this machine is at work on it" in page and "refresh" not in page
    assert not (tmp_path / ".cache").exists()  # to ask changes nothing
    with lock(tmp_path / ".cache" / "killed.lock"):
        page = render_run(read_summary(folder))
        assert "running: step" in page and "refresh" in page
    assert read_summary(folder).state == "interrupted"


def test_results_on_tasks_and_general_text_are_shown(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "output" / finished.folder.name
    shutil.copytree(finished.folder, folder)
    task = tmp_path / "output" / "downstream" / "titles-1f"
    task.mkdir(parents=True)
    head = "examples_per_class,model,compared_with,metric,sentence\n"
    lines = [
        f"20,output/{folder.name}/final,old,accuracy,better by 23.5\n",
        f"20,{folder}/best,old,accuracy,better by 0.4\n",
        "20,output/other/final,old,accuracy,worse\n",
        f"20,/elsewhere/output/{folder.name}/final,old,accuracy,much worse\n",
    ]
    (task / "comparison.csv").write_text(head + "".join(lines))
    (task / "general_text.csv").write_text(f"model,perplexity\nold,10.5\noutput/{folder.name}/final,12.25\n")
    redraw(folder)
    redraw(tmp_path)  # which is no run's
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "better by 23.5" in page and "worse" not in page and "old 10.50" in page and "final 12.25" in page
    for part, found in (("final", "better by 23.5"), ("best", "better by 0.4")):
        assert f"<td>{folder.name}/{part}</td><td>{found}" in page


def test_two_processes_may_write_one_page_at_once(tmp_path):
    code = """
import sys
from pathlib import Path
from mlm.storage import write_text
for number in range(300):
    write_text(Path(sys.argv[1]) / "report.html", sys.argv[2] * 10_000)
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), letter], cwd=ROOT) for letter in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert (tmp_path / "report.html").read_text() in ("a" * 10_000, "b" * 10_000)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("settings.json", "[]"),
        ("settings.json", '{"settings": {}, "derived": {}, "versions": {}, "command": ""}'),
        ("settings.json", '{"model": "another program\'s"}'),
        ("summary.json", "[]"),
        ("summary.json", '{"results": []}'),
        ("metrics.csv", "step,epoch,train_loss\n"),
        ("metrics.csv", ""),
        ("metrics.csv", "step,eval_loss\n0,high\n"),
    ],
)
def test_files_of_other_programs_and_versions_are_said_plainly(finished, tmp_path, capsys, name, content):
    for kept in ("settings.json", "summary.json", "metrics.csv"):
        (tmp_path / kept).write_bytes((finished.folder / kept).read_bytes())
    read_summary(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is not the folder of a run that has been evaluated"):
        read_summary(tmp_path)
    redraw(tmp_path)
    assert "report.html anew failed: " in capsys.readouterr().err and not (tmp_path / "report.html").exists()
