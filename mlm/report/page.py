"""The page that says whether a run worked, in one file: report.html; and the one that sets several side by side."""

from collections.abc import Callable
from pathlib import Path

from mlm.data.text_stats import SplitStats, histogram, text_warnings, used_splits
from mlm.evaluation.loss import compare, load_evaluation, perplexity
from mlm.report.plots import Chart, Curve, Point, draw_curves, draw_histogram
from mlm.report.summary import SCORES, Summary, read_summary
from mlm.report.templates import render
from mlm.report.wording import describe_change, notes, score_rows, verdict
from mlm.storage import atomic_write, read_csv
from mlm.terminal import figure, with_error
from mlm.training.run import Ending

MASK = "[MASK]"
RUN_COLORS = ("one", "two", "three", "four")  # of runs beside each other
MOST_RUNS = len(RUN_COLORS)
MOODS = {"Better": "good", "Worse": "bad"}


def write_report(summary: Summary) -> None:
    """Writes report.html into the run's folder."""
    write_page(summary.folder / "report.html", render_run(summary))


def redraw(folder: Path) -> None:
    """Draws the page of a run anew, with what downstream.py has found since; does nothing where there is no run."""
    if (folder / "summary.json").exists():
        write_report(read_summary(folder))


def write_page(path: Path, page: str) -> None:
    """Writes a page, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- one run


def render_run(run: Summary) -> str:
    """Returns the page of one run, as HTML."""
    stats, only_test = run.text, run.settings["evaluate_only"]
    splits = used_splits(stats, only_test)
    warnings = text_warnings(stats, run.settings["initial_pretrain_tokenizer"], only_test)
    if run.skipped_steps:
        warnings.append(f"warning: {run.skipped_steps:,} steps skipped, as their loss or gradient was not finite")
    return render(
        "run.html",
        run=run,
        state=_describe_state(run),
        verdict=verdict(run),
        mood=_mood(verdict(run)),
        notes=[*notes(run), *_general_text_notes(run.folder)],
        warnings=warnings,
        scores=score_rows(run),
        chunks=f"{run.evaluations[-1]['test_chunks']:,.0f} chunks of {stats.test.chunks:,}",
        charts=_draw_charts(run),
        mask=MASK,
        tasks=_task_results(run.folder),
        splits=splits,
        text_rows=_text_rows(list(splits.values())),
        lengths=_draw_lengths(next(iter(splits.values())), run.settings["sen_max_length"]),
    )


def _describe_state(run: Summary) -> str:
    """Says that a run goes on, or how it ended."""
    if run.state == "running":
        return f"running: step {run.evaluations[-1]['step']:,.0f} of {run.settings['max_steps']:,}"
    return f"{run.state}: {Ending[run.state.upper()].value}"


def _mood(verdict: str) -> str:
    """Returns the style of a verdict: good, bad, or none."""
    return MOODS.get(verdict.partition(":")[0], "")


def _text_rows(splits: list[SplitStats]) -> list[list[str]]:
    """Returns the table of what was found in the text: a title, and a cell for each split."""
    names = {
        "lines": "lines", "blank": "blank", "duplicate": "repeat an earlier one", "dropped": "without a token",
        "chunks": "chunks", "tokens": "tokens",
    }  # fmt: skip
    rows = [[title, *(f"{getattr(split, name):,}" for split in splits)] for name, title in names.items()]
    rows.append(["[UNK]", *(f"{split.unknown / split.tokens:.2%}" for split in splits)])
    rows.append(["characters", *(f"{split.characters:,}" for split in splits)])
    return rows


def _draw_lengths(split: SplitStats, sen_max_length: int) -> Chart:
    """Draws the histogram of the tokens per line."""
    counts = histogram(split, sen_max_length)
    description = ", ".join(f"{label}: {count:,} lines" for label, count in counts if count)
    return draw_histogram("Tokens per line", f"Tokens per line: {description}.", counts)


def _draw_charts(run: Summary) -> list[Chart]:
    """Draws perplexity beside the baseline's and that of word frequencies, accuracy, learning rate and speed."""
    if len(run.rows) < 2:
        return []
    first, last = run.evaluations[0], run.evaluations[-1]
    perplexities = [Point(row["step"], row["perplexity"], 1.96 * row["perplexity_se"]) for row in run.evaluations]
    training = [Point(step, perplexity(loss)) for step, loss, _ in _points(run, "train_loss")]
    rates, speeds = _points(run, "lr"), _points(run, "tokens_per_s")
    span = f"over {last['step']:,.0f} steps"
    charts = [
        draw_curves(
            "Perplexity",
            f"Test perplexity went from {figure(first['perplexity'])} to {figure(last['perplexity'])} {span}.",
            [
                Curve("training text", "faint", training),
                Curve("test text with 95% intervals", "one", perplexities),
                Curve("before training", "soft", _level(run, first["perplexity"]), "dashed"),
                Curve("word frequencies alone", "three", _level(run, run.text.unigram_perplexity), "dotted"),
            ],
            logarithmic=True,
        ),
        draw_curves(
            "Masked accuracy",
            f"From {first['masked_accuracy']:.1%} to {last['masked_accuracy']:.1%} {span}.",
            [Curve("test text", "one", _points(run, "masked_accuracy"))],
            label=_percent,
        ),
        draw_curves("Learning rate", _describe_range(rates), [Curve("", "one", rates)], label="{:.3g}".format),
        draw_curves("Tokens per second", _describe_range(speeds), [Curve("", "one", speeds)]),
    ]
    return [chart for chart in charts if chart]


def _points(run: Summary, column: str) -> list[Point]:
    """Returns what metrics.csv has in a column, by step."""
    return [Point(row["step"], row[column]) for row in run.rows if column in row]


def _level(run: Summary, value: float) -> list[Point]:
    """Returns a value that is the same at all steps of a run, to compare with."""
    return [Point(0, value), Point(run.rows[-1]["step"], value)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _describe_range(points: list[Point]) -> str:
    values = [point.value for point in points]
    return f"Between {min(values):,.3g} and {max(values):,.3g} in training." if values else ""


def _task_results(folder: Path) -> list[dict[str, str]]:
    """Returns what downstream.py found of the run's models, a row for each comparison."""
    return [
        row | {"task": file.parent.name}
        for file in sorted(folder.parent.glob("downstream/*/comparison.csv"))
        for row in read_csv(file)
        if "sentence" in row and _is_model_of_run(row["model"], folder)
    ]


def _general_text_notes(folder: Path) -> list[str]:
    """Returns a sentence for each task: the perplexities that downstream.py measured on general text."""
    found = []
    for file in sorted(folder.parent.glob("downstream/*/general_text.csv")):
        rows = read_csv(file)
        if any(_is_model_of_run(row["model"], folder) for row in rows):
            known = ", ".join(f"{row['model']} {figure(float(row['perplexity']))}" for row in rows)
            found.append(f"Perplexity on general text ({file.parent.name}): {known}.")
    return found


def _is_model_of_run(model: str, folder: Path) -> bool:
    """Whether a model, by the name that downstream.py was given, is one of the run's."""
    return Path(model).parent.name == folder.name and Path(model).name in ("final", "best")


# --------------------------------------------------------------------------------------------------------- several runs


def render_runs(runs: list[Summary]) -> str:
    """Returns the page that sets runs side by side, as HTML."""
    first = runs[0]
    differing = [
        (name, [run.settings.get(name) for run in runs])
        for name in first.settings
        if name not in ("run_name", "resume") and len({str(run.settings.get(name)) for run in runs}) > 1
    ]
    hidden_words = [[(guessed.line, guessed.word) for guessed in run.guesses] for run in runs]
    guesses = []
    if all(words == hidden_words[0] for words in hidden_words):
        by_word = zip(*(run.guesses for run in runs), strict=True)
        guesses = [(same_word[0], [guessed.after for guessed in same_word]) for same_word in by_word]
    charts = [
        _draw_beside(runs, "Perplexity", "perplexity", "{:,.10g}".format, logarithmic=True),
        _draw_beside(runs, "Masked accuracy", "masked_accuracy", _percent),
    ]
    return render(
        "runs.html",
        runs=runs,
        rows=[_run_row(run, first) for run in runs],
        charts=[chart for chart in charts if chart],
        mask=MASK,
        differing=differing,
        guesses=guesses,
    )


def _draw_beside(
    runs: list[Summary], title: str, column: str, label: Callable[[float], str], logarithmic: bool = False
) -> Chart | None:
    """Draws a column of metrics.csv, a curve for each run."""
    curves = [Curve(run.folder.name, color, _points(run, column)) for run, color in zip(runs, RUN_COLORS, strict=False)]
    return draw_curves(title, f"{title} on the test text, a curve for each run.", curves, logarithmic, label)


def _run_row(run: Summary, first: Summary) -> dict[str, str]:
    """Returns a run's scores, and how it compares with the first one."""
    before, after = run.evaluations[0], run.evaluations[-1]
    sentence = "" if run is first else _compare(run, first)
    return {
        "name": run.folder.name,
        "base_model": run.settings["initial_pretrain_model"],
        "before": with_error(before["perplexity"], before["perplexity_se"]),
        "after": with_error(after["perplexity"], after["perplexity_se"]),
        "nats": f"{run.nats_per_character[-1]:.3f}",
        "verdict": sentence,
        "mood": _mood(sentence),
    }


def _compare(run: Summary, first: Summary) -> str:
    """Returns the paired difference of two runs' last evaluations, in a sentence."""
    try:
        if run.text.test != first.text.test:
            raise ValueError("they are of other texts")
        change = compare(*(load_evaluation(each.folder / SCORES) for each in (first, run)))
    except (ValueError, OSError):
        return "Not comparable: another test text, tokenizer or sen_max_length."
    return describe_change(change.loss, change.low, change.high, "is lower", "is higher")
