"""What came of a run, or has come of it so far: the figures and sentences that its log, report and model card share."""

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from Config import Config
from mlm.data.text_stats import SHOWN_SPLIT_WORDS, TextStats
from mlm.errors import UserError, first_line
from mlm.evaluation.fill_mask import Guess, HiddenWord
from mlm.storage import read_csv, write_json
from mlm.training.progress import Progress
from mlm.training.run import Ending, Setup, library_versions
from mlm.training.run_folder import is_at_work

SCORES = "test_scores.safetensors"  # the last evaluation, to compare runs by


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
    command: str  # that repeats it
    rows: list[dict[str, float]]  # of metrics.csv; what a row did not measure is not in it
    state: str  # running, or the name of its ending
    text: TextStats
    skipped_steps: int  # that trained nothing, as their loss or gradient was not finite
    guesses: list[GuessedWord]
    steps: int  # after which it ends: max_steps, or fewer where it stopped early
    cooldown_from: int | None  # the step after which a constant learning rate falls; None: it was never constant

    @property
    def mask_token(self) -> str:
        """How a text for the model has its hidden words; early runs, which do not say, were BERT's."""
        return self.derived.get("mask_token", "[MASK]")

    @property
    def evaluations(self) -> list[dict[str, float]]:
        """The rows with scores on the test text, that of the starting checkpoint first."""
        return [row for row in self.rows if "eval_loss" in row]

    @property
    def stops_early(self) -> bool:
        """Whether it has fewer steps than were planned, as evaluations in a row saw no sure gain."""
        return self.steps < self.settings["max_steps"]

    @property
    def has_trained(self) -> bool:
        """Whether the last evaluation is of a trained model: it has a change from the baseline."""
        return "change" in self.evaluations[-1]


def save_settings(setup: Setup) -> None:
    """Writes settings.json, and of a run that had ended that it is running again."""
    content = {"settings": asdict(setup.config), "derived": setup.derived, "versions": library_versions()}
    known = {"command": setup.command, "text_digest": setup.recipe["text"]}  # by which downstream.py knows the text
    write_json(setup.folder / "settings.json", content | known)
    kept = setup.folder / "summary.json"
    if kept.exists():
        write_json(kept, json.loads(kept.read_text(encoding="utf-8")) | {"state": "running"})


def publish(
    setup: Setup,
    progress: Progress,
    stats: TextStats,
    hidden_words: list[HiddenWord],
    guesses: list[list[Guess]],
    ending: Ending | None,
) -> Summary:
    """Writes what came of a run so far, beside settings.json and metrics.csv; `ending` is None while it goes on.

    guesses: for each hidden word what the model makes of its place now, or none at all.
    """
    words = zip(hidden_words, progress.baseline_guesses, guesses, strict=False)
    content = {
        "state": ending.name.lower() if ending else "running",
        "text": asdict(replace(stats, split_words=stats.split_words[:SHOWN_SPLIT_WORDS])),
        "skipped_steps": progress.skipped_steps,
        "steps": setup.plan.steps,
        "cooldown_from": setup.plan.cooldown_from,
        "guesses": [(hidden.line, hidden.word, before, after) for hidden, before, after in words],
    }
    write_json(setup.folder / "summary.json", content)
    return _read_files(setup.folder)


def read_summary(folder: Path) -> Summary:
    """What the files of a run's folder say. Raises UserError where it is none, or was written by an older version."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    try:
        summary = _read_files(folder)
        if summary.state == "running" and not is_at_work(folder):
            summary.state = Ending.INTERRUPTED.name.lower()
        missing = {field.name for field in fields(Config)} - summary.settings.keys()
        if missing:
            raise ValueError(f"another version wrote settings.json, without {min(missing)}")
        if not summary.evaluations:
            raise ValueError("metrics.csv has no evaluation")
        return summary
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{folder} is not the folder of a run that has been evaluated: {first_line(error)}") from error


def _read_files(folder: Path) -> Summary:
    settings, kept = (
        json.loads((folder / name).read_text(encoding="utf-8")) for name in ("settings.json", "summary.json")
    )
    rows = [{name: value for name, value in row.items() if value} for row in read_csv(folder / "metrics.csv")]
    return TypeAdapter(Summary).validate_python({"folder": folder, "rows": rows, **settings, **kept})
