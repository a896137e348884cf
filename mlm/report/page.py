"""The page that says whether a run worked, in one file: report.html; and the one that sets several side by side."""

import csv
from pathlib import Path

from mlm.data.text_stats import SplitStats, histogram, splits_of, text_warnings
from mlm.evaluation.loss import compare, load_evaluation, perplexity
from mlm.report.plots import FRAME, Chart, Curve, Point, Reference, bars, chart
from mlm.report.summary import SCORES, Summary, read_summary
from mlm.report.templates import template
from mlm.report.wording import notes, of_change, score_rows, verdict
from mlm.storage import atomic_write
from mlm.terminal import figure, with_error
from mlm.training.run import Ending

MASK = "[MASK]"
STYLES = ("one", "two", "three", "four")  # of runs beside each other
MOST_RUNS = len(STYLES)
MOODS = {"Better": "good", "Worse": "bad"}


def write_report(summary: Summary) -> None:
    """Writes report.html into the run's folder."""
    write_page(summary.folder / "report.html", page_of(summary))


def redraw(folder: Path) -> None:
    """Draws the page of a run anew, with what downstream.py has found since; does nothing where there is no run."""
    if (folder / "summary.json").exists():
        write_report(read_summary(folder))


def write_page(path: Path, page: str) -> None:
    """Writes a page, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- one run


def page_of(run: Summary) -> str:
    """The page of one run, as HTML."""
    answer = verdict(run)
    stats, only_test = run.text, run.settings["evaluate_only"]
    splits = splits_of(stats, only_test)
    warnings = text_warnings(stats, run.settings["initial_pretrain_tokenizer"], only_test)
    if run.skipped_steps:
        warnings.append(f"warning: {run.skipped_steps:,} steps skipped, as their loss or gradient was not finite")
    counts = histogram(next(iter(splits.values())), run.settings["sen_max_length"])
    last = run.evaluations[-1]
    return template("run.html").render(
        run=run,
        state=_state_of(run),
        answer=answer,
        trained="change" in last,
        mood=MOODS.get(answer.partition(":")[0], ""),
        notes=[*notes(run), *forgetting_of(run.folder)],
        warnings=warnings,
        scores=score_rows(run),
        chunks=f"{last['test_chunks']:,.0f} chunks of {stats.test.chunks:,}",
        charts=charts_of(run),
        frame=FRAME,
        mask=MASK,
        tasks=tasks_of(run.folder),
        splits=splits,
        text_rows=_rows_of_text(list(splits.values())),
        lengths=bars(counts),
        lengths_alt="Histogram of the tokens of a line: " + ", ".join(f"{label}: {n:,}" for label, n in counts if n),
    )


def _state_of(run: Summary) -> str:
    """Whether a run goes on, or how it ended."""
    if run.state == "running":
        return f"running: step {run.evaluations[-1]['step']:,.0f} of {run.settings['max_steps']:,}"
    return f"{run.state}: {Ending[run.state.upper()].value}"


def _rows_of_text(splits: list[SplitStats]) -> list[list[str]]:
    names = {
        "lines": "lines", "blank": "blank", "duplicate": "repeat an earlier one", "dropped": "without a token",
        "chunks": "chunks", "tokens": "tokens",
    }  # fmt: skip
    rows = [[title, *(f"{getattr(split, name):,}" for split in splits)] for name, title in names.items()]
    rows.append(["[UNK]", *(f"{split.unknown / split.tokens:.2%}" for split in splits)])
    rows.append(["characters", *(f"{split.characters:,}" for split in splits)])
    return rows


def charts_of(run: Summary) -> list[Chart]:
    """Perplexity with the start and the words' frequencies drawn in, accuracy, learning rate and speed."""
    if len(run.rows) < 2:
        return []
    tested, first, last = run.evaluations, run.evaluations[0], run.evaluations[-1]
    perplexities = [Point(row["step"], row["perplexity"], 1.96 * row["perplexity_se"]) for row in tested]
    accuracies = [Point(row["step"], row["masked_accuracy"]) for row in tested]
    losses = [Point(row["step"], perplexity(row["train_loss"])) for row in run.rows if "train_loss" in row]
    rates = [Point(row["step"], row["lr"]) for row in run.rows if "lr" in row]
    speeds = [Point(row["step"], row["tokens_per_s"]) for row in run.rows if "tokens_per_s" in row]
    span = f"over {last['step']:,.0f} steps"
    references = [
        Reference("before training", "plain", first["perplexity"]),
        Reference("word frequencies alone", "three", run.text.unigram_perplexity),
    ]
    made = [
        chart(
            "Perplexity",
            f"Test perplexity went from {figure(first['perplexity'])} to {figure(last['perplexity'])} {span}.",
            [
                Curve("training text", "thin", losses),
                Curve("test text with 95% intervals", "one", perplexities, dots=True),
            ],
            references,
            logarithmic=True,
        ),
        chart(
            "Hidden tokens guessed right",
            f"From {first['masked_accuracy']:.1%} to {last['masked_accuracy']:.1%} {span}.",
            [Curve("test text", "one", accuracies, dots=True)],
            label=_percent,
        ),
        chart("Learning rate", _range("The learning rate", rates), [Curve("", "one", rates)], label="{:.3g}".format),
        chart("Tokens a second", _range("Training speed", speeds), [Curve("", "one", speeds)]),
    ]
    return [each for each in made if each]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _range(what: str, points: list[Point]) -> str:
    values = [point.value for point in points]
    return f"{what} was between {min(values):,.3g} and {max(values):,.3g}." if values else ""


def tasks_of(folder: Path) -> list[dict[str, str]]:
    """What downstream.py found of the run's models, a row for each comparison."""
    found = []
    for file in sorted(folder.parent.glob("downstream/*/comparison.csv")):
        for row in _read_csv(file):
            if "sentence" in row and _is_of(row["model"], folder):
                found.append(row | {"task": file.parent.name})
    return found


def forgetting_of(folder: Path) -> list[str]:
    """What downstream.py found the run's models to know of general text, beside the models they were compared with."""
    found = []
    for file in sorted(folder.parent.glob("downstream/*/general_text.csv")):
        rows = _read_csv(file)
        if any(_is_of(row["model"], folder) for row in rows):
            known = ", ".join(f"{row['model']} {figure(float(row['perplexity']))}" for row in rows)
            found.append(f"Perplexity on general text ({file.parent.name}): {known}.")
    return found


def _read_csv(file: Path) -> list[dict[str, str]]:
    with open(file, newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _is_of(model: str, folder: Path) -> bool:
    """Whether a model, by the name that downstream.py was given, is one of the run's."""
    return Path(model).parent.name == folder.name and Path(model).name in ("final", "best")


# --------------------------------------------------------------------------------------------------------- several runs


def page_of_several(runs: list[Summary]) -> str:
    """The page that sets runs side by side, as HTML."""
    first = runs[0]
    differing = [
        (name, [run.settings.get(name) for run in runs])
        for name in first.settings
        if name not in ("run_name", "resume") and len({str(run.settings.get(name)) for run in runs}) > 1
    ]
    hidden = [(guessed.line, guessed.word) for guessed in first.guesses]
    same_words = all([(guessed.line, guessed.word) for guessed in run.guesses] == hidden for run in runs)
    curves = {
        "Perplexity on the test text": ("perplexity", True, "{:,.10g}".format),
        "Hidden tokens guessed right": ("masked_accuracy", False, _percent),
    }
    made = []
    for title, (column, logarithmic, label) in curves.items():
        lines = [
            Curve(run.folder.name, style, [Point(row["step"], row[column]) for row in run.evaluations], dots=True)
            for run, style in zip(runs, STYLES, strict=False)
        ]
        made.append(chart(title, f"{title}, a curve for each run.", lines, logarithmic=logarithmic, label=label))
    return template("runs.html").render(
        runs=runs,
        rows=[_row_of(run, first) for run in runs],
        charts=[each for each in made if each],
        frame=FRAME,
        mask=MASK,
        differing=differing,
        guesses=[(guessed, [run.guesses[index].after for run in runs]) for index, guessed in enumerate(first.guesses)]
        if same_words
        else [],
    )


def _row_of(run: Summary, first: Summary) -> dict[str, str]:
    """A run in the table, and how it compares with the first one."""
    before, after = run.evaluations[0], run.evaluations[-1]
    sentence = "" if run is first else _against(run, first)
    return {
        "name": run.folder.name,
        "start": run.settings["initial_pretrain_model"],
        "before": with_error(before["perplexity"], before["perplexity_se"]),
        "after": with_error(after["perplexity"], after["perplexity_se"]),
        "nats": f"{run.nats_per_character[-1]:.3f}",
        "against": sentence,
        "mood": MOODS.get(sentence.partition(":")[0], ""),
    }


def _against(run: Summary, first: Summary) -> str:
    """The paired difference of two runs' last evaluations, in a sentence."""
    try:
        if run.text.test != first.text.test:
            raise ValueError("they are of other texts")
        change = compare(*(load_evaluation(each.folder / SCORES) for each in (first, run)))
    except (ValueError, OSError):
        return "Not comparable: another test text, tokenizer or sen_max_length."
    return of_change(change.loss, change.low, change.high, "is lower", "is higher")
