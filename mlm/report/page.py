"""The page that says whether a run worked, in one file: report.html; and the one that sets several side by side."""

import math
from pathlib import Path

from mlm.data.text_stats import describe_equal_lines, histogram, text_warnings, used_splits
from mlm.errors import optional
from mlm.evaluation.loss import compare, load_evaluation, perplexity
from mlm.report.plots import COLORS_OF_RUNS, Chart, Curve, Point, draw_curves, draw_histogram
from mlm.report.summary import SCORES, Summary, read_summary
from mlm.report.wording import describe_change, notes, score_rows, scored_chunks, verdict
from mlm.storage import read_csv, write_text
from mlm.terminal import figure, render
from mlm.training.run import Ending

MOST_RUNS = len(COLORS_OF_RUNS)


def write_report(summary: Summary) -> None:
    """Writes report.html into the run's folder."""
    write_text(summary.folder / "report.html", render_run(summary))


def redraw(folder: Path) -> None:
    """Draws the page of a run anew, with what downstream.py has found since; does nothing where there is no run. Where
    it cannot, as the files are another program's or another version's, it says so."""
    if (folder / "summary.json").exists():
        with optional(f"drawing {folder / 'report.html'} anew"):
            write_report(read_summary(folder))


def render_run(run: Summary) -> str:
    """Returns the page of one run, as HTML."""
    stats, only_test = run.text, run.settings["evaluate_only"]
    splits = used_splits(stats, only_test)
    lengths = histogram(next(iter(splits.values())), run.settings["sen_max_length"])
    warnings = text_warnings(stats, run.settings["initial_pretrain_tokenizer"], only_test)
    if run.skipped_steps:
        warnings.append(f"warning: {run.skipped_steps:,} steps skipped, as their loss or gradient was not finite")
    return render(
        "report/templates/run.html",
        run=run,
        ending=None if run.state == "running" else Ending[run.state.upper()].value,
        verdict=verdict(run),
        notes=[*notes(run), *_general_text_notes(run.folder)],
        warnings=warnings,
        scores=score_rows(run),
        scored_chunks=scored_chunks(run),
        charts=_draw_charts(run),
        tasks=_task_results(run.folder),
        splits=splits,
        equal_lines="" if only_test else describe_equal_lines(run.text, run.settings.get("drop_duplicates", False)),
        lengths=draw_histogram("Tokens per line", lengths),
    )


def _draw_charts(run: Summary) -> list[Chart | None]:
    """Draws perplexity beside the baseline's, that of word frequencies and that of general text, where it was scored;
    accuracy, learning rate and speed."""
    if len(run.rows) < 2:
        return []
    last_step = run.rows[-1]["step"]
    before, unigram = run.evaluations[0]["perplexity"], run.text.unigram_perplexity
    training = [Point(step, perplexity(loss)) for step, loss, _ in _points(run, "train_loss")]
    test = [Point(row["step"], row["perplexity"], 1.96 * row["perplexity_se"]) for row in run.evaluations]
    perplexities = [
        Curve("training text", "faint", training),
        Curve("test text with 95% intervals", "one", test),
        Curve("before training", "soft", [Point(0, before), Point(last_step, before)], "dashed"),
        Curve("word frequencies alone", "three", [Point(0, unigram), Point(last_step, unigram)], "dotted"),
    ]
    if "general_loss" in run.evaluations[-1]:
        general = [
            Point(row["step"], row["general_perplexity"], 1.96 * row["general_perplexity"] * row["general_loss_se"])
            for row in run.evaluations
        ]
        perplexities.append(Curve("general text with 95% intervals", "two", general))
    return [
        draw_curves("Perplexity", perplexities, logarithmic=True),
        draw_curves("Masked accuracy", [Curve("test text", "one", _points(run, "masked_accuracy"))], label=_percent),
        draw_curves("Learning rate", [Curve("", "one", _points(run, "lr"))], label="{:.3g}".format),
        draw_curves("Tokens per second", [Curve("", "one", _points(run, "tokens_per_s"))]),
    ]


def _points(run: Summary, column: str) -> list[Point]:
    """Returns what metrics.csv has in a column, by step."""
    return [Point(row["step"], row[column]) for row in run.rows if column in row]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _task_results(folder: Path) -> list[dict[str, str]]:
    """Returns what downstream.py found of the run's models, a row for each comparison."""
    return [
        row | {"task": file.parent.name, "part": Path(row["model"]).name}
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
    """Whether a model, by the name that downstream.py was given here, is one of the run's."""
    return Path(model).resolve().parent == folder.resolve() and Path(model).name in ("final", "best")


def render_runs(runs: list[Summary]) -> str:
    """Returns the page that sets runs side by side, as HTML."""
    settings = {name: [run.settings.get(name) for run in runs] for name in runs[0].settings}
    has_same_hidden_words = len({tuple((guessed.line, guessed.word) for guessed in run.guesses) for run in runs}) == 1
    names = [run.folder.name for run in runs]
    if len(set(names)) < len(runs):  # by their whole paths
        names = [str(run.folder) for run in runs]
    charts = []
    for title, column, options in (
        ("Perplexity", "perplexity", {"logarithmic": True}),
        ("Masked accuracy", "masked_accuracy", {"label": _percent}),
    ):
        beside = zip(runs, names, COLORS_OF_RUNS, strict=False)
        curves = [Curve(name, color, _points(run, column)) for run, name, color in beside]
        charts.append(draw_curves(title, curves, **options))
    return render(
        "report/templates/runs.html",
        names=names,
        rows=[(name, run, score_rows(run), _compare(run, runs[0])) for name, run in zip(names, runs, strict=True)],
        charts=charts,
        differing={name: values for name, values in settings.items() if len(set(map(str, values))) > 1},
        guesses=list(zip(*(run.guesses for run in runs), strict=True)) if has_same_hidden_words else [],
    )


def _compare(run: Summary, first: Summary) -> str:
    """Returns the paired difference of two runs' last evaluations, in a sentence."""
    evaluations = []
    for each in (first, run):
        try:
            evaluation, step = load_evaluation(each.folder / SCORES)
        except (ValueError, OSError):
            return f"Not comparable: {each.folder / SCORES} cannot be read, or is another version's."
        if step != each.evaluations[-1]["step"]:
            return f"Not comparable: {each.folder / SCORES} is of step {step:,}, and metrics.csv ends elsewhere."
        evaluations.append(evaluation)
    try:
        if run.text.test != first.text.test:
            raise ValueError("they are of other texts")
        change = compare(evaluations[0], evaluations[1])
    except ValueError:
        return "Not comparable: another test text, tokenizer or sen_max_length."
    if not math.isfinite(evaluations[0].loss):
        return "Not comparable: the test loss of the first run is not finite."
    return describe_change(change.loss, change.low, change.high, "is lower", "is higher")
