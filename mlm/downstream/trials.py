"""Trials: each a fine-tuning of one model with one seed, each kept in a file, so that none is done twice.

Several processes may work on one comparison; each takes trials that no other has taken.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import Timeout
from tqdm import tqdm

from mlm.downstream.comparison import Comparison
from mlm.downstream.task import group_by
from mlm.storage import digest, lock, write_json

FORMAT = 3  # raise when trials are done, or written, in another way


@dataclass(frozen=True)
class Trial:
    """A fine-tuning, or a linear probe, to be done."""

    model: str
    size: str  # of examples_per_class
    seed: int
    learning_rate: float | None  # None for a linear probe


@dataclass
class Result:
    """A trial that was done."""

    trial: Trial
    dev_score: float
    predictions: list[int]  # the class id of each test text, or of each word
    seconds: float
    best_step: int | None = None  # after which dev was best; 0: it diverged before, and the head is as it was drawn
    regularization_c: float | None = None  # of a linear probe's logistic regression


def run(
    comparison: Comparison, trials: list[Trial], run_trial: Callable[[Comparison, Trial], Result]
) -> dict[str, list[Result]]:
    """Returns each model's results, in the order of the trials, done by `run_trial` where there is none yet.

    Trials that other processes are at work on come last; once these have done them, or ended, their results are read,
    or they are done here.
    """

    def finish(trial: Trial, timeout_s: float) -> Result:
        path = _path(comparison, trial)
        with lock(path.with_suffix(".lock"), timeout_s):
            result = _read(comparison, trial)
            if result is None:
                result = run_trial(comparison, trial)
                write_json(path, asdict(result))
                _say_result(result, left=sum(not _path(comparison, other).exists() for other in trials))
            return result

    results, taken = {}, []
    for trial in trials:
        try:
            results[trial] = finish(trial, timeout_s=0)
        except Timeout:  # another process holds it
            taken.append(trial)
    for trial in taken:
        results[trial] = finish(trial, timeout_s=-1)
    return group_by([results[trial] for trial in trials], lambda result: result.trial.model)


def _say_result(result: Result, left: int) -> None:
    """Prints a line about a trial that is done, above the bars."""
    trial = result.trial
    if trial.learning_rate is None:
        setting = f"C = {result.regularization_c:g}"
    else:
        setting = f"rate {trial.learning_rate:g}"
        setting += f", best after step {result.best_step}" if result.best_step else " diverged"
    to_come = f"; {left} more, about {tqdm.format_interval(left * result.seconds)}" if left else ""
    tqdm.write(
        f"{trial.model}, {describe_size(trial.size)}, seed {trial.seed}: {setting}, "
        f"dev {100 * result.dev_score:.1f}, {result.seconds:.0f} s{to_come}"
    )


def describe_size(size: str) -> str:
    return "all texts" if size == "all" else f"{size} per class"


def _read(comparison: Comparison, trial: Trial) -> Result | None:
    """Returns the result, under the model's present name; None where there is none, or it is damaged."""
    classes, targets = range(len(comparison.task.classes)), comparison.candidates[trial.model].test.chunks.targets
    try:
        content = json.loads(_path(comparison, trial).read_text(encoding="utf-8"))
        result = Result(**content | {"trial": trial})
        valid = all(type(number) is int and number in classes for number in result.predictions)
        return result if valid and len(result.predictions) == len(targets) else None
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _path(comparison: Comparison, trial: Trial) -> Path:
    decides = (FORMAT, trial.size, trial.seed, trial.learning_rate, comparison.candidates[trial.model].cache_key)
    return comparison.folder / "trials" / f"{digest(*decides)}.json"
