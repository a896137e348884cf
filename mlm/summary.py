"""What came of a run, or has come of it so far: the figures and sentences that its log, report and model card share."""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlm.chunks import TextStats
from mlm.errors import UserError
from mlm.evaluation import SAMPLE_ERROR
from mlm.guesses import Guess, guess
from mlm.log import figure, with_error
from mlm.state import Ending, Progress, Run
from mlm.storage import write_json

GUESSES_IN_LOG = 5
KEPT = ("state", "text", "skipped_steps", "guesses")  # in summary.json: what settings.json and metrics.csv do not hold


class GuessedWord(NamedTuple):
    """A line with a hidden word, that word, and what the model makes of its place before training and now."""

    line: str
    word: str
    before: list[Guess]
    after: list[Guess]


@dataclass
class Summary:
    """A run as its folder tells it."""

    folder: Path
    settings: dict[str, Any]
    derived: dict[str, Any]
    versions: dict[str, str]
    rows: list[dict[str, float]]  # of metrics.csv; what a row did not measure is not in it
    state: str  # running, or the name of its ending
    text: TextStats
    skipped_steps: int  # that trained nothing, as their loss or gradient was not finite
    guesses: list[GuessedWord]

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The rows with scores on the test text, that of the starting checkpoint first."""
        return [row for row in self.rows if "eval_loss" in row]

    @property
    def nats_per_character(self) -> list[float]:
        """Of the first and the last evaluation: the loss per masked token times the tokens per character."""
        tokens_per_character = self.text.test.tokens / self.text.test.characters
        return [row["eval_loss"] * tokens_per_character for row in (self.evaluations[0], self.evaluations[-1])]


def publish(run: Run, progress: Progress, ending: Ending | None = None) -> Summary:
    """Writes what came of a run so far to its folder; to be called on the main rank, once the start is evaluated."""
    guesses_after = [] if ending is Ending.BROKEN else guess(run.bert, run.hidden_words, run.data.tokenizer)
    guesses = zip(run.hidden_words, progress.guesses_before, guesses_after, strict=False)
    summary = Summary(
        folder=run.folder,
        settings=asdict(run.config),
        derived=run.derived,
        versions=run.versions,
        rows=progress.rows,
        state=ending.name.lower() if ending else "running",
        text=run.data.stats,
        skipped_steps=progress.skipped,
        guesses=[GuessedWord(*hidden, before, after) for hidden, before, after in guesses],
    )
    kept = {name: value for name, value in asdict(summary).items() if name in KEPT}
    write_json(summary.folder / "summary.json", kept)
    return summary


def read_summary(folder: Path) -> Summary:
    """What the files of a run's folder say. Raises UserError where it is none, or was written by an older version."""
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        kept = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
        kept["text"] = TextStats.of_dict(kept["text"])
        kept["guesses"] = [
            GuessedWord(line, word, *([Guess(*guess) for guess in guesses] for guesses in both))
            for line, word, *both in kept["guesses"]
        ]
        return Summary(folder=folder, rows=rows, **settings, **kept)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is not the folder of a run that has been evaluated: {error}") from error


# ----------------------------------------------------------------------------------------------------------- sentences


def verdict(summary: Summary) -> str:
    """Whether the model guesses the test text better than the one that it started from, in a sentence."""
    last = summary.evaluations[-1]
    if "change" not in last:
        return "Not trained yet: this is the starting model."
    fell, low, high = -last["change"], -last["change_high"], -last["change_low"]
    interval = f"(95% interval {low:.3f} to {high:.3f})"
    if low > 0:
        return f"Better: the test loss fell by {fell:.3f} nats per masked token {interval}."
    if high < 0:
        interval = f"(95% interval {-high:.3f} to {-low:.3f})"
        return f"Worse: the test loss rose by {-fell:.3f} nats per masked token {interval}."
    return f"Cannot tell: the test loss fell by {fell:.3f} nats per masked token {interval}, which may be chance."


def trend(summary: Summary) -> str:
    """Whether the test loss still falls, in a sentence; empty where too few evaluations were made to say."""
    trained = [row for row in summary.evaluations if "change" in row]
    if len(trained) < 2:
        return ""
    before, last = trained[-2:]
    lowest = min(trained, key=lambda row: row["change"])
    since = f"over the last {last['step'] - before['step']:,.0f} steps"
    if last["change"] > lowest["change"] + SAMPLE_ERROR:
        return (
            f"It was lowest after step {lowest['step']:,.0f}, and has risen by "
            f"{last['change'] - lowest['change']:.3f} since; best/ holds that model."
        )
    if last["change"] < before["change"] - SAMPLE_ERROR:
        return f"It still fell, by {before['change'] - last['change']:.3f} {since}: more epochs may lower it further."
    return f"It no longer fell {since}: more epochs on this text will hardly help."


def closing_words(summary: Summary) -> str:
    """The end of the log: the scores before and after, some hidden words with their guesses, the model."""
    before, after = summary.evaluations[0], summary.evaluations[-1]
    unigram = summary.text.unigram_perplexity
    both = (before, after)
    table = [
        ("", "before", "after", ""),
        (
            "perplexity",
            *(with_error(row["perplexity"], row["perplexity_se"]) for row in both),
            "± standard error",
        ),
        ("masked accuracy", *(f"{row['masked_accuracy']:.1%}" for row in both), ""),
        ("nats per character", *(f"{nats:.3f}" for nats in summary.nats_per_character), ""),
        ("unigram perplexity", "", figure(unigram), f"perplexity / unigram = {figure(after['perplexity'] / unigram)}"),
    ]
    lines = [f"{name:<20}{old:>20}{new:>20}    {note}".rstrip() for name, old, new, note in table]
    lines.append("(Perplexities compare between runs with the same tokenizer and sen_max_length; else compare nats.)")
    lines += ["", f"{verdict(summary)} {trend(summary)}".rstrip()]
    for guessed in summary.guesses[:GUESSES_IN_LOG]:
        lines += ["", f"  {guessed.line}   ({guessed.word})"]
        lines += [
            f"    {when}  {_list(guesses)}" for when, guesses in (("before", guessed.before), ("after ", guessed.after))
        ]
    if summary.skipped_steps:
        warning = "warning: steps skipped, as their loss or gradient was not finite"
        lines += ["", f"{warning}: {summary.skipped_steps:,}"]
    model = summary.folder / "final"
    lines += ["", f"The model: {model}"]
    call = f"""print(pipeline("fill-mask", "{model}")("Your text with a [MASK]."))"""
    return "\n".join([*lines, f"  python -c 'from transformers import pipeline; {call}'"])


def _list(guesses: list[Guess]) -> str:
    return "   ".join(f"{guess.word} {guess.probability:.0%}" for guess in guesses)
